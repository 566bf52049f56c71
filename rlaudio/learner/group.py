"""The learner as the driver sees it: N ranks in Ray actors that always move together.

Every call is sent to all ranks before anything is awaited, so no two collectives can interleave, and has a deadline.
The driver holds headers and references; experience and weights go from actor to actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from rlaudio.config import AlgorithmSettings, PhaseSettings
from rlaudio.errors import LearnerError, RanksLostError, RlaudioError, WeightSyncError
from rlaudio.learner.messages import (
    MinibatchSpec,
    PreparedBatch,
    PublishedShare,
    PublishedSnapshot,
    ShareHeader,
    StepMetrics,
    TrainerSpec,
)
from rlaudio.learner.rank_actor import RankActor
from rlaudio.types import WeightVersion
from rlaudio.weights.membership import SenderStep

if TYPE_CHECKING:
    import pyarrow as pa

    from rlaudio.experience.states import ShippedStates
    from rlaudio.learner.rank import RankProbe


GRACE_S = 2.0
"""How long the other ranks' errors are waited for once one rank has failed."""
LOOK_S = 10.0
"""How long a rank has to answer, or Ray to notice that it died, when it is asked whether it lives."""

SENDING, SENDING_THREADS = "sending", 8
"""Ray concurrency group of a rank's weight sender. A call that was given up holds its thread until its time-out."""

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""For glibc, on CPU: what a backward frees stays with the rank, else the next forward takes it page by page again."""


class LearnerGroup:
    """A handle to the ranks.

    Args:
        spec: what every rank builds.
        algorithm: of the policy steps; None when only supervised steps will be taken.
        env_vars: added to each rank's environment (for example PYTHONPATH).
        place: Ray's options that say where the next rank goes.
    """

    rank_actor: type[RankActor] = RankActor

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
        self._life = 0

    @property
    def is_busy(self) -> bool:
        """Whether the ranks have a batch, or anything else to do; sending their weights beside it does not count."""
        return self._num_calls > 0 or self._mid_step

    async def start(self) -> None:
        """Bring up the ranks and their models.

        Raises:
            RanksLostError: a rank did not come up before `learner.start_deadline_s` (too few free CPUs or GPUs?).
        """
        self._life += 1
        learner = self._spec.learner
        # Weights are sent beside training: from threads of their own, where the rank is asked to send them.
        groups = {SENDING: SENDING_THREADS} if self._spec.sync.transport == "collective" else None
        kind = self.rank_actor
        remote = ray.remote(concurrency_groups=groups)(kind) if groups else ray.remote(kind)
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

    async def restart(self, version: WeightVersion, *, least_ranks: int) -> None:
        """End what is left of the ranks and start anew from `model.path`, as `version`. `load` comes next.

        Where there is no room for all ranks any more, those that came up within `learner.start_deadline_s` say how many
        there are from now on.

        Raises:
            RanksLostError: fewer than `least_ranks` came up, or one broke.
        """
        await self.stop()
        self._spec = replace(self._spec, version=version)
        try:
            await self.start()
        except RanksLostError as error:
            num_came = self.num_ranks - len(error.silent)
            if num_came == self.num_ranks or num_came < max(1, least_ranks):
                raise
            await self.stop()
            self._spec = replace(self._spec, learner=replace(self._spec.learner, ranks=num_came))
            await self.start()

    async def find_lost(self) -> str:
        """Why the group is broken, and nothing if it is not. A rank that is busy counts as alive."""
        if self._failed is None and self._actors:
            calls: list[asyncio.Future[Any]] = [asyncio.ensure_future(actor.ping.remote()) for actor in self._actors]
            done, _ = await asyncio.wait(calls, timeout=LOOK_S)
            dead = [rank for rank, call in enumerate(calls) if call in done and call.exception() is not None]
            for call in calls:
                call.cancel()
            if dead:
                self._failed = f"learner {_names(dead)} died"
        return self._failed or ""

    async def prepare(
        self,
        refs: Sequence[ray.ObjectRef[pa.RecordBatch]],
        states: Sequence[Sequence[ShippedStates]] = (),
    ) -> PreparedBatch:
        """Hand every rank the experience of whole groups; each takes its share.

        Args:
            refs: rows, one batch per group.
            states: where encoder states of their clips are, per group; of several groups they may be the same. A rank
                fetches those that it needs and does not have.

        Raises:
            DataError, AudioError: a row cannot be trained on.
            RanksLostError: as of every method: a rank died, or missed `learner.step_deadline_s`.
        """
        if self._algorithm is None:
            raise LearnerError("this learner group was built without an algorithm: pass one to take policy steps")
        # In a list, references stay references: Ray would fetch an argument before the call.
        distinct = list(dict.fromkeys(shipped for group in states for shipped in group))
        prepared: list[PreparedBatch] = await self._all("prepare", self._algorithm, distinct, *refs)
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

    @property
    def life(self) -> int:
        """Another number for other ranks."""
        return self._life

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
        """Go on from a checkpoint, in this spec's incarnation. Raises CheckpointError: not whole, of another stage."""
        metrics: list[StepMetrics] = await self._all("load", Path(path))
        return metrics[0]

    async def export(self, path: Path | str) -> None:
        """Write the policy as a complete checkpoint of its family."""
        await self._all("export", Path(path))

    async def stop(self) -> None:
        """End the ranks; safe to call at any time and twice."""
        actors, self._actors = self._actors, []
        self._failed, self._mid_step = None, False
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
        silent = [rank for rank, call in enumerate(calls) if call in late]
        self._failed = f"learner {_names(silent)} did not finish {phase} within {deadline_s:g} s"
        raise RanksLostError(
            f"{self._failed}: raise the deadline under learner, or look at that rank's log", silent=silent
        )

    def _failure(self, phase: str, errors: Mapping[int, BaseException]) -> RlaudioError:
        """What to raise for these ranks' errors. All but those of data and numbers end the group."""
        dead = [rank for rank, error in errors.items() if isinstance(error, RayActorError)]
        if dead:
            self._failed = f"learner {_names(dead)} died in {phase}"
            failure = RanksLostError(
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
        broken: LearnerError = (RanksLostError if _may_pass(cause) else LearnerError)(self._failed)
        broken.__cause__ = error
        return broken

    def _require_alive(self) -> None:
        if self._failed is not None:
            raise RanksLostError(f"the learner group is broken ({self._failed}): stop it and resume from a checkpoint")
        if not self._actors:
            raise LearnerError("the learner group has no ranks: call start first (or it was stopped)")


def _environment(spec: TrainerSpec, env_vars: Mapping[str, str]) -> dict[str, str]:
    """Threads by reservation: ranks that spin on each other's cores are many times slower."""
    threads = str(max(1, int(spec.learner.num_cpus)))
    on_cpu = {} if spec.learner.num_gpus else {"DS_ACCELERATOR": "cpu", **KEPT_MEMORY}
    return {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **on_cpu, **env_vars}


def _may_pass(cause: BaseException | None) -> bool:
    """Whether other ranks may be spared: broken lines and devices are torch's RuntimeErrors, and a bug is none.

    Rows that were lost with their node come back with the checkpoint: from the spool, or played again.
    """
    passing = RuntimeError | OSError | ObjectLostError | None
    return isinstance(cause, passing) and "OutOfMemory" not in type(cause).__name__


def _names(ranks: Sequence[int]) -> str:
    return "rank " + ", ".join(str(rank) for rank in ranks) if ranks else "a rank"


def _reason(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
