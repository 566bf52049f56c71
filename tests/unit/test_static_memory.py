"""Memory formulas: they scale as they must, agree with autograd, and mirror the code they speak of."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2Model

from rlaudio.config import AlgorithmSettings
from rlaudio.doctor.static import budgets, memory
from rlaudio.doctor.static.memory import GB, EnginePlan, LearnerPlan, engine_use, engine_weights, learner_use
from rlaudio.doctor.static.sizes import Shape, model_size
from rlaudio.engines.settings import EngineSettings
from rlaudio.learner.batch import LOGIT_CHUNK
from rlaudio.learner.messages import TrainerSpec
from rlaudio.learner.optimization import DTYPES, _zero_settings
from rlaudio.models.step_audio.config import StepAudioConfig
from rlaudio.models.step_audio.modeling import StepAudioModule
from rlaudio.types import WeightVersion
from rlaudio.weights.snapshot import Snapshot
from tests.unit.test_static_sizes import R1, TINY

LARGE = model_size(R1)
PLAN = LearnerPlan(
    ranks=16,
    zero_stage=3,
    bytes_per_value=2,
    train_encoder=False,
    reference="",
    micro_batch_tokens=10240,
    longest_row=10240,
    gradient_checkpointing=True,
)
ENGINE = EnginePlan(
    bytes_per_value=2,
    tensor_parallel=2,
    utilization=0.9,
    max_model_len=10240,
    max_num_seqs=64,
    swaps=True,
    encodes=True,
)
STAGES = st.integers(0, 3)


# ---- well-known numbers -------------------------------------------------------------------------------------------


def test_bfloat16_adam_with_sums_in_float32_is_18_bytes_per_trained_parameter() -> None:
    states = memory.model_states(LARGE, replace(PLAN, ranks=1, zero_stage=1))
    frozen = LARGE.counts.encoder
    assert sum(states.values()) == 18 * (LARGE.counts.total - frozen) + 2 * frozen  # 2 weights, 4 gradients, 12
    assert states["optimizer"] == 12 * (LARGE.counts.total - frozen)


def test_float32_without_zero_has_no_second_copy_of_the_weights() -> None:
    states = memory.model_states(LARGE, replace(PLAN, ranks=1, zero_stage=0, bytes_per_value=4, train_encoder=True))
    assert sum(states.values()) == 16 * LARGE.counts.total  # 4 weights, 4 gradients, 8 Adam


def test_kv_cache_of_the_33b_is_a_quarter_mebibyte_per_id() -> None:
    assert memory.kv_bytes_per_id(LARGE.shape, bytes_per_value=2, tensor_parallel=1) == 1 << 18


def test_one_chunk_of_logits_is_the_2_6_gb_that_the_learner_speaks_of() -> None:
    passing = learner_use(LARGE, PLAN).phases["forward_backward"]
    assert passing["logits"] / 4 == pytest.approx(2.6 * GB, rel=0.01)


# ---- scaling ------------------------------------------------------------------------------------------------------


@given(devices=st.sampled_from([1, 2, 4]))
def test_doubling_tensor_parallelism_halves_what_is_spread_and_nothing_else(devices: int) -> None:
    whole = 2 * (LARGE.counts.encoder + LARGE.counts.adaptor)
    one, two = (engine_weights(LARGE, bytes_per_value=2, tensor_parallel=n) - whole for n in (devices, 2 * devices))
    assert one == pytest.approx(2 * two, rel=1e-9)
    per_id = [memory.kv_bytes_per_id(LARGE.shape, bytes_per_value=2, tensor_parallel=n) for n in (devices, 2 * devices)]
    assert per_id[0] == 2 * per_id[1]


def test_an_engine_on_one_device_holds_every_weight_and_an_untied_head() -> None:
    tiny = model_size(TINY)
    assert engine_weights(LARGE, bytes_per_value=2, tensor_parallel=1) == 2 * LARGE.counts.total
    assert engine_weights(tiny, bytes_per_value=4, tensor_parallel=1) == 4 * (tiny.counts.total + tiny.counts.embedding)


def test_kv_heads_are_not_divided_further_than_one_per_device() -> None:
    per_id = [memory.kv_bytes_per_id(LARGE.shape, bytes_per_value=2, tensor_parallel=n) for n in (8, 16)]
    assert per_id[0] == per_id[1]


@given(ranks=st.integers(1, 4096))
def test_stage_3_divides_every_trained_state_by_the_ranks(ranks: int) -> None:
    trained = LARGE.counts.trained(train_encoder=False)
    states = memory.model_states(LARGE, replace(PLAN, ranks=ranks))
    shared = sum(states.values()) - 2 * LARGE.counts.encoder  # the frozen encoder is whole everywhere
    assert 18 * trained <= shared * ranks <= 18 * (trained + ranks)


@given(ranks=st.integers(2, 512), stage=st.integers(1, 2))
def test_a_higher_stage_never_keeps_more(ranks: int, stage: int) -> None:
    lower, higher = (memory.model_states(LARGE, replace(PLAN, ranks=ranks, zero_stage=s)) for s in (stage, stage + 1))
    assert sum(higher.values()) < sum(lower.values())


@given(stage=STAGES, cells=st.integers(1, 60_000), more=st.integers(1, 60_000))
def test_more_cells_never_need_less(stage: int, cells: int, more: int) -> None:
    small = replace(PLAN, zero_stage=stage, micro_batch_tokens=cells, longest_row=1)
    large = replace(small, micro_batch_tokens=cells + more)
    assert learner_use(LARGE, small).peak <= learner_use(LARGE, large).peak


def test_a_row_longer_than_the_budget_counts_whole() -> None:
    assert replace(PLAN, micro_batch_tokens=100).cells == 10240


def test_a_reference_takes_what_its_place_says_and_never_a_second_encoder() -> None:
    trained = 2 * LARGE.counts.trained(train_encoder=False)
    without = learner_use(LARGE, PLAN).peak
    more = {kind: learner_use(LARGE, replace(PLAN, reference=kind)).peak - without for kind in ("whole", "sharded")}
    assert more == {"whole": trained, "sharded": -(-trained // PLAN.ranks)}
    offloaded = replace(PLAN, reference="offload")
    assert learner_use(LARGE, offloaded).peak == without
    assert memory.offloaded_states(LARGE, offloaded)["reference"] == more["sharded"]


@given(ranks=st.integers(1, 512), stage=st.integers(1, 3))
def test_what_leaves_the_device_is_found_in_main_memory(ranks: int, stage: int) -> None:
    plan = replace(PLAN, ranks=ranks, zero_stage=stage)
    offloaded = replace(plan, offload_optimizer=True, offload_parameters=stage == 3)
    gone = sum(memory.model_states(LARGE, plan).values()) - sum(memory.model_states(LARGE, offloaded).values())
    host = memory.offloaded_states(LARGE, offloaded)
    assert host["optimizer"] >= memory.model_states(LARGE, plan)["optimizer"] > 0
    assert 0 < gone <= sum(host.values())
    assert learner_use(LARGE, offloaded).peak < learner_use(LARGE, plan).peak
    assert sum(memory.offloaded_states(LARGE, plan).values()) == 0


@given(room_gb=st.integers(30, 200), checkpointing=st.booleans())
def test_the_longest_row_is_the_longest(room_gb: int, checkpointing: bool) -> None:
    plan = replace(PLAN, gradient_checkpointing=checkpointing)
    longest = memory.longest_row(LARGE, plan, room=room_gb * GB)

    def fits(ids: int) -> bool:
        return learner_use(LARGE, replace(plan, micro_batch_tokens=1, longest_row=ids)).peak <= room_gb * GB

    assert not fits(longest + 1)
    assert longest == 0 or fits(longest)


def test_at_stage_3_no_rank_loads_the_whole_model() -> None:
    assert memory.loading_bytes(LARGE, replace(PLAN, zero_stage=2)) == 2 * LARGE.counts.total
    trained, counts = LARGE.counts.trained(train_encoder=False), LARGE.counts
    assert memory.loading_bytes(LARGE, PLAN) == 2 * (counts.encoder + -(-trained // 16) + counts.embedding)


def test_what_the_engine_keeps_adds_up_to_its_share() -> None:
    use = engine_use(LARGE, ENGINE, device_bytes=80 * GB)
    assert use.weights + use.working + use.kv == use.share == 72 * GB
    assert use.rest == 8 * GB
    assert use.ids * use.bytes_per_id <= use.kv < (use.ids + 1) * use.bytes_per_id


def test_an_engine_that_neither_swaps_nor_encodes_needs_nothing_beside_its_share() -> None:
    use = engine_use(LARGE, replace(ENGINE, swaps=False, encodes=False), device_bytes=80 * GB)
    assert use.beside == 0
    assert engine_use(LARGE, ENGINE, device_bytes=80 * GB).beside > 2 * LARGE.counts.encoder


# ---- against the code ---------------------------------------------------------------------------------------------


def kept_bytes(config: Qwen2Config, *, dtype: torch.dtype, cells: int, checkpointed: bool = False) -> int:
    """Bytes of distinct tensors that autograd keeps between forward and backward, weights left out."""
    config._attn_implementation = "sdpa"
    model = Qwen2Model(config).to(dtype).train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors, not only their sizes: a freed address would be used again

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    embeds = torch.randn(1, cells, config.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=embeds, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def qwen2(shape: Shape, *, layers: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
    )


SMALL = [Shape(128, 384, 1, 4, 2, 32, 32, 1024), Shape(192, 640, 1, 4, 4, 48, 32, 1024)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SMALL)
def test_a_layer_keeps_what_the_formula_says(dtype: str, shape: Shape) -> None:
    one, three = (kept_bytes(qwen2(shape, layers=layers), dtype=DTYPES[dtype], cells=64) for layers in (1, 3))
    per_layer = memory.layer_bytes_per_cell(shape, bytes_per_value=memory.BYTES_PER_VALUE[dtype])
    assert (three - one) / 2 == per_layer * 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpointed_layer_keeps_its_input(dtype: str) -> None:
    one, three = (
        kept_bytes(qwen2(SMALL[0], layers=layers), dtype=DTYPES[dtype], cells=64, checkpointed=True)
        for layers in (1, 3)
    )
    plan = replace(PLAN, bytes_per_value=memory.BYTES_PER_VALUE[dtype], micro_batch_tokens=64, longest_row=1)
    formula = [memory.activations(replace(SMALL[0], num_layers=layers), plan) for layers in (1, 3)]
    assert three - one == formula[1] - formula[0] == 2 * 64 * SMALL[0].hidden * plan.bytes_per_value


def test_a_snapshot_has_the_bytes_the_learner_makes() -> None:
    module = StepAudioModule(StepAudioConfig.from_dict(TINY))
    trained = [(name, tensor) for name, tensor in module.named_parameters() if not name.startswith("encoder.")]
    for dtype, value in memory.BYTES_PER_VALUE.items():
        made = Snapshot.of(trained, version=WeightVersion(0, 1), wire_dtype=dtype)  # type: ignore[arg-type]
        assert made.num_bytes == memory.snapshot_bytes(model_size(TINY), bytes_per_value=value, train_encoder=False)


def test_mirrored_constants_are_those_of_the_code() -> None:
    engine = {field.name: field.default for field in dataclasses.fields(EngineSettings)}
    trainer = {field.name: field.default for field in dataclasses.fields(TrainerSpec)}
    assert engine["max_step_tokens"] == memory.STEP_TOKENS
    assert trainer["cache_mb"] << 20 == budgets.ENCODER_CACHE
    assert LOGIT_CHUNK == memory.LOGIT_CHUNK
    assert set(DTYPES) == set(memory.BYTES_PER_VALUE)
    width = LARGE.shape.hidden
    assert _zero_settings(3, width=width)["reduce_bucket_size"] == memory.bucket_values(LARGE.shape)
    assert AlgorithmSettings().kl_coef > 0  # so the reference is counted unless it is switched off
