"""Weights by collectives: every learner rank broadcasts its share to all rollout actors, NCCL on GPUs, gloo on CPUs.

    join      senders and receivers form one group per rank, under a new id
    announce  receivers are told what comes, and say whether a difference will do
    receive   all ranks send at once; the shares gather in host memory while the engines generate
    swap      each engine by itself

A group serves until somebody joins or is left out. Every step has a deadline of its own. When a step fails, all members
leave the group at once; who does not answer even that, died, or asked for the fewest chunks is named and left out;
whoever had everything already swaps, and the others form a group under a new id and start over. Training collectives
are never touched: ranks send finished copies, from a thread beside the one that trains.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlaudio.errors import WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights.asking import ask
from rlaudio.weights.base import Broadcast, Delivery, Receivers, SnapshotRef, SyncStep
from rlaudio.weights.deadline import OWN_SHARE, Deadline
from rlaudio.weights.groups import Address
from rlaudio.weights.membership import GroupSpec, Outcome, SenderStep
from rlaudio.weights.object_store import settle
from rlaudio.weights.receiver import Swap
from rlaudio.weights.receiving import Announce, Join, Leave, Receive

JOIN_SHARE, ANNOUNCE_SHARE, RECEIVE_SHARE, SWAP_SHARE = 1 / 6, 1 / 6, 1 / 3, 1 / 3
"""Of the whole deadline: a step that hangs leaves time to regroup and start over."""
GRACE_SHARE = 1 / 12
"""Of the whole deadline, for members to answer that they have left a group."""
MAX_UNEXPLAINED = 3
"""Attempts of one broadcast that failed without anybody to blame."""


class Senders(Protocol):
    """The learner's ranks."""

    @property
    def num_ranks(self) -> int: ...

    @property
    def life(self) -> int:
        """Another number for other ranks: they know nothing of the groups of those before."""
        ...

    async def ask_sender(self, rank: int, step: SenderStep, *, deadline_s: float) -> Any:
        """Run a step in a rank, beside its training. Raises WeightSyncError: it died, refused, or did not answer."""
        ...


@dataclass(slots=True)
class _Attempt:
    """One group's try: who has everything, and who is to blame."""

    received: dict[str, tuple[float, int]] = field(default_factory=dict)
    blamed: dict[str, WeightSyncError] = field(default_factory=dict)
    failed: str = ""


class CollectiveTransport:
    """`WeightTransport` over process groups of senders and receivers.

    Args:
        receivers: who gets the weights; asked anew at every broadcast.
        senders: the learner's ranks.
        deadline_s: for all receivers, from the beginning of a broadcast.
        on_gpu: NCCL instead of gloo.
    """

    def __init__(self, receivers: Receivers, senders: Senders, *, deadline_s: float, on_gpu: bool) -> None:
        self._receivers = receivers
        self._senders = senders
        self._deadline_s = deadline_s
        self._on_gpu = on_gpu
        self._run_id = uuid.uuid4().hex[:8]
        self._num_groups = 0
        self._live: GroupSpec | None = None
        self._life = senders.life
        self._num_unexplained = 0

    async def broadcast(self, snapshot: SnapshotRef, *, to: Receivers | None = None) -> Broadcast:
        """See `WeightTransport.broadcast`.

        Raises:
            WeightSyncError: also when a learner rank is the one that does not answer; names it.
        """
        deadline, began_s = Deadline(self._deadline_s), time.monotonic()
        receivers = to or self._receivers
        pending: dict[str, Any] = dict(receivers.handles)
        outcomes: dict[str, Delivery | WeightSyncError] = {}
        swapping: dict[str, asyncio.Task[Delivery | WeightSyncError]] = {}
        spent, self._num_unexplained = "", 0
        while pending and deadline.left_s > 0 and self._num_unexplained < MAX_UNEXPLAINED:
            attempt = await self._attempt(snapshot, pending, deadline)
            self._num_unexplained += bool(attempt.failed and not attempt.blamed)
            for name, (received_s, num_bytes) in attempt.received.items():
                swap = self._swap(snapshot.version, name, pending.pop(name), deadline, began_s, received_s, num_bytes)
                swapping[name] = asyncio.create_task(swap)
            for name, error in attempt.blamed.items():
                outcomes[name] = error
                pending.pop(name)
            spent = attempt.failed
        for name in pending:
            outcomes[name] = WeightSyncError(
                f"{name} did not have weights {snapshot.version} within {self._deadline_s:.3g} s: {spent}"
            )
        for name, task in swapping.items():
            outcomes[name] = await task
        return settle(snapshot.version, outcomes, receivers=receivers)

    # ---- one group ---------------------------------------------------------------------------------------------

    async def _attempt(self, snapshot: SnapshotRef, pending: Mapping[str, Any], deadline: Deadline) -> _Attempt:
        attempt, began_s = _Attempt(), time.monotonic()
        try:
            spec = await self._formed(pending, deadline)
            delta = await self._announce(spec, snapshot, pending, deadline)
            outcomes = await self._transfer(spec, snapshot, pending, deadline, delta=delta)
        except _StepFailedError as failure:
            attempt.blamed, attempt.failed, outcomes = failure.blamed, failure.why, failure.outcomes
        for name, outcome in outcomes.items():
            if outcome.num_bytes:
                attempt.received[name] = (time.monotonic() - began_s, outcome.num_bytes)
        return attempt

    async def _formed(self, pending: Mapping[str, Any], deadline: Deadline) -> GroupSpec:
        """The live group when it has exactly these members, else a new one."""
        if self._life != self._senders.life:
            self._live, self._life = None, self._senders.life
        if self._live is not None and set(self._live.names) == set(pending):
            return self._live
        limit_s = min(deadline.left_s, JOIN_SHARE * self._deadline_s)
        self._num_groups += 1
        address: Address = await self._senders.ask_sender(0, SenderStep("open"), deadline_s=limit_s)
        spec = GroupSpec(
            f"{self._run_id}-{self._num_groups}", address, self._senders.num_ranks, tuple(pending), self._on_gpu
        )
        own_s = OWN_SHARE * limit_s
        await self._together(
            spec,
            pending,
            what="join",
            receive={name: Join(spec, name, own_s) for name in pending},
            send=SenderStep("join", (spec,), {"timeout_s": own_s}),
            limit_s=limit_s,
        )
        self._live = spec
        return spec

    async def _announce(
        self, spec: GroupSpec, snapshot: SnapshotRef, pending: Mapping[str, Any], deadline: Deadline
    ) -> bool:
        """Whether everybody can take differences."""
        step = Announce(
            spec.group_id,
            snapshot.version,
            tuple(share.manifest for share in snapshot.shares),
            tuple(share.header.base for share in snapshot.shares),
        )
        answers = await self._together(
            spec,
            pending,
            what=f"take the announcement of weights {snapshot.version}",
            receive=dict.fromkeys(pending, step),
            send=None,
            limit_s=min(deadline.left_s, ANNOUNCE_SHARE * self._deadline_s),
        )
        return all(answers.values())

    async def _transfer(
        self, spec: GroupSpec, snapshot: SnapshotRef, pending: Mapping[str, Any], deadline: Deadline, *, delta: bool
    ) -> dict[str, Outcome]:
        limit_s = min(deadline.left_s, RECEIVE_SHARE * self._deadline_s)
        headers = [share.header for share in snapshot.shares]
        own_s = OWN_SHARE * limit_s
        changed = tuple(header.num_changed for header in headers) if delta else None
        step = Receive(spec.group_id, changed, tuple(header.base for header in headers), own_s)
        return await self._together(
            spec,
            pending,
            what=f"receive weights {snapshot.version}",
            receive=dict.fromkeys(pending, step),
            send=SenderStep("send", (spec.group_id, snapshot.version), {"delta": delta, "timeout_s": own_s}),
            limit_s=limit_s,
        )

    async def _swap(
        self,
        version: WeightVersion,
        name: str,
        handle: Any,
        deadline: Deadline,
        began_s: float,
        received_s: float,
        num_bytes: int,
    ) -> Delivery | WeightSyncError:
        limit_s = min(deadline.left_s, SWAP_SHARE * self._deadline_s)
        try:
            step = Swap(version, OWN_SHARE * limit_s)
            report = await ask(name, handle, step, what=f"swap to weights {version}", deadline_s=limit_s)
        except WeightSyncError as error:
            return error
        return Delivery(received_s, time.monotonic() - began_s, paused_s=report.paused_s, num_bytes=num_bytes)

    # ---- all members, one step ---------------------------------------------------------------------------------

    async def _together(
        self,
        spec: GroupSpec,
        pending: Mapping[str, Any],
        *,
        what: str,
        receive: Mapping[str, SyncStep],
        send: SenderStep | None,
        limit_s: float,
    ) -> dict[str, Any]:
        """Everybody's answer to one step. Raises _StepFailedError after everybody has been told to leave."""
        grace_s = GRACE_SHARE * self._deadline_s
        last_s = limit_s + 4 * grace_s  # who is silent is found out below, by who answers when the group is given up
        calls: dict[str, asyncio.Task[Any]] = {
            name: asyncio.create_task(ask(name, pending[name], step, what=what, deadline_s=last_s))
            for name, step in receive.items()
        }
        sends = [
            asyncio.create_task(self._senders.ask_sender(rank, step, deadline_s=last_s))
            for step in ([send] if send is not None else [])
            for rank in range(spec.num_ranks)
        ]
        everybody, deadline = [*calls.values(), *sends], Deadline(limit_s)
        waiting = set(everybody)
        while waiting and deadline.left_s > 0 and not any(_failed(task) for task in everybody):
            _, waiting = await asyncio.wait(waiting, timeout=deadline.left_s, return_when=asyncio.FIRST_COMPLETED)
        if not waiting and not any(_failed(task) for task in everybody):
            return {name: call.result() for name, call in calls.items()}
        self._live = None
        # A line that broke is tried once more before anybody is blamed for it.
        slowest = self._num_unexplained > 0 or deadline.left_s < (1 - OWN_SHARE) * limit_s
        limit = f"within {limit_s:.3g} s" if deadline.left_s <= 0 else "when the group was given up"
        try:
            left = await self._leave(spec, pending)
            await asyncio.wait(calls.values(), timeout=grace_s)
            blamed, outcomes = _blame(calls, what=f"{what} {limit}", left=left, slowest=slowest)
            raise _StepFailedError(blamed, outcomes, why=_first_reason(everybody))
        finally:
            for task in everybody:
                task.cancel()
            await asyncio.gather(*everybody, return_exceptions=True)

    async def _leave(self, spec: GroupSpec, pending: Mapping[str, Any]) -> dict[str, WeightSyncError]:
        """Tell everybody to give the group up. The receivers that did not answer even that, and why.

        Raises:
            WeightSyncError: a sender did not answer: without it nobody will get the weights.
        """
        grace_s = GRACE_SHARE * self._deadline_s
        step = SenderStep("leave", (spec.group_id,))
        told = [self._senders.ask_sender(rank, step, deadline_s=grace_s) for rank in range(spec.num_ranks)]
        asked = [
            ask(name, handle, Leave(spec.group_id), what=f"leave group {spec.group_id}", deadline_s=grace_s)
            for name, handle in pending.items()
        ]
        answers = await asyncio.gather(*told, *asked, return_exceptions=True)
        for answer in answers[: len(told)]:
            if isinstance(answer, BaseException):
                raise answer
        failed = zip(pending, answers[len(told) :], strict=True)
        return {name: answer for name, answer in failed if isinstance(answer, WeightSyncError)}


class _StepFailedError(Exception):
    """A step that not everybody finished: who is to blame, and how it went for the others."""

    def __init__(self, blamed: dict[str, WeightSyncError], outcomes: dict[str, Outcome], *, why: str) -> None:
        super().__init__(why)
        self.blamed, self.outcomes, self.why = blamed, outcomes, why


def _failed(task: asyncio.Task[Any]) -> bool:
    if not task.done():
        return False
    if task.cancelled() or task.exception() is not None:
        return True
    answer = task.result()
    return isinstance(answer, Outcome) and bool(answer.failed)


def _blame(
    calls: Mapping[str, asyncio.Task[Any]], *, what: str, left: Mapping[str, WeightSyncError], slowest: bool
) -> tuple[dict[str, WeightSyncError], dict[str, Outcome]]:
    """(name -> why, for those to leave out; name -> outcome of the others)."""
    blamed: dict[str, WeightSyncError] = {}
    outcomes: dict[str, Outcome] = {}
    for name, call in calls.items():
        error = call.exception() if call.done() and not call.cancelled() else None
        if isinstance(error, WeightSyncError):
            blamed[name] = error
        elif error is not None:
            raise error
        elif not call.done():  # everybody who still listens answers when the group is given up
            blamed[name] = WeightSyncError(f"{name} did not {what}")
        elif name in left:
            blamed[name] = left[name]
        elif isinstance(call.result(), Outcome):
            outcomes[name] = call.result()
    if not blamed and slowest:
        posted = {name: outcome.posted for name, outcome in outcomes.items() if outcome.failed}
        if posted and min(posted.values()) < max(posted.values()):
            for name, count in posted.items():
                if count == min(posted.values()):
                    blamed[name] = WeightSyncError(
                        f"{name} did not {what} and held the others up: {outcomes[name].failed}"
                    )
    return blamed, outcomes


def _first_reason(tasks: Sequence[asyncio.Task[Any]]) -> str:
    for task in tasks:
        if task.done() and not task.cancelled():
            error = task.exception()
            if error is not None:
                return str(error)
            if isinstance(task.result(), Outcome) and task.result().failed:
                return str(task.result().failed)
    return "no member said why"
