"""What all sources have in common that need no model: they are built, and asked about every record, before a run.

A verifier says one value per turn, or nothing of a turn that does not ask for what it checks.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlaudio.dialogue.users import as_said, played_turns
from rlaudio.errors import AudioError, ConfigError, DataError, JudgeError
from rlaudio.rewards.base import Failure, JudgeServices, Scores
from rlaudio.types import Dialogue, Judgment, PromptRecord, Turn


@dataclass(frozen=True, slots=True)
class Finding:
    """What a verifier says of one turn; see `Judgment`."""

    value: float
    detail: Mapping[str, float] = field(default_factory=dict)


class Verifier:
    """A `Judge` by rule. A subclass says what it finds (`check`), and may say which turns and records it is for.

    Raises:
        ConfigError: `unplayed` is not finite.
    """

    measures: ClassVar[str] = ""
    """For the trap monitor: "verified" where it says whether a reply is right, "preference" where how good it is."""

    slow: ClassVar[bool] = False
    """True runs `check` in threads, several at once: a reward actor's other requests must not wait for it."""

    def __init__(self, services: JudgeServices, *, name: str, unplayed: float = 0.0) -> None:
        require_finite(name, unplayed=unplayed)
        self.name = name
        self.unplayed = unplayed

    def speaks_of(self, record: PromptRecord, turn: int) -> bool:
        """Whether there is something to check in the reply to the `turn`-th user message, whoever gives it."""
        return True

    @classmethod
    def record_problems(cls, record: PromptRecord, options: Mapping[str, Any]) -> Iterable[str]:
        """Why a record cannot be checked under these options, one sentence each, without its id. Asked before a run."""
        return ()

    def check(self, record: PromptRecord, turn: Turn) -> Finding:
        """Look at one turn that it speaks of.

        Raises:
            AudioError, JudgeError: nothing can be said of it; the sibling leaves its group.
            DataError: the record is at fault, and `record_problems` should have said so.
        """
        raise NotImplementedError

    async def score(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> Scores:
        turns = {turn for turn in played_turns(record) if self.speaks_of(record, turn)}
        judgments: list[Judgment] = []
        failures: list[Failure] = []
        for dialogue in dialogues:
            said = as_said(record, dialogue.turns)
            for turn in dialogue.turns:
                if turn.index not in turns:
                    continue
                place = (dialogue.sibling, turn.index)
                try:
                    found = await asyncio.to_thread(self.check, said, turn) if self.slow else self.check(said, turn)
                    judgments.append(Judgment(self.name, *place, found.value, dict(found.detail)))
                except (AudioError, JudgeError) as error:
                    failures.append(Failure(self.name, *place, str(error)))
                except DataError as error:  # simulated records never passed the checks at load
                    raise JudgeError(f"record {record.id!r}: {error}") from error
            await asyncio.sleep(0)  # other groups' judging goes on between two dialogues
        return Scores(tuple(judgments), tuple(failures))


def require_finite(source: str, **options: float) -> None:
    """Raise ConfigError unless every option is a finite number."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"reward source {source!r}: {name} is {value!r}, set a finite number")


def require_at_least(source: str, low: float, **options: float) -> None:
    """Raise ConfigError unless every option is a finite number of at least `low`."""
    require_finite(source, **options)
    for name, value in options.items():
        if value < low:
            raise ConfigError(f"reward source {source!r}: {name} is {value:g}, set at least {low:g}")
