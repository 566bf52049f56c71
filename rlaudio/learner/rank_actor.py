"""A learner rank as Ray calls it. `group.LearnerGroup` makes one per rank, and moves them together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError

from rlaudio.config import AlgorithmSettings, PhaseSettings
from rlaudio.errors import LearnerError
from rlaudio.learner.messages import MinibatchSpec, PreparedBatch, ShareHeader, StepMetrics, TrainerSpec
from rlaudio.types import WeightVersion
from rlaudio.weights.membership import SenderStep, WeightSender

if TYPE_CHECKING:
    import pyarrow as pa
    from torch._C._distributed_c10d import Store  # torch.distributed does not type what it re-exports

    from rlaudio.experience.states import ShippedStates
    from rlaudio.learner.rank import RankProbe, RankWorker
    from rlaudio.weights.delta import Delta
    from rlaudio.weights.shares import Manifest, Share

_LOG = logging.getLogger("rlaudio.learner")

_HandedOut: TypeAlias = "tuple[tuple[StepMetrics, ShareHeader], Manifest, Share | None, Delta | None]"


class RankActor:
    """A `RankWorker` in a Ray actor; unpacks arguments, nothing else."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._store: Store | None = None
        self._live: RankWorker | None = None
        self._sender = WeightSender(rank)

    def ping(self) -> None:
        """Answers when nothing else is being done."""

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

    def prepare(
        self, algorithm: AlgorithmSettings, states: Sequence[ShippedStates], *batches: pa.RecordBatch
    ) -> PreparedBatch:
        deadline_s = self._worker.trainer.spec.learner.step_deadline_s
        sources = [(shipped.names, partial(_fetch, shipped, deadline_s=deadline_s)) for shipped in states]
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


def _fetch(shipped: ShippedStates, *, deadline_s: float) -> pa.RecordBatch | None:
    """One states batch out of Ray's object store, inside a rank. None: it is lost with the node that held it."""
    try:
        return cast("pa.RecordBatch", ray.get(shipped.ref, timeout=deadline_s))
    except ObjectLostError as error:
        _LOG.warning("encoder states of %d clips are lost, they are encoded here: %s", len(shipped.names), error)
        return None
    except GetTimeoutError as error:
        raise LearnerError(
            f"encoder states did not come from the object store within {deadline_s:g} s: look at the rollout actors' "
            "nodes, or raise learner.step_deadline_s"
        ) from error
