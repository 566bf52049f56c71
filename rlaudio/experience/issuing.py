"""What is played next: the groups that a restart brought back, by number, then new prompts from the stream."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rlaudio.config import AlgorithmSettings
from rlaudio.errors import DataError
from rlaudio.experience.ledger import Entry, Ledger
from rlaudio.experience.spool import Spool, Spooled
from rlaudio.experience.window import promised_age
from rlaudio.types import PromptRecord, WeightVersion


class Prompts(Protocol):
    """An endless stream that deals the same records in the same order again, from any number on."""

    @property
    def num_issued(self) -> int:
        """How many it has dealt: the number of the next one."""
        ...

    def next(self) -> PromptRecord: ...

    def find(self, prompt_id: str) -> PromptRecord:
        """The record of this id. Raises DataError: there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Issue:
    """One group to be played.

    Attributes:
        incarnation: of this life of the run.
        spooled: its experience, where an earlier life left it ready to be trained on.
    """

    group: int
    record: PromptRecord
    incarnation: int = 0
    spooled: Spooled | None = None


class Issuer:
    """Deals groups and records each in the ledger.

    Args:
        prompts: the stream.
        ledger: records what is dealt. What it knows of is not dealt again: the stream goes on behind it.
        returned: what `Ledger.restore` brought back.

    Raises:
        DataError: the stream deals other records than it did when the ledger was written.
    """

    def __init__(self, prompts: Prompts, ledger: Ledger, *, returned: Sequence[Entry] = ()) -> None:
        self._prompts = prompts
        self._ledger = ledger
        self._returned = deque(returned)
        self._catch_up()

    def next(self) -> Issue:
        """The next group; never ends."""
        life = self._ledger.incarnation
        if self._returned:
            entry = self._returned.popleft()
            spooled = entry.spooled if entry.state == "ready" else None
            return Issue(entry.group, self._prompts.find(entry.prompt), life, spooled)
        group, record = self._prompts.num_issued, self._prompts.next()
        self._ledger.issued(group, prompt=record.id)
        return Issue(group, record, life)

    def _catch_up(self) -> None:
        """Deal again, to nobody, what was dealt after the stream's state was saved."""
        first = self._prompts.num_issued
        for group, prompt in enumerate(self._ledger.prompts_since(first), start=first):
            record = self._prompts.next()
            if record.id != prompt:
                raise DataError(
                    f"group {group} was record {prompt!r} when the run was stopped and would be {record.id!r} now: the "
                    "data or its settings changed; resume with the same ones, or start a new run"
                )


def why_not_again(
    entry: Entry,
    num_before: int,
    *,
    ledger: Ledger,
    origin: WeightVersion,
    settings: AlgorithmSettings,
    spool: Spool,
) -> str:
    """Why a group that was ready before a restart cannot be trained on after it; nothing when it can.

    It is taken with the batch that its place among the returned groups says, so its age by then is known: groups before
    it may be dropped, which makes it younger, and none overtakes what is ready.

    Args:
        num_before: groups that come back and stand before it.
        origin: the weights that training goes on from.
    """
    assert entry.versions is not None, "it was ready once"
    oldest, newest = entry.versions
    if not ledger.lineage.is_ancestor(newest, of=origin):
        return "played with weights that were abandoned"
    steps = settings.epochs * settings.minibatches
    age = origin.number + num_before // settings.groups_per_step * steps - oldest.number
    if age > promised_age(settings):
        return "too old after the restart"
    if entry.spooled is None or not spool.holds(entry.spooled):
        return "not in the spool"
    return ""
