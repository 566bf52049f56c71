"""Bytes on one device for each role, as formulas. Sizes in bytes, GB is 10^9 of them.

Symbols in the docstrings: b bytes per value (bfloat16 2, float32 4), P all parameters, Pt the trained ones, n ranks,
h hidden width, f feed-forward width, L layers, V vocabulary, T devices of one engine, C padded cells of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlaudio.doctor.static.sizes import ModelSize, Shape

GB = 10**9
BYTES_PER_VALUE = {"float32": 4, "bfloat16": 2}

STEP_TOKENS = 8192
"""`EngineSettings.max_step_tokens`: ids that pass through the engine in one step."""

LOGIT_CHUNK = 4096
"""`rlaudio.learner.batch.LOGIT_CHUNK`: tokens the learner projects at once."""

DEVICE_RESERVE = 2 * GB
"""CUDA context, NCCL buffers and what the allocator cannot use for holes. An assumption, not a measurement."""

GRAPHS = 2 * GB
"""CUDA graphs and NCCL buffers inside the engine's share. An assumption, not a measurement."""

SUB_GROUP = 1_000_000_000
"""DeepSpeed 0.19's default: parameters whose optimizer states are stepped at once at stage 3."""


@dataclass(frozen=True, slots=True)
class Use:
    """Memory of one device: parts that stay, and phases that come on top of them one at a time.

    Attributes:
        stays: part -> bytes, there throughout.
        phases: phase -> part -> bytes.
        start: bytes while the model is loaded, before most of what stays is there.
    """

    stays: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    start: int = 0

    @property
    def phase(self) -> str:
        """Name of the phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def running(self) -> Mapping[str, int]:
        """What stays, and the parts of the largest phase."""
        return {**self.stays, **self.phases[self.phase]}

    @property
    def peak(self) -> int:
        return max(sum(self.running.values()), self.start)

    def explain(self) -> str:
        """What the peak is made of, in words."""
        if self.start >= sum(self.running.values()):
            return f"{self.peak / GB:.1f} GB while the whole model is loaded"
        part, num_bytes = max(self.running.items(), key=lambda item: item[1])
        return f"{self.peak / GB:.1f} GB in {self.phase}, {num_bytes / GB:.1f} of them {part}"


def gb(num_bytes: int) -> float:
    """GB for a table of three digits: whole ones from 100 on."""
    return num_bytes / GB if num_bytes < 100 * GB else round(num_bytes / GB)


# ---- engines ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """One engine of the rollout or reward actors.

    Attributes:
        bytes_per_value: of weights and KV cache.
        tensor_parallel: devices the decoder is spread over.
        utilization: share of a device that vLLM may take.
        max_model_len: most ids of one prompt and its response.
        max_num_seqs: most requests in one step.
        swaps: weights are replaced while it runs (rollout), so an incoming tensor lies beside the old ones.
        encodes: the actor keeps a copy of the encoder of its own, to encode every clip once.
    """

    bytes_per_value: int
    tensor_parallel: int
    utilization: float
    max_model_len: int
    max_num_seqs: int
    swaps: bool
    encodes: bool


@dataclass(frozen=True, slots=True)
class EngineUse:
    """Memory of one device of an engine.

    Attributes:
        weights: this device's part of them.
        working: activations of one step, sampling, CUDA graphs.
        beside: what lies outside vLLM's share: the encoder of encode-once, and tensors arriving in a weight swap.
        share: what vLLM may take.
        rest: what the device has outside that share.
        bytes_per_id: KV cache of one id on this device.
        kv: what is left of the share for the KV cache; below 0 when the weights alone do not fit.
        ids: how many ids the KV cache holds.
    """

    weights: int
    working: int
    beside: int
    share: int
    rest: int
    bytes_per_id: int

    @property
    def kv(self) -> int:
        return self.share - self.weights - self.working

    @property
    def ids(self) -> int:
        return max(0, self.kv // self.bytes_per_id)


def engine_weights(size: ModelSize, *, bytes_per_value: int, tensor_parallel: int) -> int:
    """b * ((decoder + 2 V h) / T + encoder + adaptor).

    Encoder and adaptor are whole on every device. A tied head counts all the same: our plugin unties it in the engine.
    """
    counts = size.counts
    spread = counts.decoder + 2 * counts.embedding
    return bytes_per_value * (-(-spread // tensor_parallel) + counts.encoder + counts.adaptor)


def kv_bytes_per_id(shape: Shape, *, bytes_per_value: int, tensor_parallel: int) -> int:
    """2 (key and value) * L * heads * head width * b; every device has at least one of the KV heads."""
    heads = max(1, shape.num_kv_heads // tensor_parallel)
    return 2 * shape.num_layers * heads * shape.head_width * bytes_per_value


def engine_use(size: ModelSize, plan: EnginePlan, *, device_bytes: int) -> EngineUse:
    """Memory of each of the engine's devices.

    share   = utilization * device
    weights = see `engine_weights`
    working = step ids * b * (4 h + 3 f / T)      hidden states, residual, queries; gate, up and their product
            + requests * V * 4 bytes * 3          logits, log-probabilities, one copy for the bans
            + 2 GB                                CUDA graphs, NCCL
    KV      = share - weights - working, at `kv_bytes_per_id` an id
    beside  = b * encoder (encode once) + 2 * b * V h (the largest tensor arrives whole and is buffered by vLLM's
              layerwise reload), in what the share leaves of the device
    """
    shape, value = size.shape, plan.bytes_per_value
    step_ids = max(STEP_TOKENS, plan.max_model_len)
    activations = step_ids * value * (4 * shape.hidden + -(-3 * shape.intermediate // plan.tensor_parallel))
    sampling = plan.max_num_seqs * shape.vocabulary * 4 * 3
    share = int(plan.utilization * device_bytes)
    return EngineUse(
        weights=engine_weights(size, bytes_per_value=value, tensor_parallel=plan.tensor_parallel),
        working=activations + sampling + GRAPHS,
        beside=value * (plan.encodes * size.counts.encoder + plan.swaps * 2 * size.counts.embedding),
        share=share,
        rest=device_bytes - share,
        bytes_per_id=kv_bytes_per_id(shape, bytes_per_value=value, tensor_parallel=plan.tensor_parallel),
    )


# ---- learner ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerPlan:
    """One rank of the learner.

    Attributes:
        ranks: that train together.
        zero_stage: 0 to 3.
        bytes_per_value: of parameters; gradients are added up in float32 whatever it is.
        train_encoder: the encoder has gradients and optimizer states too.
        reference: where the frozen start of the KL term lies: "" (there is none), "whole", "sharded" or "offload".
        offload_optimizer: optimizer states and their float32 gradient lie in main memory.
        offload_parameters: the share of the weights lies in main memory (stage 3).
        micro_batch_tokens: padded cells per forward.
        longest_row: ids of the longest row; such a row goes alone, whatever the budget.
        gradient_checkpointing: layers are computed again in the backward pass.
    """

    ranks: int
    zero_stage: int
    bytes_per_value: int
    train_encoder: bool
    reference: str
    micro_batch_tokens: int
    longest_row: int
    gradient_checkpointing: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @property
    def rounds(self) -> bool:
        """Whether a micro-batch's gradient is of less than float32, in which they are added up."""
        return self.bytes_per_value < 4

    @property
    def cells(self) -> int:
        """Padded cells that go through the model at once."""
        return max(self.micro_batch_tokens, self.longest_row)


def model_states(size: ModelSize, plan: LearnerPlan) -> dict[str, int]:
    """Parameters, gradients, and the optimizer's float32 states on one rank.

    | stage | weights | gradients | master + Adam |
    |---|---|---|---|
    | 0 (float32 only) | b P | 4 Pt | 8 Pt (no master: the weights are float32) |
    | 1 | b P | 4 Pt | 12 Pt / n |
    | 2 | b P | 4 Pt / n | 12 Pt / n |
    | 3 | b (Pt / n + frozen) | 4 Pt / n | 12 Pt / n |

    A frozen encoder is whole on every rank at stage 3 too: a rank may encode at any time, without the others.

    So bfloat16 with nothing divided is 18 bytes per parameter: 2 + 4 + 4 (master) + 8 (Adam). It would be 16 if
    gradients were added up in bfloat16 (arXiv:1910.02054).

    What is offloaded lies in main memory instead, see `offloaded_states`: the optimizer, with it the divided gradients
    of stages 2 (in float32 only) and 3, and at stage 3 the shares of the weights.
    """
    stage, value = plan.zero_stage, plan.bytes_per_value
    everything, trained = size.counts.total, size.counts.trained(train_encoder=plan.train_encoder)
    part = _part(trained, plan.ranks)
    shares = 0 if plan.offload_parameters else part
    gradients = trained if stage < 2 else part
    if plan.offload_optimizer and (stage == 3 or (stage == 2 and not plan.rounds)):
        gradients = 0
    return {
        "weights": value * (shares + everything - trained if stage >= 3 else everything),
        "gradients": 4 * gradients,
        "optimizer": 0 if plan.offload_optimizer else 8 * trained if stage == 0 else 12 * part,
    }


def offloaded_states(size: ModelSize, plan: LearnerPlan) -> dict[str, int]:
    """What a rank keeps in main memory beside its device.

    | | bytes |
    |---|---|
    | optimizer | (16 + b) Pt / n: master, Adam, float32 gradient; weights (1, 2) on their way. 20 Pt / n (3): the sum |
    | gradients, stages 1 and 2, float32 | 4 Pt / n: the sum over micro-batches; that of bfloat16 stays on the device |
    | weights | b Pt / n |
    | reference "offload" | b Pt / n |
    """
    stage, value = plan.zero_stage, plan.bytes_per_value
    trained = size.counts.trained(train_encoder=plan.train_encoder)
    part = _part(trained, plan.ranks)
    return {
        "optimizer": (16 + (4 if stage == 3 else value)) * part if plan.offload_optimizer else 0,
        "gradients": 4 * part if plan.offload_optimizer and stage < 3 and not plan.rounds else 0,
        "weights": value * part if plan.offload_parameters else 0,
        "reference": value * part if plan.reference == "offload" else 0,
    }


def layer_bytes_per_cell(shape: Shape, *, bytes_per_value: int) -> int:
    """What autograd keeps of one decoder layer for one padded cell.

    (6 b + 8) h + 2 b kv + 4 b f + 4 heads + 8: two norms that compute in float32, projections, flash attention with its
    log-sum-exp, and gate, up, activation and product of the feed-forward. Equal to what saved-tensor hooks count in
    transformers 5.19's Qwen2; a test compares them.
    """
    value, keys = bytes_per_value, shape.num_kv_heads * shape.head_width
    norms = (6 * value + 8) * shape.hidden
    return norms + 2 * value * keys + 4 * value * shape.intermediate + 4 * shape.num_heads + 8


def activations(shape: Shape, plan: LearnerPlan) -> int:
    """C * (L * layer + 3 b h); with gradient checkpointing C * (L b h + layer + 3 b h): inputs and one layer."""
    layer = layer_bytes_per_cell(shape, bytes_per_value=plan.bytes_per_value)
    ends = 3 * plan.bytes_per_value * shape.hidden
    if plan.gradient_checkpointing:
        return plan.cells * (shape.num_layers * plan.bytes_per_value * shape.hidden + layer + ends)
    return plan.cells * (shape.num_layers * layer + ends)


def bucket_values(shape: Shape) -> int:
    """4 h^2: values that the learner reduces, and at stage 3 fetches ahead, in one message."""
    return 4 * shape.hidden**2


def learner_use(size: ModelSize, plan: LearnerPlan) -> Use:
    """Memory of each rank's device.

    stays            `model_states`, and the reference: b (P - encoder), over n when it is sharded, none when offloaded
    forward_backward `activations`
                     + 4 float32 tensors of [min(4096, C), V]: logits, log_softmax, exp and product (entropy)
                     + stage 1 to 3: b * 4 h^2 in the reduction bucket, and as many in float32
                     + stage 2 in bfloat16: b Pt / n, the rank's own part of a micro-batch's gradient
                     + stage 3: b * (embedding + head + adaptor), gathered for the whole step, as much again for their
                       gradients, b * (one layer + 4 h^2) for the layers as they come
    step             stage 0: 4 Pt Adam's temporaries; 1, 2: 8 Pt / n with the rank's part of the gradient (4 Pt / n at
                     stage 2 in bfloat16, where the part is all there is); 3: 8 * min(Pt / n, 1e9)
                     nothing where the optimizer is offloaded
    start            see `loading_bytes`

    What a divided reference gathers in `prepare` is less than a forward_backward, which does not run then.
    """
    stage, value, counts = plan.zero_stage, plan.bytes_per_value, size.counts
    trained = counts.trained(train_encoder=plan.train_encoder)
    part = _part(trained, plan.ranks)
    bucket = min(trained, bucket_values(size.shape))
    ends = counts.embedding + counts.head + counts.adaptor
    passing = {
        "activations": activations(size.shape, plan),
        "logits": 4 * min(LOGIT_CHUNK, plan.cells) * size.shape.vocabulary * 4,
        "bucket": (value + 4 * plan.rounds) * bucket if stage else 0,
        "own": value * part if stage == 2 and plan.rounds else 0,
        "gathered": value * (2 * ends + counts.decoder // size.shape.num_layers + bucket) if stage == 3 else 0,
    }
    step = {0: 4 * trained, 1: 8 * part, 2: (4 if plan.rounds else 8) * part, 3: 8 * min(part, SUB_GROUP)}[stage]
    reference = {"whole": value * trained, "sharded": value * part}.get(plan.reference, 0)
    return Use(
        stays={**model_states(size, plan), "reference": reference},
        phases={"forward_backward": passing, "step": {"step": 0 if plan.offload_optimizer else step}},
        start=loading_bytes(size, plan),
    )


def loading_bytes(size: ModelSize, plan: LearnerPlan) -> int:
    """What one rank holds at most while it reads the module.

    b P, whole; at stage 3 it is divided as it is read: b (encoder + Pt / n + the largest tensor).
    """
    counts, value = size.counts, plan.bytes_per_value
    if plan.zero_stage < 3:
        return value * counts.total
    trained = counts.trained(train_encoder=plan.train_encoder)
    return value * (counts.total - trained + _part(trained, plan.ranks) + counts.embedding)


def longest_row(size: ModelSize, plan: LearnerPlan, *, room: int) -> int:
    """Most ids of one row with which a rank's peak stays within `room`; 0 when none does. A row is never divided."""

    def fits(ids: int) -> bool:
        return learner_use(size, replace(plan, micro_batch_tokens=1, longest_row=ids)).peak <= room

    low, high = 0, 1 << 24
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def snapshot_bytes(size: ModelSize, *, bytes_per_value: int, train_encoder: bool) -> int:
    """b Pt: what the learner hands out after a step and every engine's node pulls."""
    return bytes_per_value * size.counts.trained(train_encoder=train_encoder)


def _part(num_values: int, ranks: int) -> int:
    return -(-num_values // ranks)
