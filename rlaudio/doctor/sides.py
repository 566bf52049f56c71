"""The two sides of a run as the doctor reaches them: Ray actors, or plain workers in this process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from rlaudio.actors.rollout import PlayOrder, RolloutProbe, RolloutWorker
from rlaudio.errors import EngineDeadError, EngineError, RlaudioError, WeightSyncError
from rlaudio.types import PromptRecord
from rlaudio.weights.receiver import Stage, Swap

if TYPE_CHECKING:
    import pyarrow as pa

    from rlaudio.actors.pool import RolloutPool
    from rlaudio.learner.group import LearnerGroup
    from rlaudio.learner.rank import RankProbe, RankWorker
    from rlaudio.weights.base import WeightTransport


class Sides(Protocol):
    """An engine and a trainer of one checkpoint, and the run's own way between them."""

    async def play(self, record: PromptRecord, order: PlayOrder) -> pa.RecordBatch:
        """One group, played by the run's player. Raises EngineError, RolloutError."""
        ...

    async def ask_engine(self, probe: RolloutProbe) -> Any:
        """A probe's answer from a rollout actor. Raises what the probe raises."""
        ...

    async def ask_trainer(self, probe: RankProbe, *batches: pa.RecordBatch) -> Any:
        """A probe's answer from rank 0; every rank runs it. Raises what the probe raises."""
        ...

    async def sync(self) -> None:
        """Bring the trainer's present weights to the engine, as after a step. Raises WeightSyncError."""
        ...

    async def ask_engine_about_weights(self, probe: RolloutProbe) -> Any:
        """A probe that is also given the trainer's present weights, as every rank's `Share`."""
        ...


class LocalSides:
    """Both workers in this process: for tests and notebooks.

    Args:
        rollout: started.
        rank: of a world of one.
        deadline_s: of a weight sync.
    """

    def __init__(self, rollout: RolloutWorker, rank: RankWorker, *, deadline_s: float = 60.0) -> None:
        self.rollout = rollout
        self.rank = rank
        self._deadline_s = deadline_s

    async def play(self, record: PromptRecord, order: PlayOrder) -> pa.RecordBatch:
        _, batch, *_ = await self.rollout.play(record, order)
        return batch

    async def ask_engine(self, probe: RolloutProbe) -> Any:
        return await self.rollout.probe(probe)

    async def ask_trainer(self, probe: RankProbe, *batches: pa.RecordBatch) -> Any:
        return self.rank.probe(probe, *batches)

    async def sync(self) -> None:
        share = self.rank.hand_out().share
        await self.rollout.sync(Stage((share,)))
        await self.rollout.sync(Swap(share.manifest.version, self._deadline_s))

    async def ask_engine_about_weights(self, probe: RolloutProbe) -> Any:
        return await self.rollout.probe(probe, self.rank.hand_out().share)


class RaySides:
    """The actors of a run. The first rollout actor is examined; weights go to all of them.

    Args:
        rollouts, learner, weights: started.
        deadline_s: of one probe.
    """

    def __init__(
        self, rollouts: RolloutPool, learner: LearnerGroup, weights: WeightTransport, *, deadline_s: float
    ) -> None:
        self._rollouts = rollouts
        self._learner = learner
        self._weights = weights
        self._deadline_s = deadline_s

    async def play(self, record: PromptRecord, order: PlayOrder) -> pa.RecordBatch:
        _, batch, *_ = await self._answer(self._actor.play.remote(record, order))
        return batch

    async def ask_engine(self, probe: RolloutProbe) -> Any:
        return await self._answer(self._actor.probe.remote(probe))

    async def ask_trainer(self, probe: RankProbe, *batches: pa.RecordBatch) -> Any:
        import ray

        return await self._learner.probe(probe, *(ray.put(batch) for batch in batches))

    async def sync(self) -> None:
        sent = await self._weights.broadcast(await self._learner.snapshot())
        if sent.evicted:
            name, error = next(iter(sent.evicted.items()))
            raise WeightSyncError(f"{name} was left out: {error}")

    async def ask_engine_about_weights(self, probe: RolloutProbe) -> Any:
        published = await self._learner.snapshot()
        return await self._answer(self._actor.probe.remote(probe, *(share.ref for share in published.shares)))

    @property
    def _actor(self) -> Any:
        handles = self._rollouts.pool.handles
        if not handles:
            raise EngineDeadError("no rollout actor is left: see why it was left out above, or Ray's logs")
        return next(iter(handles.values()))

    async def _answer(self, ref: Any) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await asyncio.wait_for(asyncio.wrap_future(ref.future()), self._deadline_s)
        except TimeoutError as error:
            ray.cancel(ref)
            raise EngineError(f"the rollout actor did not answer the doctor within {self._deadline_s:g} s") from error
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, RlaudioError) else EngineError(_last(error))) from error
        except RayActorError as error:
            raise EngineDeadError(f"the rollout actor died: {_last(error)}") from error


def _last(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


__all__ = ["LocalSides", "RaySides", "Sides"]
