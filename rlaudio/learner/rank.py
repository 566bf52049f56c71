"""One rank of the learner: its share of every batch, turned into gradients. Plain Python: no Ray in here.

All ranks get the same batches and compute the same plan; every method is called on every rank. Losses are already
normalised over the global batch, so gradients are plain sums over micro-batches and ranks, whatever the packing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from rlaudio.config import AlgorithmSettings, PhaseSettings
from rlaudio.errors import LearnerError
from rlaudio.experience.packing import PackedMicroBatch
from rlaudio.experience.states import read_states
from rlaudio.learner.batch import MicroBatch, Row, RowTerms, collate, read_rows
from rlaudio.learner.experience_plan import plan_experience
from rlaudio.learner.loss import MEANS, supervised_loss
from rlaudio.learner.messages import MinibatchSpec, PreparedBatch, StepMetrics, TrainerSpec
from rlaudio.learner.module import ForwardRequest
from rlaudio.learner.policy_training import PolicyTraining
from rlaudio.learner.publishing import HandedOut, Publisher
from rlaudio.learner.supervised import SupervisedStep, plan_supervised, pseudo_spans
from rlaudio.learner.trainer import Trainer
from rlaudio.weights.snapshot import Snapshot

if TYPE_CHECKING:
    import pyarrow as pa

    from rlaudio.learner.sounds import ClipSource


StatesSource = tuple[Sequence[str], Callable[[], "pa.RecordBatch | None"]]
"""A batch of encoder states: sha256 of its clips, and what fetches it, when and if it is needed; None if it is lost."""


class RankProbe(Protocol):
    """Something to find out inside a rank (`rlaudio.doctor`)."""

    def run(self, worker: RankWorker, *batches: pa.RecordBatch) -> Any: ...


class RankWorker:
    """A rank after `optimization.join_ranks`.

    Args:
        spec: model, optimizer, seed.
        clips: where sounds come from; default the clip store at `spec.clips_root`.
    """

    def __init__(self, spec: TrainerSpec, *, clips: ClipSource | None = None) -> None:
        self.trainer = Trainer(spec, clips=clips)
        self._policy = PolicyTraining(self.trainer)
        self._publisher = Publisher(
            rank=self.trainer.rank,
            world_size=self.trainer.world_size,
            wire_dtype=spec.model.dtype,
            delta=spec.sync.delta,
        )
        self._steps: list[list[MicroBatch]] = []
        self._pending: dict[str, float] | None = None

    # ---- reinforcement learning ----------------------------------------------------------------------------------

    def prepare(
        self,
        batches: Sequence[pa.RecordBatch],
        algorithm: AlgorithmSettings,
        *,
        states: Sequence[StatesSource] = (),
    ) -> PreparedBatch:
        """Take in experience of whole groups: encoder states, reference and values of this rank's share; advantages.

        Args:
            batches: rows of whole groups.
            algorithm: of the steps to come.
            states: where the clips' encoder states can be had; asked only when this rank lacks one. Clips without any
                are read from the store and encoded here.

        Raises:
            DataError: a row cannot be trained on, or states are damaged.
            LearnerError: states are of another encoder or dtype than the trainer's.
            AudioError: a clip is missing or damaged.
        """
        started = time.perf_counter()
        trainer = self.trainer
        trainer.ensure_engine(None)
        rows = read_rows(batches)
        planned = plan_experience(
            rows,
            algorithm=algorithm,
            num_ranks=trainer.world_size,
            micro_batch_tokens=trainer.spec.learner.micro_batch_tokens,
        )
        mine = [step[trainer.rank] for step in planned.steps]
        needed = {row for step in mine for packed in step for row in packed.rows}
        heard = [clip.sha256 for row in needed for clip in rows[row].clips]
        trainer.begin_batch(heard)
        states_bytes = self._take_states(trainer.lacking(heard), states)
        trainer.ensure_states()
        collated = [[self._collate(rows, planned.terms, packed) for packed in step] for step in mine]
        self._steps, advantages = self._policy.prepare(rows, mine=mine, batches=collated, settings=algorithm)
        if advantages is None:
            advantages = np.array([term.advantage for term in planned.terms])
        return PreparedBatch(
            num_rows=len(rows),
            num_dialogues=len({row.dialogue for row in rows}),
            num_groups=len({row.group for row in rows}),
            num_tokens=sum(len(row.response_ids) for row in rows),
            num_cells=planned.num_cells(rows),
            num_minibatches=len(planned.steps),
            epochs=algorithm.epochs,
            advantage_std=float(np.std(advantages)),
            prepare_s=time.perf_counter() - started,
            encoder_forwards=trainer.encoder_forwards,
            states_bytes=states_bytes,
        )

    def forward_backward(self, part: MinibatchSpec) -> None:
        """Accumulate the gradient of one minibatch.

        Raises:
            LearnerError: nothing was prepared, or the minibatch is not in the partition.
            DivergenceError: the loss is not finite (raised on all ranks together); the gradient is forgotten.
        """
        started = time.perf_counter()
        if not 0 <= part.index < len(self._steps):
            raise LearnerError(f"minibatch {part.index} of {len(self._steps)} prepared ones: call prepare first")
        meter = _Meter(self.trainer.device)
        batches = self._steps[part.index]
        self._policy.begin_step()
        for index, batch in enumerate(batches):
            terms = self._policy.backward(batch, last=index == len(batches) - 1)
            meter.add(terms.sums)
            meter.add({"num_tokens": (batch.weights > 0).sum(), "weight": batch.weights.sum()})
            meter.raise_to(terms.maxima)
        meter.add({"encoder_forwards": torch.tensor(self.trainer.encoder_forwards)})
        self._finish(meter, num_micro_batches=len(batches), started=started)

    def optimizer_step(self, *, snapshot: bool = True) -> tuple[StepMetrics, Snapshot | None]:
        """Move the weights once and count the version up.

        Args:
            snapshot: make one; rank 0 returns it, the others None.

        Raises:
            LearnerError: no gradient was accumulated.
            DivergenceError: the gradient is not finite; weights and optimizer stay as they were.
        """
        started = time.perf_counter()
        if self._pending is None:
            raise LearnerError(f"no gradient since version {self.trainer.version}: call forward_backward first")
        values, self._pending = self._pending, None
        if "value_loss" in values:
            values |= self._policy.reduce_critic()
            self.trainer.check_finite(values["critic_grad_norm"], name="gradient norm of the critic")
        values |= self.trainer.step(lr=self.trainer.schedule().at(self.trainer.step_index))
        if "value_loss" in values:
            self._policy.step_critic()
        taken = self.trainer.snapshot() if snapshot else None
        values["step_s"] += time.perf_counter() - started
        return self.trainer.metrics(values), taken

    # ---- supervised ----------------------------------------------------------------------------------------------

    def supervised_step(self, batches: Sequence[pa.RecordBatch], phase: PhaseSettings) -> StepMetrics:
        """One step on wanted turns; the first step of a phase starts a fresh optimizer and schedule.

        Raises:
            DataError: rows that cannot be trained on, or CTC alone without any clip that has words.
            DivergenceError: loss or gradient is not finite; the weights stay as they were.
        """
        started = time.perf_counter()
        trainer = self.trainer
        trainer.ensure_engine(phase)
        rows = read_rows(batches, repeats=True)
        planned = plan_supervised(
            rows,
            phase=phase,
            num_ranks=trainer.world_size,
            micro_batch_tokens=trainer.spec.learner.micro_batch_tokens,
        )
        meter = _Meter(trainer.device)
        mine = planned.ranks[trainer.rank]
        for index, packed in enumerate(mine):
            request = self._supervised_request(rows, planned, packed, phase=phase)
            logprobs, _, ctc = trainer.forward(request, last=index == len(mine) - 1)
            weights = logprobs.new_zeros(0) if request.batch is None else request.batch.weights
            lm_loss = supervised_loss(logprobs, weights=weights)
            loss = phase.lm_weight * lm_loss + phase.ctc_weight * ctc
            trainer.backward(loss)
            meter.add({"loss": loss.detach(), "lm_loss": lm_loss.detach(), "ctc_loss": ctc.detach()})
            meter.add({"num_tokens": (weights > 0).sum()})
        self._finish(meter, num_micro_batches=len(mine), started=started)
        metrics, _ = self.optimizer_step(snapshot=False)
        return replace(metrics, values=metrics.values | {"num_ctc_misfits": float(planned.num_misfits)})

    def _supervised_request(
        self, rows: Sequence[Row], planned: SupervisedStep, packed: PackedMicroBatch, *, phase: PhaseSettings
    ) -> ForwardRequest:
        trainer = self.trainer
        batch = self._collate(rows, planned.terms, packed) if phase.lm_weight > 0 else None
        if phase.pseudo_audio:
            seed = (trainer.spec.seed, trainer.version.number)
            spans = pseudo_spans(rows, packed, width=trainer.width, seed=seed, device=trainer.device)
            return ForwardRequest(batch=batch, pseudo=spans)
        ctc, names = planned.ctc(packed, blank=trainer.family.tokenizer.ids.pad, device=trainer.device)
        return trainer.request(batch, ctc=ctc, ctc_names=names)

    # ---- weights -------------------------------------------------------------------------------------------------

    def hand_out(self) -> HandedOut:
        """This rank's share of the current weights, for the engines. Calls no other rank."""
        return self._publisher.hand_out(self.trainer.trained, version=self.trainer.version)

    def snapshot(self) -> Snapshot | None:
        """Current weights whole, on rank 0: gathered, so for probes and tests, not for the engines."""
        return self.trainer.snapshot()

    def save(self, path: Path) -> None:
        """Write a resumable checkpoint folder; see `Trainer.save`. The critic lies beside the policy, not in it."""
        self.trainer.save(path, also=self._policy.writer())

    def load(self, path: Path) -> StepMetrics:
        """Go on from a checkpoint; returns its version. See `Trainer.load`."""
        self.trainer.load(path)
        self._policy.load(path)
        self._steps, self._pending = [], None
        return self.trainer.metrics({})

    def export(self, path: Path) -> None:
        """Write the policy as a complete checkpoint of its family."""
        self.trainer.export(path)

    def probe(self, probe: RankProbe, *batches: pa.RecordBatch) -> Any:
        """Run a probe here, on every rank at once."""
        return probe.run(self, *batches)

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _take_states(self, lacking: Sequence[str], sources: Sequence[StatesSource]) -> int:
        """Fetch the states batches that hold a clip this rank lacks. Returns the bytes fetched."""
        num_bytes, missing = 0, set(lacking)
        for names, fetch in sources:
            if missing.isdisjoint(names) or (batch := fetch()) is None:
                continue
            num_bytes += batch.nbytes
            self.trainer.take_states([clip for clip in read_states(batch) if clip.sha256 in missing])
            missing.difference_update(names)
        return num_bytes

    def _collate(self, rows: Sequence[Row], terms: Sequence[RowTerms], packed: PackedMicroBatch) -> MicroBatch:
        chosen = [replace(terms[row], weight=0.0) if packed.dummy else terms[row] for row in packed.rows]
        pad = self.trainer.family.tokenizer.ids.pad
        return collate([rows[row] for row in packed.rows], chosen, pad=pad, device=self.trainer.device)

    def _finish(self, meter: _Meter, *, num_micro_batches: int, started: float) -> None:
        values = meter.reduced()
        self._pending = None
        self.trainer.check_finite(values["loss"], name="loss")
        self.trainer.check_finite(values.get("value_loss", 0.0), name="loss of the critic")
        weight = values.pop("weight", 1.0)  # of all tokens: 1, unless sums are divided by a constant
        values |= {name: value / weight for name, value in values.items() if name in MEANS}
        values |= {"num_micro_batches": float(num_micro_batches), "step_s": time.perf_counter() - started}
        self._pending = values


class _Meter:
    """Adds up shares of a step's metrics, over micro-batches and then over ranks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}
        self._maxima: dict[str, torch.Tensor] = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            value = value.double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def raise_to(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            value = value.double()
            self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def reduced(self) -> dict[str, float]:
        """One collective per kind; the names must be the same on every rank, and are: all run the same code."""
        return self._reduce(self._sums, dist.ReduceOp.SUM) | self._reduce(self._maxima, dist.ReduceOp.MAX)

    def _reduce(self, values: dict[str, torch.Tensor], operation: dist.ReduceOp.RedOpType) -> dict[str, float]:
        if not values:
            return {}
        names: Iterable[str] = sorted(values)
        packed = torch.stack([values[name].to(self._device) for name in names])
        dist.all_reduce(packed, op=operation)
        return dict(zip(names, packed.tolist(), strict=True))
