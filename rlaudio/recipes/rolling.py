"""Rolling out: k dialogues of every record with one policy on real actors, judged one by one, kept as they come.

What curation and distillation share. What lies in the run folder is not rolled out again.
"""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

from rlaudio.actors.pool import PlayedGroup
from rlaudio.aio import all_or_first_error
from rlaudio.config import RunConfig
from rlaudio.data.curation import Rolled, RolledFile, rolled, still_to_roll
from rlaudio.errors import DataError, JudgeError, RolloutError
from rlaudio.evals.summary import DialogueResult
from rlaudio.fingerprint import Contents, fingerprint
from rlaudio.observe.progress import Progress
from rlaudio.runs import RunFolder, write_json_atomic
from rlaudio.types import PromptRecord

ROLLED = "rolled.jsonl"


class Rollouts(Protocol):
    """What plays; `RolloutPool` does."""

    async def sample(self, record: PromptRecord, *, index: int, num_siblings: int, purpose: str) -> PlayedGroup: ...


class Graders(Protocol):
    """What judges; `RewardPool` does."""

    async def grade(self, played: PlayedGroup) -> list[DialogueResult]: ...


class Actors(Protocol):
    """Both, as `playing_actors` yields them."""

    @property
    def rollouts(self) -> Rollouts: ...

    @property
    def rewards(self) -> Graders: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Rolling:
    """How records are rolled out.

    Attributes:
        purpose: "curation" or "distil", for the actors' seeds: the two draw different dialogues.
        k: dialogues of every record.
        turns: record -> the turns that decide whether a dialogue of it passes.
        pass_share: of them, see `rlaudio.data.curation.rolled`.
        kept: of what is rolled out, which is counted as kept while it goes on.
    """

    purpose: str
    k: int
    turns: Mapping[str, frozenset[int]]
    pass_share: float
    kept: Callable[[Rolled], bool]


async def rolled_out(
    config: RunConfig,
    records: Sequence[PromptRecord],
    rolling: Rolling,
    *,
    folder: RunFolder,
    progress: Progress,
    play: Callable[..., AbstractAsyncContextManager[Actors]],
) -> list[Rolled]:
    """Roll out what the folder does not hold yet; no actor is started where nothing is missing.

    Args:
        play: `playing_actors`.

    Raises:
        EngineError: no actor is left; what was rolled out stays.
    """
    file = RolledFile(folder.path / ROLLED)
    missing = still_to_roll(records, file.found, k=rolling.k)
    try:
        if missing:
            if known := len(records) - len(missing):
                progress.say(f"{known} of {len(records)} records are rolled out already")
            progress.stage("starting engines")
            async with play(config, told=progress.say) as actors:
                progress.stage("rolling out")
                await roll_out(
                    config,
                    missing,
                    rolling,
                    actors=actors,
                    keep=file.add,
                    progressed=lambda done, fields: progress.update(done, len(missing), fields),
                )
    finally:
        file.close()
    return [file.found[record.id] for record in records]


async def roll_out(
    config: RunConfig,
    records: Sequence[PromptRecord],
    rolling: Rolling,
    *,
    actors: Actors,
    keep: Callable[[Rolled], None],
    progressed: Callable[[int, Mapping[str, float]], None],
) -> None:
    """Play and judge every record, as many at once as the engines take; each is kept as soon as it is judged.

    Raises:
        EngineError: no actor is left. What a single record fails at is kept as its problem.
    """
    slots = asyncio.Semaphore(in_flight(config, k=rolling.k))
    done = num_kept = 0

    async def one(index: int, record: PromptRecord) -> None:
        nonlocal done, num_kept
        async with slots:
            try:
                played = await actors.rollouts.sample(
                    record, index=index, num_siblings=rolling.k, purpose=rolling.purpose
                )
                results = await actors.rewards.grade(played)
                made = rolled(record, results, verified=rolling.turns[record.id], pass_share=rolling.pass_share)
            except (RolloutError, JudgeError) as error:
                made = dataclasses.replace(rolled(record, (), verified=(), pass_share=1.0), problem=str(error))
        keep(made)
        done += 1
        num_kept += rolling.kept(made)
        progressed(done, {"kept": num_kept})

    await all_or_first_error(one(index, record) for index, record in enumerate(records))


def in_flight(config: RunConfig, *, k: int) -> int:
    """Records at once: twice what the engines run at a time, so that the end of a long dialogue leaves none idle."""
    rollout = config.rollout
    return max(2, 2 * rollout.engine.max_num_seqs // k) * rollout.actors


def require_same(config: RunConfig, path: Path, *, free: str, **decisive: Any) -> None:
    """A folder's rollouts are of one policy, played and judged in one way; the first call writes down which.

    Args:
        path: where that is.
        free: settings that may change, in words.
        decisive: what else decides, beside the run's own settings.

    Raises:
        DataError: the folder was begun under others.
    """
    settings = {
        "model": config.model,
        "dialogue": config.dialogue,
        "sampling": config.sampling,
        "sources": config.rewards.sources,
        "augment": config.data.augment,
        "seed": config.run.seed,
        **decisive,
    }
    contents = Contents()
    identity = {name: fingerprint({name: value}, contents=contents) for name, value in settings.items()}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name, value in identity.items() if known.get(name) != value]:
            raise DataError(
                f"{path.parent} holds rollouts made under another {', '.join(changed)}: resume with the settings that "
                f"it began with ({free} alone may change), or start anew"
            )
    write_json_atomic(path, identity)
