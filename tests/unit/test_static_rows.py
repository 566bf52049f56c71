"""`rlaudio doctor --static`: examples pass, what cannot fit fails and names settings that make it fit."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaudio.config import RunConfig
from rlaudio.config_loader import load_config
from rlaudio.doctor.rows import Row, failures
from rlaudio.doctor.static import static_rows
from rlaudio.doctor.static.placement import Actor, Machines, place

ROOT = Path(__file__).resolve().parents[2]
R1 = ROOT / "examples/step_audio_r1_5/config.yaml"
QUICKSTART = ROOT / "examples/quickstart/config.yaml"
AQA = ROOT / "examples/qwen2_audio_aqa/config.yaml"
OMNI = ROOT / "examples/qwen2_5_omni/config.yaml"


def rows_of(*overrides: str, config: Path = R1) -> dict[str, Row]:
    return {row.name: row for row in static_rows(load_config(RunConfig, config, overrides))}


def failed(*overrides: str, config: Path = R1) -> dict[str, Row]:
    return {name: row for name, row in rows_of(*overrides, config=config).items() if row.verdict == "fail"}


def settings_in(text: str) -> list[str]:
    """The first way out that a next step names: `a=b and c=d`, up to an `or`."""
    return re.findall(r"[a-z_]+(?:\.[a-z_]+)+=[\w.]+", text.split(" or ")[0])


# ---- examples -----------------------------------------------------------------------------------------------------


LAPTOP = ["cluster.nodes=1", "cluster.cpus_per_node=2", "cluster.memory_gb=8"]  # not the machine this test runs on


EXAMPLES = [(R1, []), (AQA, []), (OMNI, []), (QUICKSTART, LAPTOP)]


@pytest.mark.parametrize(("config", "overrides"), EXAMPLES, ids=["r1.5", "aqa", "omni", "quickstart"])
def test_the_examples_pass(config: Path, overrides: Sequence[str]) -> None:
    rows = static_rows(load_config(RunConfig, config, overrides))
    assert not failures(rows)
    assert [row.name for row in rows if row.verdict == "skipped"] == []


def test_every_example_with_a_run_is_looked_at() -> None:
    assert {config for config, _ in EXAMPLES} == set((ROOT / "examples").glob("*/config.yaml"))


@pytest.mark.parametrize(
    ("config", "billions", "trained"), [(AQA, 8.4, 7.8), (OMNI, 4.0, 3.4)], ids=["Qwen2-Audio-7B", "Qwen2.5-Omni-3B"]
)
def test_public_sizes(config: Path, billions: float, trained: float) -> None:
    row = rows_of(config=config)["static_model"]
    assert row.measured["total_b"] == pytest.approx(billions, abs=0.05)
    assert row.measured["trained_b"] == pytest.approx(trained, abs=0.05)


def test_the_33b_is_measured_as_it_is_known() -> None:
    rows = rows_of()
    assert rows["static_model"].measured["weights_gb"] == pytest.approx(67, abs=0.5)
    assert rows["static_model"].measured["total_b"] == pytest.approx(33.5, abs=0.1)
    assert rows["static_object_store"].measured["snapshot_gb"] == pytest.approx(65.7, abs=0.1)
    assert rows["static_placement"].measured["gpus_used"] == 64
    assert rows["static_batch"].measured["dialogues_per_step"] == 32 * 16


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys\nfrom rlaudio.config import RunConfig\nfrom rlaudio.config_loader import load_config\n"
        f"from rlaudio.doctor.static import static_rows\nstatic_rows(load_config(RunConfig, {str(R1)!r}))\n"
        "print(*sorted({'torch', 'transformers', 'vllm', 'ray', 'deepspeed'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


# ---- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "overrides"),
    [
        ("static_learner_memory", ["learner.gradient_checkpointing=false"]),
        ("static_learner_memory", ["learner.zero_stage=1"]),
        ("static_learner_memory", ["algorithm.kl_coef=0.001", "learner.reference=whole"]),
        ("static_learner_memory", ["cluster.gpu_memory_gb=48"]),
        ("static_learner_memory", ["learner.micro_batch_tokens=65536"]),
        ("static_learner_memory", ["learner.zero_stage=2", "learner.gradient_checkpointing=false"]),
        ("static_learner_memory", ["learner.ranks=4", "cluster.nodes=16"]),
        (
            "static_rollout_memory",
            ["rollout.num_gpus=1", "rollout.engine.tensor_parallel=1", "rollout.engine.max_model_len=16384"],
        ),
        ("static_rollout_memory", ["rollout.engine.gpu_memory_utilization=0.25"]),
        ("static_rollout_memory", ["rollout.engine.gpu_memory_utilization=0.97"]),
        ("static_judge_memory", ["rewards.judge_model.dtype=float32", "cluster.gpu_memory_gb=40"]),
    ],
)
def test_what_cannot_fit_names_settings_that_make_it_fit(row: str, overrides: Sequence[str]) -> None:
    before = failed(*overrides)
    assert row in before
    assert re.search(r"\d", before[row].reason), "the reason has the numbers"
    named = settings_in(before[row].next_step)
    assert named, before[row].next_step
    assert row not in failed(*overrides, *named)


def test_a_single_gpu_cannot_train_the_33b_and_the_number_of_ranks_is_named() -> None:
    alone = ["learner.ranks=1", "cluster.nodes=5", "cluster.gpus_per_node=6"]
    row = failed(*alone)["static_learner_memory"]
    assert row.next_step == "set learner.offload_optimizer=cpu and learner.offload_parameters=cpu"
    row = failed(*alone, "cluster.gpu_memory_gb=36")["static_learner_memory"]
    assert "learner.ranks=" in row.next_step
    assert "static_learner_memory" not in failed(
        *settings_in(row.next_step), "cluster.nodes=500", "cluster.gpu_memory_gb=36"
    )


def test_no_number_of_ranks_helps_where_the_model_is_larger_than_a_device() -> None:
    row = failed("cluster.gpu_memory_gb=16")["static_learner_memory"]
    assert "no number of ranks" in row.next_step


def test_a_row_too_long_for_a_device_says_that_it_is_not_divided_and_which_would_fit() -> None:
    row = failed("rollout.engine.max_model_len=32768", "cluster.gpu_memory_gb=64")["static_learner_memory"]
    assert "max_model_len=32768 ids cannot be divided over devices" in row.reason
    longest = int(row.measured["longest_row_ids"])
    shorter = [f"rollout.engine.max_model_len={longest}", f"learner.micro_batch_tokens={longest}"]
    assert "static_learner_memory" not in failed(*shorter, "cluster.gpu_memory_gb=64")
    longer = [f"rollout.engine.max_model_len={longest + 1}", "cluster.gpu_memory_gb=64"]
    assert "static_learner_memory" in failed(*longer)


def test_a_node_too_small_for_eight_ranks_loading_at_once_says_so() -> None:
    row = failed("cluster.memory_gb=500", "learner.zero_stage=2")["static_host_memory"]
    assert "while loading" in row.reason
    assert row.measured["starting_gb"] == pytest.approx(8 * 67 + 25, rel=0.02)
    assert "static_host_memory" not in failed("cluster.memory_gb=500")


def test_what_is_offloaded_must_fit_the_nodes() -> None:
    offloaded = ["learner.ranks=8", "learner.offload_optimizer=cpu", "learner.offload_parameters=cpu"]
    row = failed(*offloaded, "cluster.memory_gb=450")["static_host_memory"]
    assert row.measured["learners_gb"] > 8 * 18 * 32.8 / 8
    assert "static_host_memory" not in failed("learner.ranks=8", "cluster.memory_gb=450")


def test_two_snapshots_must_fit_the_object_store() -> None:
    assert "static_object_store" in failed("cluster.memory_gb=400")
    assert "static_object_store" not in failed("cluster.memory_gb=450")


@pytest.mark.parametrize("gpu_memory_gb", [24, 40, 80, 141, 192])
def test_more_memory_never_breaks_what_fitted(gpu_memory_gb: int) -> None:
    smaller = set(failed(f"cluster.gpu_memory_gb={gpu_memory_gb}"))
    assert set(failed(f"cluster.gpu_memory_gb={gpu_memory_gb + 20}")) <= smaller


# ---- placement ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["learner.ranks=33"], "1 learner actors (learner.ranks)"),
        (["rollout.actors=7"], "4 learner actors"),  # one GPU fits anywhere, so it is placed last
        (["cluster.gpus_per_node=2", "cluster.nodes=32"], "4 GPUs and 8 CPUs left for 6 rollout actors"),
        (["cluster.cpus_per_node=16"], "learner.ranks"),
        (["cluster.cpus_per_node=0"], "cluster.cpus_per_node is not set"),
        (["cluster.gpu_memory_gb=0"], "cluster.gpu_memory_gb is not set"),
        (["cluster.nodes=0"], "set cluster.nodes"),
    ],
)
def test_a_role_left_without_a_device_is_named(overrides: Sequence[str], named: str) -> None:
    assert named in failed(*overrides)["static_placement"].reason


ACTORS = st.lists(
    st.builds(
        Actor, st.just("rollout"), st.just("rollout.actors"), st.floats(0, 8), st.sampled_from([0, 0.5, 1, 2, 4])
    ),
    max_size=30,
)


@given(wanted=ACTORS, nodes=st.integers(1, 6), gpus=st.integers(0, 8), cpus=st.integers(1, 32))
def test_every_actor_is_placed_once_or_left_over_and_no_node_holds_too_much(
    wanted: list[Actor], nodes: int, gpus: int, cpus: int
) -> None:
    have = Machines(nodes, cpus, gpus, 1, 1, "", local=False)
    placed = place(wanted, have)
    there = [actor for node in placed.nodes for actor in node.actors]
    assert sorted(map(repr, [*there, *placed.left_over])) == sorted(map(repr, wanted))
    for node in placed.nodes:
        assert sum(actor.gpus for actor in node.actors) <= gpus + 1e-5
        assert sum(actor.cpus for actor in node.actors) <= cpus + 1e-5
    for actor in placed.left_over:
        assert not any(node.takes(actor, share_cpus=False) for node in placed.nodes)


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rollout.engine.kind=in_process"], "rollout.engine.kind is in_process"),
        (["rollout.num_gpus=0", "rollout.engine.tensor_parallel=1"], "rollout.engine.kind is async_llm"),
        (["rollout.num_gpus=2"], "rollout.num_gpus is 2 and rollout.engine.tensor_parallel 4"),
        (["rollout.engine.kind=vllm"], "rollout.engine.kind is 'vllm'"),
        (["rollout.engine.tensor_parallel=3", "rollout.num_gpus=3"], "divide 40 heads"),
        (["rollout.engine.max_model_len=70000"], "has 65536 positions"),
        (["rollout.engine.gpu_memory_utilization=90"], "gpu_memory_utilization is 90"),
        (["rewards.judge_model.engine.tensor_parallel=2"], "rewards.judge_model.engine.tensor_parallel 2"),
        (
            ["rewards.judge_model.path=''", "rewards.sources=[{name: v, judge: 'rlaudio.rewards.verified:R1Text'}]"],
            "rewards.judge_model.path is empty",
        ),
        (["rewards.judge_model.path=''", "rewards.num_gpus=0"], "rewards.sources[1] ('judge') needs a judge model"),
        (["rewards.sources[1].options={orders: bth}"], "rewards.sources[1].options.orders is 'bth': did you mean both"),
        (["rewards.sources[1].options={reference: policy}"], "rewards.reference_model.path is empty"),
        (["rewards.judge_model.dtype=float16"], "rewards.judge_model.dtype is 'float16'"),
        (["model.dtype=half"], "model.dtype is 'half'"),
        (["model.family=rlaudio.models.qwen_audio:Qwen2Audio"], "model_type step_audio_2"),
        (["learner.zero_stage=0"], "no float32 master weights"),
        (["learner.zero_stage=4"], "learner.zero_stage is 4"),
        (["learner.num_gpus=2"], "learner.num_gpus is 2"),
        (["rollout.encoder_device=gpu"], "rollout.encoder_device is 'gpu'"),
        (["algorithm.name=ppo", "algorithm.group_size=0"], "algorithm.group_size is 0"),
        (["algorithm.minibatches=33"], "algorithm.minibatches is 33"),
        (["algorithm.max_staleness=-1"], "algorithm.max_staleness is -1"),
        (["sampling.temperature=0"], "sampling.temperature is 0"),
        (["sampling.top_p=0.9"], "sampling.top_p is 0.9"),
        (["rewards.sources=[]"], "rewards.sources is empty"),
        (["rewards.min_siblings=0"], "rewards.min_siblings is 0"),
    ],
)
def test_contradictions_are_named(overrides: Sequence[str], named: str) -> None:
    row = failed(*overrides)["static_settings"]
    assert named in row.reason
    assert row.reason.count("; ") == 0, "one contradiction, one complaint"


def test_bfloat16_on_a_cpu_is_noted_and_passes() -> None:
    overrides = ["model.dtype=bfloat16", "learner.zero_stage=1"]
    row = rows_of(*overrides, config=QUICKSTART)["static_settings"]
    assert row.verdict == "pass"
    assert "bfloat16 on a CPU" in str(row.measured["note"])


def test_engines_without_a_group_are_noted() -> None:
    row = rows_of("algorithm.groups_per_step=2", "algorithm.max_staleness=0")["static_batch"]
    assert "4 rollout actors never have a group" in str(row.measured["note"])


def test_a_cache_smaller_than_one_sequence_names_the_size_that_holds_it() -> None:
    row = failed("rollout.engine.kv_cache_mb=1", "rollout.engine.max_model_len=1024", config=QUICKSTART)
    named = settings_in(row["static_rollout_memory"].next_step)
    assert named == ["rollout.engine.kv_cache_mb=2"]
    assert "static_rollout_memory" not in failed(*named, "rollout.engine.max_model_len=1024", config=QUICKSTART)


# ---- checkpoints and data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["model.path", "rewards.judge_model.path"])
def test_a_checkpoint_that_is_not_there_fails_one_row_and_skips_the_rest(setting: str, tmp_path: Path) -> None:
    rows = rows_of(f"{setting}={tmp_path}/absent")
    assert rows["static_model"].verdict == "fail"
    assert f"{tmp_path}/absent/config.json" in rows["static_model"].reason
    assert {row.verdict for name, row in rows.items() if name != "static_model"} == {"skipped"}


def records(path: Path, *, turns: int, words: int) -> str:
    """A file with one spoken-to-text record of so many user messages; returns the override that names it."""
    messages = [{"role": "user", "content": [{"text": "word " * words}]} for _ in range(turns)]
    path.write_text(json.dumps({"id": "long", "task": "t", "messages": messages}) + "\n")
    return f"data.train={path}"


def test_a_dialogue_that_can_never_be_played_is_named(tmp_path: Path) -> None:
    data = records(tmp_path / "train.jsonl", turns=4, words=66)
    row = failed(data, config=QUICKSTART)["static_length"]  # 4 * 69 + 3 * 4 + 40 = 328 of 320
    assert "'long'" in row.reason


def test_a_dialogue_that_only_full_replies_make_too_long_is_noted(tmp_path: Path) -> None:
    data = records(tmp_path / "train.jsonl", turns=4, words=40)
    row = rows_of(data, config=QUICKSTART)["static_length"]
    assert row.verdict == "pass"
    assert row.measured["longest_turns"] == 4
    assert "'long'" in str(row.measured["note"])
    assert "note" not in rows_of(data, "dialogue.max_turns=2", config=QUICKSTART)["static_length"].measured


def test_a_broken_record_is_a_failed_row_that_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n")
    row = failed(f"data.train={tmp_path}/train.jsonl", config=QUICKSTART)["static_length"]
    assert f"{tmp_path}/train.jsonl:1" in row.reason


def test_a_budget_as_long_as_the_window_leaves_no_room(tmp_path: Path) -> None:
    row = failed("sampling.max_new_tokens=10240")["static_settings"]
    assert "no room for a prompt" in row.reason
