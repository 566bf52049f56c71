"""The staleness window: admits groups, holds their experience until it is taken, frees slots when weights are live.

**The bound.** A group holds a slot from admission until the weights trained on it are live on every engine; there are
`(max_staleness + 1) * P` slots, P = `groups_per_step`. When a group is admitted, T batches are taken and not live yet,
so at most `(max_staleness + 1 - T) * P - 1` groups stand before it. In order of admission it is then taken T more
batches later plus one for every P before it: at most `max_staleness`. With k optimizer steps per batch (`epochs *
minibatches`), that is `max_staleness * k` versions.

**Look-ahead.** One long dialogue need not hold up all behind it: a group may be overtaken by `look_ahead` groups that
were admitted after it, and is waited for from then on. Those count as if they had stood before it, so the bound grows
to `max_staleness + ceil(look_ahead / P)`, and it is reached. At `max_staleness` 0 nobody stands behind the batch that
is waited for, so nothing is overtaken and the bound stays 0. With `too_old: drop` the bound stays `max_staleness`
whatever is overtaken: a group that has become older is dropped when its turn comes, instead of trained on.

A group is as old as its oldest token, whichever turn of whichever sibling that is. Age is checked again at `take`,
against the versions that were recorded with the tokens: slots and order promise it, the check does not trust them.
"""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from rlaudio.config import AlgorithmSettings
from rlaudio.errors import StalenessError, StarvedError
from rlaudio.types import WeightVersion


class Experience(Protocol):
    """What the window asks of a settled group."""

    @property
    def oldest_version(self) -> WeightVersion: ...


E = TypeVar("E", bound=Experience)

NO_SIGNAL = "no signal: every sibling has the same reward"
DIVERGED = "diverged: loss or gradient was not finite"
CUT_OFF = "cut off: the run ended between two optimizer steps of its batch"
TOO_OLD = "too old: it was overtaken for too long"


@dataclass(frozen=True, slots=True)
class Ticket:
    """A group's place in line: its number. In a line numbers grow, and none comes twice."""

    group: int


@dataclass(frozen=True, slots=True)
class WindowStats:
    """Counts since the window was made (`admitted`, `taken`, `dropped`), now (`waiting`, `ready`), of the last batch.

    A group that was taken and lost afterwards counts as dropped: admitted = taken + dropped + waiting + ready.

    Attributes:
        bound: versions that a token may be old when it is trained on.
        overtaken: times that a slow group was overtaken by one of the batch.
        ready_s: mean seconds that the batch's groups lay ready.
        take_s: seconds that the learner waited for the batch.
    """

    admitted: int
    taken: int
    dropped: dict[str, int]
    waiting: int
    ready: int
    bound: int
    overtaken: int
    ready_s: float
    take_s: float


class StalenessWindow(Generic[E]):
    """One writer per ticket: it is settled or dropped exactly once, and released exactly once if it was taken.

    Args:
        settings: staleness, look-ahead, groups per step, and how many drops in a row are too many.
        dropped: told once of every ticket that will not be trained on, with the reason.
    """

    def __init__(
        self,
        settings: AlgorithmSettings,
        *,
        dropped: Callable[[Ticket, str], None] = lambda ticket, reason: None,
    ) -> None:
        self._groups_per_step = settings.groups_per_step
        self._slots = asyncio.Semaphore((settings.max_staleness + 1) * settings.groups_per_step)
        self._look_ahead = settings.look_ahead if settings.max_staleness else 0
        self._promised = promised_age(settings, overtaken=True)
        self.bound = promised_age(settings)
        self._max_dropped = settings.max_dropped_in_a_row
        self._on_drop = dropped
        self._num_admitted = 0
        self._line: OrderedDict[int, None] = OrderedDict()  # thousands: whoever leaves is not searched for
        self._ready: dict[int, tuple[E, float]] = {}  # with the time it became so
        self._overtaken: Counter[int] = Counter()  # groups in line only
        self._waited_for: int | None = None  # nothing can be taken before this group is ready or has left
        self._held: set[int] = set()  # taken, not released
        self._changed = asyncio.Condition()
        self._dropped: Counter[str] = Counter()
        self._dropped_in_a_row = 0
        self._last_reason = ""
        self._num_taken = 0
        self._last_overtaken, self._ready_s, self._take_s = 0, 0.0, 0.0

    async def slot(self) -> None:
        """Wait until a group may be admitted, and keep its place: the only backpressure on generation."""
        await self._slots.acquire()

    def admit(self, group: int) -> Ticket:
        """The group of this number takes the slot that was waited for, at the end of the line."""
        self._num_admitted += 1
        self._line[group] = None
        return Ticket(group)

    async def settle(self, ticket: Ticket, experience: E) -> None:
        """The group is ready to be trained on."""
        async with self._changed:
            self._require_waiting(ticket)
            self._ready[ticket.group] = (experience, _now_s())
            self._waits_no_more(ticket.group)
            self._dropped_in_a_row = 0
            self._changed.notify_all()

    async def drop(self, ticket: Ticket, *, reason: str, detail: str = "") -> None:
        """A group that is waited for leaves the line, and its slot is free at once.

        Args:
            ticket: the group's.
            reason: what is counted.
            detail: what went wrong this time, for the error that ends a starved run.
        """
        async with self._changed:
            self._require_waiting(ticket)
            self._dropped_in_a_row += 1
            self._last_reason = f"{reason}: {detail}" if detail else reason
            self._leave_line(ticket.group, reason=reason)
            self._changed.notify_all()

    async def take(self, *, consumed_by: WeightVersion) -> list[tuple[Ticket, E]]:
        """Wait until `groups_per_step` groups may be taken, and take them, oldest first. Their slots stay held.

        Args:
            consumed_by: the weights that they will train; ages are counted from them.

        Raises:
            StarvedError: `max_dropped_in_a_row` groups were dropped with none settled between.
            StalenessError: a group is older than slots and order can explain.
        """
        began_s = _now_s()
        async with self._changed:
            while True:
                chosen, overtaken = self._choose()
                if len(chosen) == self._groups_per_step:
                    too_old = [group for group in chosen if self._is_too_old(group, consumed_by)]
                    if not too_old:
                        break
                    for group in too_old:
                        self._leave_line(group, reason=TOO_OLD)
                elif self._dropped_in_a_row >= self._max_dropped:
                    raise StarvedError(
                        f"{self._dropped_in_a_row} groups in a row were dropped, the last because of: "
                        f"{self._last_reason}; check the rewards and the engines, or raise "
                        "algorithm.max_dropped_in_a_row"
                    )
                else:
                    await self._changed.wait()
            self._overtaken += overtaken
            return self._hand_out(chosen, num_overtaken=overtaken.total(), began_s=began_s)

    def lose(self, tickets: Iterable[Ticket], *, reason: str) -> None:
        """A taken batch was not trained on: its groups count as dropped. Their slots stay held until `release`."""
        for ticket in tickets:
            self._require_held(ticket)
            self._num_taken -= 1
            self._count_drop(ticket.group, reason=reason)

    def release(self, tickets: Iterable[Ticket]) -> None:
        """Weights trained on a taken batch are live on every engine: its slots are free."""
        for ticket in tickets:
            self._require_held(ticket)
            self._held.remove(ticket.group)
            self._slots.release()

    def stats(self) -> WindowStats:
        return WindowStats(
            admitted=self._num_admitted,
            taken=self._num_taken,
            dropped=dict(self._dropped),
            waiting=len(self._line) - len(self._ready),
            ready=len(self._ready),
            bound=self.bound,
            overtaken=self._last_overtaken,
            ready_s=self._ready_s,
            take_s=self._take_s,
        )

    def _choose(self) -> tuple[list[int], Counter[int]]:
        """One batch of ready groups in order of admission, and how often that overtakes which others; or fewer."""
        chosen: list[int] = []
        passed: list[int] = []
        overtaken: Counter[int] = Counter()
        if self._waited_for is not None or len(self._ready) < self._groups_per_step:
            return chosen, overtaken  # asked at every group that is settled: the line is not walked for nothing
        for group in self._line:
            if len(chosen) == self._groups_per_step:
                break
            if group not in self._ready:
                passed.append(group)
                continue
            # Who overtakes one in line overtakes all that are slow before it: the first was overtaken most. Whatever
            # else becomes ready, it is overtaken no more and nothing behind it is taken.
            if passed and self._overtaken[passed[0]] + overtaken[passed[0]] >= self._look_ahead:
                self._waited_for = passed[0]
                break
            overtaken.update(passed)
            chosen.append(group)
        return chosen, overtaken

    def _waits_no_more(self, group: int) -> None:
        if group == self._waited_for:
            self._waited_for = None

    def _is_too_old(self, group: int, consumed_by: WeightVersion) -> bool:
        oldest = self._ready[group][0].oldest_version
        age = consumed_by.number - oldest.number
        if age > self._promised or oldest.incarnation != consumed_by.incarnation:
            raise StalenessError(
                f"group {group} has a token of version {oldest} and would train version {consumed_by}, over the bound "
                f"of {self._promised}: an engine sampled from older weights than it was given, or this is a bug in "
                "rlaudio; resume the run from its last checkpoint and report this line"
            )
        return age > self.bound

    def _hand_out(self, chosen: list[int], *, num_overtaken: int, began_s: float) -> list[tuple[Ticket, E]]:
        now_s = _now_s()
        taken = []
        waited_s = 0.0
        for group in chosen:
            experience, ready_since_s = self._ready.pop(group)
            del self._line[group]
            del self._overtaken[group]
            taken.append((Ticket(group), experience))
            waited_s += now_s - ready_since_s
        self._held.update(chosen)
        self._num_taken += len(chosen)
        self._last_overtaken, self._ready_s, self._take_s = num_overtaken, waited_s / len(chosen), now_s - began_s
        return taken

    def _leave_line(self, group: int, *, reason: str) -> None:
        del self._line[group]
        self._waits_no_more(group)
        self._ready.pop(group, None)
        del self._overtaken[group]
        self._count_drop(group, reason=reason)
        self._slots.release()

    def _count_drop(self, group: int, *, reason: str) -> None:
        self._dropped[reason] += 1
        self._on_drop(Ticket(group), reason)

    def _require_waiting(self, ticket: Ticket) -> None:
        if ticket.group not in self._line or ticket.group in self._ready:
            raise ValueError(f"group {ticket.group} is not waiting: it was settled, dropped or taken before")

    def _require_held(self, ticket: Ticket) -> None:
        if ticket.group not in self._held:
            raise ValueError(f"group {ticket.group} holds no slot after a take: it was released before")


def promised_age(settings: AlgorithmSettings, *, overtaken: bool = False) -> int:
    """Versions that a token may be old when it is trained on.

    Args:
        overtaken: also what `too_old: drop` would drop: how old slots and order let a group become.
    """
    batches = settings.max_staleness
    if settings.max_staleness and (overtaken or settings.too_old != "drop"):
        batches += -(-settings.look_ahead // settings.groups_per_step)
    return batches * settings.epochs * settings.minibatches


def _now_s() -> float:
    return asyncio.get_running_loop().time()
