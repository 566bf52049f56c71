"""The learner as the driver sees it: N ranks in Ray actors that always move together.

Every call is sent to all ranks before anything is awaited, so no two collectives can interleave, and has a deadline.
The driver holds headers and references; experience and weights go from actor to actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rlaudio.config import AlgorithmSettings, PhaseSettings
from rlaudio.errors import LearnerError, RlaudioError, WeightSyncError
from rlaudio.learner.messages import (
    MinibatchSpec,
    PreparedBatch,
    PublishedShare,
    PublishedSnapshot,
    ShareHeader,
    StepMetrics,
    TrainerSpec,
)
from rlaudio.types import WeightVersion
from rlaudio.weights.membership import SenderStep, WeightSender

if TYPE_CHECKING:
    import pyarrow as pa
    from torch._C._distributed_c10d import Store  # torch.distributed does not type what it re-exports

    from rlaudio.learner.rank import RankProbe, RankWorker
    from rlaudio.weights.delta import Delta
    from rlaudio.weights.shares import Manifest, Share


GRACE_S = 2.0
"""How long the other ranks' errors are waited for once one rank has failed."""

SENDING, SENDING_THREADS = "sending", 8
"""Ray concurrency group of a rank's weight sender. A call that was given up holds its thread until its time-out."""


class LearnerGroup:
    """A handle to the ranks.

    Args:
        spec: what every rank builds.
        algorithm: of the policy steps; None when only supervised steps will be taken.
        env_vars: added to each rank's environment (for example PYTHONPATH).
        place: Ray's options that say where the next rank goes.
    """

    def __init__(
        self,
        spec: TrainerSpec,
        *,
        algorithm: AlgorithmSettings | None = None,
        env_vars: Mapping[str, str] | None = None,
        place: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self._spec = spec
        self._algorithm = algorithm
        self._env_vars = _environment(spec, env_vars or {})
        self._place = place
        self._actors: list[Any] = []
        self._failed: str | None = None
        self._num_calls = 0
        self._mid_step = False

    @property
    def is_busy(self) -> bool:
        """Whether the ranks have a batch, or anything else to do; sending their weights beside it does not count."""
        return self._num_calls > 0 or self._mid_step

    async def start(self) -> None:
        """Bring up the ranks and their models.

        Raises:
            LearnerError: a rank did not come up before `learner.start_deadline_s` (too few free CPUs or GPUs?).
        """
        learner = self._spec.learner
        # Weights are sent beside training: from threads of their own, where the rank is asked to send them.
        groups = {SENDING: SENDING_THREADS} if self._spec.sync.transport == "collective" else None
        remote = ray.remote(concurrency_groups=groups)(_RankActor) if groups else ray.remote(_RankActor)
        options = {
            "num_cpus": learner.num_cpus,
            "num_gpus": learner.num_gpus,
            "runtime_env": {"env_vars": self._env_vars},
        }
        self._actors = [
            remote.options(**options, **self._place()).remote(rank, learner.ranks) for rank in range(learner.ranks)
        ]
        deadline = learner.start_deadline_s
        address = (await self._all("open_store", deadline_s=deadline))[0]
        await self._all("build", self._spec, address, deadline_s=deadline)

    async def prepare(
        self,
        refs: Sequence[ray.ObjectRef[pa.RecordBatch]],
        states: Sequence[ray.ObjectRef[pa.RecordBatch] | None] = (),
    ) -> PreparedBatch:
        """Hand every rank the experience of whole groups; each takes its share.

        Args:
            refs: rows, one batch per group.
            states: encoder states of the clips in the batch of `refs` at the same place, None where none are shipped;
                or nothing at all. A rank fetches those that it needs and does not have.

        Raises:
            DataError, AudioError: a row cannot be trained on.
            LearnerError: a rank died, or missed `learner.step_deadline_s`.
        """
        if self._algorithm is None:
            raise LearnerError("this learner group was built without an algorithm: pass one to take policy steps")
        # In a list, references stay references: Ray would fetch an argument before the call.
        prepared: list[PreparedBatch] = await self._all("prepare", self._algorithm, list(states), *refs)
        return replace(
            max(prepared, key=lambda one: one.prepare_s),
            encoder_forwards=sum(one.encoder_forwards for one in prepared),
            states_bytes=sum(one.states_bytes for one in prepared),
        )

    def minibatches(self, prepared: PreparedBatch) -> list[MinibatchSpec]:
        """The optimizer steps to take on a prepared batch, in order."""
        return [
            MinibatchSpec(epoch=epoch, index=index)
            for epoch in range(prepared.epochs)
            for index in range(prepared.num_minibatches)
        ]

    async def forward_backward(self, part: MinibatchSpec) -> None:
        """Accumulate one minibatch's gradient. Raises DivergenceError: the loss is not finite."""
        self._mid_step = False
        await self._all("forward_backward", part)
        self._mid_step = True  # until the optimizer has stepped, whatever that waits for

    async def optimizer_step(self) -> PublishedSnapshot:
        """Move the weights once; every rank's share of them stays where it was made.

        Raises:
            DivergenceError: the gradient is not finite; no rank changed its weights.
        """
        self._mid_step = False
        return await self._published("optimizer_step")

    async def snapshot(self) -> PublishedSnapshot:
        """The current weights, for engines that start."""
        return await self._published("snapshot")

    @property
    def num_ranks(self) -> int:
        return self._spec.learner.ranks

    async def ask_sender(self, rank: int, step: SenderStep, *, deadline_s: float) -> Any:
        """Run a step of a collective broadcast in a rank, beside its training; see `weights.collective.Senders`.

        Raises:
            WeightSyncError: the rank died, refused, or did not answer in time.
        """
        self._require_alive()
        call = self._actors[rank].weights.options(concurrency_group=SENDING).remote(step)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(call.future()), deadline_s)
        except TimeoutError:
            raise WeightSyncError(
                f"learner rank {rank} did not {step.method} weights within {deadline_s:.3g} s: look at its log"
            ) from None
        except (RayActorError, RayTaskError) as error:
            cause = getattr(error, "cause", None) or error
            raise WeightSyncError(
                f"learner rank {rank} did not {step.method} weights: {type(cause).__name__}: {_reason(cause)}"
            ) from error

    async def _published(self, phase: str) -> PublishedSnapshot:
        self._require_alive()
        calls = [getattr(actor, phase).options(num_returns=4).remote() for actor in self._actors]
        told: list[tuple[StepMetrics, ShareHeader]] = await self._gather(phase, [call[0] for call in calls])
        metrics = told[0][0]
        made_s = max(header.made_s for _, header in told)
        return PublishedSnapshot(
            version=metrics.version,
            shares=tuple(PublishedShare(header, *call[1:]) for (_, header), call in zip(told, calls, strict=True)),
            metrics=replace(metrics, values=metrics.values | {"publish_s": made_s}),
        )

    async def supervised_step(self, refs: Sequence[ray.ObjectRef[pa.RecordBatch]], phase: PhaseSettings) -> StepMetrics:
        """One supervised step on all rows of `refs`; a phase's first step starts a fresh optimizer.

        Raises:
            DataError, AudioError, ConfigError: rows or phase cannot be trained on.
            DivergenceError: loss or gradient is not finite; no rank changed its weights.
        """
        metrics: list[StepMetrics] = await self._all("supervised_step", phase, *refs)
        return metrics[0]

    async def probe(self, probe: RankProbe, *refs: ray.ObjectRef[pa.RecordBatch]) -> Any:
        """Run a probe on every rank at once; rank 0's answer. Raises what the probe raises."""
        return (await self._all("probe", probe, *refs))[0]

    async def save(self, path: Path | str) -> WeightVersion:
        """Write a resumable checkpoint, `path`/model being the exported policy; all or nothing. Its weights' name."""
        versions: list[WeightVersion] = await self._all("save", Path(path))
        return versions[0]

    async def load(self, path: Path | str) -> StepMetrics:
        """Go on from a checkpoint, in this spec's incarnation. Raises CheckpointError: not whole, or of other ranks."""
        metrics: list[StepMetrics] = await self._all("load", Path(path))
        return metrics[0]

    async def export(self, path: Path | str) -> None:
        """Write the policy as a complete checkpoint of its family."""
        await self._all("export", Path(path))

    async def stop(self) -> None:
        """End the ranks; safe to call at any time and twice."""
        actors, self._actors = self._actors, []
        for actor in actors:
            ray.kill(actor, no_restart=True)

    # ---- fan-out -------------------------------------------------------------------------------------------------

    async def _all(self, phase: str, *arguments: object, deadline_s: float | None = None) -> list[Any]:
        self._require_alive()
        refs = [getattr(actor, phase).remote(*arguments) for actor in self._actors]
        return await self._gather(phase, refs, deadline_s=deadline_s)

    async def _gather(self, phase: str, refs: Sequence[Any], *, deadline_s: float | None = None) -> list[Any]:
        deadline_s = self._spec.learner.step_deadline_s if deadline_s is None else deadline_s
        calls: list[asyncio.Future[Any]] = [asyncio.ensure_future(ref) for ref in refs]
        self._num_calls += 1
        try:
            done, late = await asyncio.wait(calls, timeout=deadline_s, return_when=asyncio.FIRST_EXCEPTION)
            if late and any(call.exception() for call in done):
                # One rank's end is another's broken connection: see both before saying which was first.
                done, late = await asyncio.wait(calls, timeout=GRACE_S)
            errors = {rank: error for rank, call in enumerate(calls) if call in done and (error := call.exception())}
            if not errors and not late:
                return [call.result() for call in calls]
        finally:
            self._num_calls -= 1
            for call in calls:
                call.cancel()
        if errors:
            raise self._failure(phase, errors)
        self._failed = (
            f"learner {_names([rank for rank, call in enumerate(calls) if call in late])} did not finish {phase} "
            f"within {deadline_s:g} s"
        )
        raise LearnerError(f"{self._failed}: raise the deadline under learner, or look at that rank's log")

    def _failure(self, phase: str, errors: Mapping[int, BaseException]) -> RlaudioError:
        """What to raise for these ranks' errors. All but those of data and numbers end the group."""
        dead = [rank for rank, error in errors.items() if isinstance(error, RayActorError)]
        if dead:
            self._failed = f"learner {_names(dead)} died in {phase}"
            failure = LearnerError(
                f"{self._failed} ({_reason(errors[dead[0]])}): resume the run from its last checkpoint"
            )
            failure.__cause__ = errors[dead[0]]
            return failure
        causes = {rank: error.cause for rank, error in errors.items() if isinstance(error, RayTaskError)}
        for cause in causes.values():
            if isinstance(cause, RlaudioError):
                return cause
        rank, error = next(iter(errors.items()))
        cause = causes.get(rank)
        self._failed = f"learner {_names(list(errors))} failed in {phase}: " + (
            _reason(error) if cause is None else f"{type(cause).__name__}: {cause}"
        )
        failure = LearnerError(self._failed)
        failure.__cause__ = error
        return failure

    def _require_alive(self) -> None:
        if self._failed is not None:
            raise LearnerError(f"the learner group is broken ({self._failed}): stop it and resume from a checkpoint")
        if not self._actors:
            raise LearnerError("the learner group has no ranks: call start first (or it was stopped)")


_HandedOut: TypeAlias = "tuple[tuple[StepMetrics, ShareHeader], Manifest, Share | None, Delta | None]"


class _RankActor:
    """A `RankWorker` in a Ray actor; unpacks arguments, nothing else."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store: Store | None = None
        self._live: RankWorker | None = None
        self._sender = WeightSender(rank)

    def open_store(self) -> tuple[str, int] | None:
        """Rank 0 opens the rendezvous on a port the system picks, and keeps it: nobody can take the port in between."""
        import torch.distributed as dist

        # All ranks import at once, before any of them waits for another in the rendezvous.
        import rlaudio.learner.rank  # noqa: F401
        from rlaudio.learner.optimization import prepare_deepspeed

        prepare_deepspeed()
        if self._rank > 0:
            return None
        if self._world_size == 1:
            self._store = dist.HashStore()  # type: ignore[attr-defined]
            return None
        host = ray.util.get_node_ip_address()
        store = dist.TCPStore(host, 0, self._world_size, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._store = store
        return host, store.port

    def build(self, spec: TrainerSpec, address: tuple[str, int] | None) -> None:
        import torch.distributed as dist

        from rlaudio.learner.optimization import join_ranks
        from rlaudio.learner.rank import RankWorker

        if self._store is None:
            assert address is not None
            self._store = dist.TCPStore(address[0], address[1], self._world_size, is_master=False)  # type: ignore[attr-defined]
        join_ranks(
            rank=self._rank,
            world_size=self._world_size,
            store=self._store,
            on_gpu=spec.learner.num_gpus > 0,
            timeout_s=max(spec.learner.start_deadline_s, spec.learner.step_deadline_s),
        )
        self._live = RankWorker(spec)

    def prepare(self, algorithm: AlgorithmSettings, states: Sequence[Any], *batches: pa.RecordBatch) -> PreparedBatch:
        deadline_s = self._worker.trainer.spec.learner.step_deadline_s
        sources = [None if ref is None else partial(_fetch, ref, deadline_s=deadline_s) for ref in states]
        return self._worker.prepare(batches, algorithm, states=sources)

    def forward_backward(self, part: MinibatchSpec) -> None:
        self._worker.forward_backward(part)

    def optimizer_step(self) -> _HandedOut:
        metrics, _ = self._worker.optimizer_step(snapshot=False)
        return self._hand_out(metrics, store=self._worker.trainer.spec.sync.transport != "collective")

    def snapshot(self) -> _HandedOut:
        """In the object store whatever the transport, for the doctor; and ready to be sent, for engines that start."""
        return self._hand_out(self._worker.trainer.metrics({}), store=True)

    def _hand_out(self, metrics: StepMetrics, *, store: bool) -> _HandedOut:
        handed = self._worker.hand_out()
        if self._worker.trainer.spec.sync.transport == "collective":
            self._sender.keep(handed.share, handed.delta)
        values = (handed.share, handed.delta) if store else (None, None)
        return (metrics, handed.header), handed.share.manifest, *values

    def weights(self, step: SenderStep) -> Any:
        """A step of a collective broadcast, in a thread of its own."""
        return step.run(self._sender)

    def supervised_step(self, phase: PhaseSettings, *batches: pa.RecordBatch) -> StepMetrics:
        return self._worker.supervised_step(batches, phase)

    def probe(self, probe: RankProbe, *batches: pa.RecordBatch) -> Any:
        return self._worker.probe(probe, *batches)

    def save(self, path: Path) -> WeightVersion:
        self._worker.save(path)
        return self._worker.trainer.version

    def load(self, path: Path) -> StepMetrics:
        return self._worker.load(path)

    def export(self, path: Path) -> None:
        self._worker.export(path)

    @property
    def _worker(self) -> RankWorker:
        if self._live is None:
            raise LearnerError(f"rank {self._rank} was not built: call start first")
        return self._live


def _fetch(ref: Any, *, deadline_s: float) -> pa.RecordBatch:
    """One states batch out of Ray's object store, inside a rank."""
    try:
        return cast("pa.RecordBatch", ray.get(ref, timeout=deadline_s))
    except GetTimeoutError as error:
        raise LearnerError(
            f"encoder states did not come from the object store within {deadline_s:g} s: look at the rollout actors' "
            "nodes, or raise learner.step_deadline_s"
        ) from error


def _environment(spec: TrainerSpec, env_vars: Mapping[str, str]) -> dict[str, str]:
    """Threads by reservation: ranks that spin on each other's cores are many times slower."""
    threads = str(max(1, int(spec.learner.num_cpus)))
    on_cpu = {} if spec.learner.num_gpus else {"DS_ACCELERATOR": "cpu"}
    return {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **on_cpu, **env_vars}


def _names(ranks: Sequence[int]) -> str:
    return "rank " + ", ".join(str(rank) for rank in ranks) if ranks else "a rank"


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
