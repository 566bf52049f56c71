"""What tests of weight transports share: shares of made-up tensors, and actors that receive them, well or badly."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import ray

from rlaudio.engines.base import SwapReport, WeightUpdate
from rlaudio.errors import WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights.base import SyncStep
from rlaudio.weights.delta import Delta, delta_of
from rlaudio.weights.groups import in_daemon
from rlaudio.weights.membership import Outcome, SenderStep, WeightSender
from rlaudio.weights.receiver import WeightReceiver
from rlaudio.weights.shares import Manifest, Piece, Share, even_runs
from rlaudio.weights.snapshot import NUMPY_DTYPES, checksum, verify_update
from tests.fakes import FakeEngine


def share_of(
    tensors: Mapping[str, np.ndarray], *, rank: int, world_size: int, dtype: str, version: WeightVersion
) -> Share:
    """What a rank that holds all of `tensors` hands out."""
    sizes = {name: tensor.size for name, tensor in tensors.items()}
    pieces, runs = [], [np.zeros(0, NUMPY_DTYPES[dtype])]
    for name, start, length in even_runs(sizes, rank=rank, world_size=world_size):
        run = tensors[name].reshape(-1)[start : start + length]
        pieces.append(Piece(name, tensors[name].shape, start, length, checksum(run)))
        runs.append(run)
    return Share(Manifest(version, rank, world_size, dtype, tuple(pieces)), np.concatenate(runs))


@dataclass(frozen=True)
class Header:
    rank: int
    num_bytes: int = 0
    base: WeightVersion | None = None
    num_changed: int = 0


@dataclass(frozen=True)
class SentShare:
    header: Header
    ref: Any
    delta: Any = None
    manifest: Any = None


@dataclass(frozen=True)
class Sent:
    version: WeightVersion
    shares: list[SentShare]


@dataclass
class Pool:
    """Receivers; remembers who was left out, and leaves it alive."""

    handles: dict[str, Any]
    evicted: list[str] = field(default_factory=list)

    def evict(self, name: str, *, reason: str) -> None:
        self.evicted.append(name)


class FakeRank:
    """A learner rank without a learner: made-up weights, the real sender."""

    def __init__(self, rank: int, world_size: int, dtype: str) -> None:
        self._rank, self._world_size, self._dtype = rank, world_size, dtype
        self._sender = WeightSender(rank)
        self._last: Share | None = None

    def pid(self) -> int:
        import torch.distributed  # noqa: F401 (as a learner rank has, before any deadline runs)

        return os.getpid()

    def step(
        self, tensors: dict[str, np.ndarray], version: WeightVersion
    ) -> tuple[Header, Manifest, Share, Delta | None]:
        share = share_of(tensors, rank=self._rank, world_size=self._world_size, dtype=self._dtype, version=version)
        delta = None if self._last is None else delta_of(share, base=self._last)
        self._last = share
        self._sender.keep(share, delta)
        base, num_changed = (None, 0) if delta is None else (delta.base, len(delta.places))
        return Header(self._rank, share.num_bytes, base, num_changed), share.manifest, share, delta

    def weights(self, step: SenderStep) -> Any:
        return step.run(self._sender)


class LocalRanks:
    """The `Senders` of a collective transport, in threads of this process; rank `mute` answers nothing.

    Args:
        refer: makes an object reference; `ray.put` where a receiver is in another process.
    """

    def __init__(self, num_ranks: int, *, dtype: str = "bfloat16", refer: Callable[[Any], Any] | None = None) -> None:
        self.num_ranks, self.life = num_ranks, 1
        self.ranks = [FakeRank(rank, num_ranks, dtype) for rank in range(num_ranks)]
        self._dtype = dtype
        self._refer = refer or Arrived
        self.sent: list[SenderStep] = []
        self.mute: int | None = None

    def start_again(self, num_ranks: int) -> list[FakeRank]:
        """Others take the ranks' places; those of before, which still hold their ends of the lines."""
        before = self.ranks
        self.ranks = [FakeRank(rank, num_ranks, self._dtype) for rank in range(num_ranks)]
        self.num_ranks, self.life = num_ranks, self.life + 1
        return before

    def publish(self, tensors: dict[str, np.ndarray], version: WeightVersion) -> Sent:
        shares = []
        for rank in self.ranks:
            header, manifest, share, delta = rank.step(tensors, version)
            shares.append(SentShare(header, share, delta, self._refer(manifest)))
        return Sent(version, shares)

    async def ask_sender(self, rank: int, step: SenderStep, *, deadline_s: float) -> Any:
        self.sent.append(step)
        if rank == self.mute:
            await asyncio.sleep(deadline_s)
            raise WeightSyncError(f"learner rank {rank} did not {step.method} within {deadline_s:g} s")
        try:
            return await asyncio.wait_for(in_daemon(partial(self.ranks[rank].weights, step)), deadline_s)
        except TimeoutError as error:
            raise WeightSyncError(f"learner rank {rank} did not {step.method} within {deadline_s:g} s") from error


class FakeRanks:
    """The `Senders` of a collective transport, in Ray actors."""

    def __init__(self, num_ranks: int, *, dtype: str = "bfloat16") -> None:
        self.num_ranks, self.life = num_ranks, 1
        actor = ray.remote(concurrency_groups={"sending": 8})(FakeRank).options(num_cpus=0)
        self._actors = [actor.remote(rank, num_ranks, dtype) for rank in range(num_ranks)]
        self.pids = ray.get([one.pid.remote() for one in self._actors], timeout=120.0)

    async def publish(self, tensors: dict[str, np.ndarray], version: WeightVersion) -> Sent:
        calls = [actor.step.options(num_returns=4).remote(tensors, version) for actor in self._actors]
        return Sent(version, [SentShare(await call[0], call[2], call[3], call[1]) for call in calls])

    async def ask_sender(self, rank: int, step: SenderStep, *, deadline_s: float) -> Any:
        call = self._actors[rank].weights.options(concurrency_group="sending").remote(step)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(call.future()), deadline_s)
        except TimeoutError:
            raise WeightSyncError(f"learner rank {rank} did not {step.method} within {deadline_s:g} s") from None

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


class WritesDown(FakeEngine):
    """Keeps the updates it was given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.updates: list[WeightUpdate] = []
        self.refuses = False

    async def update_weights(self, update: WeightUpdate, *, deadline_s: float) -> SwapReport:
        if self.refuses:
            raise WeightSyncError("tensor 'b' has another shape")
        self.updates.append(update)
        return await super().update_weights(update, deadline_s=deadline_s)


class ReceivingActor:
    """A fake engine behind the real receiver.

    Args:
        fault: "HOW in STEP", STEP being the name of a `SyncStep`; or "refuses", by the engine. HOW is "sleeps" (a
            coroutine that never ends), "stops" (the whole process stands still), "dies", or "breaks" (its group does,
            once).
    """

    def __init__(self, fault: str = "", *, keeps_base: bool = False) -> None:
        self._how, _, self._step = fault.partition(" in ")
        self.engine = WritesDown(reply=lambda request: [9, 1])
        self.engine.refuses = fault == "refuses"
        self.receiver = WeightReceiver(self.engine, keeps_base=keeps_base)
        self.cancelled = False

    async def alive(self) -> int:
        return os.getpid()

    async def warm(self) -> None:
        """What a rollout actor has imported long before its first weights come."""
        import torch.distributed  # noqa: F401

    async def version(self) -> WeightVersion:
        return self.engine.version

    async def held(self) -> tuple[WeightVersion, dict[str, int]]:
        """What is live, after comparing checksums as an engine does: version, and the sum of each tensor."""
        update = self.engine.updates[-1]
        verify_update(update)
        return self.engine.version, {name: int(one.astype(np.int64).sum()) for name, one in update.tensors.items()}

    async def misbehave(self, fault: str) -> None:
        self._how, _, self._step = fault.partition(" in ")

    async def was_cancelled(self) -> bool:
        return self.cancelled

    async def sync(self, step: SyncStep) -> Any:
        if type(step).__name__ == self._step:
            if self._how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._how == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self._how == "breaks":
                self._how = self._step = ""
                return Outcome(failed="the line was cut")
            try:
                await asyncio.sleep(3600.0)
            except asyncio.CancelledError:
                self.cancelled = True
                raise
        return await step.run(self.receiver)


async def gone(pid: int, *, deadline_s: float = 60.0) -> None:
    """Return when there is no such process any more: its parent notices a moment after those it talked to."""
    async with asyncio.timeout(deadline_s):
        while True:
            try:
                os.kill(pid, signal.SIG_DFL)
            except ProcessLookupError:
                return
            await asyncio.sleep(0.05)


class Arrived:
    """Stands for an object reference whose object is here."""

    def __init__(self, value: Any = None) -> None:
        self._future: Future[Any] = Future()
        self._future.set_result(value)

    def future(self) -> Future[Any]:
        return self._future


class Here:
    """Stands for a Ray handle of an actor in this process.

    Args:
        sync: the actor's method.
    """

    def __init__(self, sync: Callable[[SyncStep], Coroutine[Any, Any, Any]]) -> None:
        self._sync = sync
        self.sync = self

    def remote(self, step: SyncStep) -> Arrived:
        call = Arrived()
        call._future = asyncio.run_coroutine_threadsafe(self._sync(step), asyncio.get_running_loop())
        return call
