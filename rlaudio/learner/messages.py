"""What driver and ranks tell each other. Small and frozen; experience and weights travel beside them by reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlaudio.config import LearnerSettings, ModelSettings, SyncSettings
from rlaudio.types import WeightVersion

if TYPE_CHECKING:
    import ray

    from rlaudio.weights.delta import Delta
    from rlaudio.weights.shares import Manifest, Share


DEALT_ANEW = "universal-"
"""Before a checkpoint's name, a folder beside it, while it is read by another number of ranks than wrote it."""


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """Everything a rank needs to build its policy and optimizer.

    Attributes:
        model: which checkpoint, family and dtype; also the frozen reference of the KL term.
        clips_root: root of the clip store; empty when no row will carry a clip.
        learner: optimizer, batching and deadlines.
        version: weights the checkpoint counts as; the first optimizer step makes `number + 1`.
        temperature: of sampling: recorded log-probabilities are those of logits divided by it.
        seed: of pseudo-audio timing and of torch.
        cache_mb: encoder states kept per rank, beside those of the batch at hand. 0 keeps none at all: every forward
            encodes its own clips (for measurements).
        sync: how weights are handed out.
    """

    model: ModelSettings
    clips_root: str
    learner: LearnerSettings
    version: WeightVersion = field(default_factory=lambda: WeightVersion(0, 0))
    temperature: float = 1.0
    seed: int = 0
    cache_mb: int = 512
    sync: SyncSettings = field(default_factory=SyncSettings)


@dataclass(frozen=True, slots=True)
class MinibatchSpec:
    """One optimizer step's rows: `index` into the partition that `prepare` made, seen for the `epoch`-th time."""

    epoch: int
    index: int


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """What `prepare` says of the experience it took in. Counts are over all ranks.

    Attributes:
        num_rows, num_dialogues, num_groups: what arrived.
        num_tokens: response tokens, each trained `epochs` times.
        num_cells: padded cells that go through the model once: `num_tokens` and prompts over this is the packing.
        num_minibatches: optimizer steps per epoch (fewer than asked for when there are fewer groups).
        epochs: how often each minibatch is stepped on.
        advantage_std: over rows, unitless.
        prepare_s: wall seconds on the slowest rank, encoder and reference included.
        encoder_forwards: clips that ranks had to encode by themselves; 0 when all states came with the experience.
        states_bytes: encoder states that ranks fetched; a clip that a rank has seen before is not fetched again.
    """

    num_rows: int
    num_dialogues: int
    num_groups: int
    num_tokens: int
    num_cells: int
    num_minibatches: int
    epochs: int
    advantage_std: float
    prepare_s: float
    encoder_forwards: int = 0
    states_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Result of one optimizer step, equal on every rank.

    Attributes:
        version: the weights after it.
        values: means over the step's tokens ("loss", "clip_fraction", "ratio_mean", "kl", "kl_behaviour", "entropy",
            "importance_mean", "importance_capped", "masked", with a critic "value_loss", "value_mean", "return_mean"),
            or of the supervised losses ("loss", "lm_loss", "ctc_loss", "accuracy"), "ratio_max", "grad_norm" before
            clipping, "lr", "num_tokens", "num_micro_batches" (per rank), "step_s", "encoder_forwards" (clips that
            ranks encoded since `prepare`, over all ranks).
    """

    version: WeightVersion
    values: dict[str, float]


@dataclass(frozen=True, slots=True)
class ShareHeader:
    """What the driver learns of one rank's share.

    Attributes:
        num_bytes: of its values.
        made_s: wall seconds of copying, checksums and comparing with the last version.
        base: version that the difference starts from; None: there is none, because it was not asked for (`sync.delta`),
            there was no earlier version, or it would not be smaller.
        num_changed: elements in the difference.
    """

    rank: int
    num_bytes: int
    made_s: float
    base: WeightVersion | None = None
    num_changed: int = 0


@dataclass(frozen=True, slots=True)
class PublishedShare:
    """One rank's weights, still where they were made: a method's return values, so they outlive the actor.

    Attributes:
        manifest: what the share holds, without the values.
        ref: the share; None inside when the rank sends it itself (`sync.transport: collective`).
        delta: the difference from `header.base`; None inside as in `ref`, or when there is none.
    """

    header: ShareHeader
    manifest: ray.ObjectRef[Manifest]
    ref: ray.ObjectRef[Share | None]
    delta: ray.ObjectRef[Delta | None]


@dataclass(frozen=True, slots=True)
class PublishedSnapshot:
    """Weights after a step: every rank's share of them, by rank."""

    version: WeightVersion
    shares: tuple[PublishedShare, ...]
    metrics: StepMetrics
