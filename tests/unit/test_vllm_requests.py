"""Our requests as vLLM reads them: ids survive folding, bans survive packing. vLLM itself is not imported here."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlaudio.engines.base import GenerationRequest, Sampling
from rlaudio.engines.settings import EngineSettings, engine_environment
from rlaudio.engines.vllm_requests import parse_version, to_piece, to_prompt, to_ranges
from rlaudio.errors import ConfigError, EngineError
from rlaudio.types import SAMPLE_RATE_HZ, AudioClip, ClipSpan, EncodedClip, WeightVersion

PAD = 9


def request(ids: list[int], spans: list[tuple[int, int]], *, num_clips: int | None = None) -> GenerationRequest:
    names = [f"{i:064x}" for i in range(len(spans))]
    clips = tuple(AudioClip(name, np.full(3, i, np.float32)) for i, name in enumerate(names[:num_clips]))
    return GenerationRequest(
        request_id="r",
        prompt_ids=np.array(ids, np.int32),
        sampling=Sampling(max_new_tokens=1),
        clips=clips,
        clip_spans=tuple(ClipSpan(name, *span) for name, span in zip(names, spans, strict=True)),
    )


@given(
    texts=st.lists(st.lists(st.integers(0, 8), max_size=5), min_size=1, max_size=5),
    rows=st.lists(st.integers(1, 6), min_size=4, max_size=4),
)
def test_unfolding_gives_back_every_id(texts: list[list[int]], rows: list[int]) -> None:
    ids, spans = list(texts[0]), []
    for text, num_rows in zip(texts[1:], rows, strict=False):
        spans.append((len(ids), len(ids) + num_rows))
        ids += [PAD] * num_rows + text
    prompt = to_prompt(request(ids, spans))
    widths = iter(rows)
    unfolded = [x for token in prompt["prompt_token_ids"] for x in ([PAD] * next(widths) if token == PAD else [token])]
    assert unfolded == ids
    if spans:
        assert [rate for _, rate in prompt["multi_modal_data"]["audio"]] == [SAMPLE_RATE_HZ] * len(spans)
        assert prompt["multi_modal_uuids"]["audio"] == [f"{i:064x}" for i in range(len(spans))]
    else:
        assert "multi_modal_data" not in prompt


def test_encoded_clips_travel_as_states_under_a_name_of_their_own() -> None:
    values = torch.randn(4, 3)
    clips = tuple(
        EncodedClip("a" * 64, states, dtype=dtype, encoder=encoder)
        for states, dtype, encoder in (
            (values.numpy(), "float32", "e1"),
            (values.numpy(), "float32", "e2"),
            (values.bfloat16().view(torch.uint16).numpy(), "bfloat16", "e1"),
        )
    )
    sound = AudioClip("a" * 64, np.zeros(3, np.float32))
    asked = GenerationRequest(
        request_id="r",
        prompt_ids=np.array([PAD] * 8, np.int32),
        sampling=Sampling(max_new_tokens=1),
        clips=(*clips, sound),
        clip_spans=tuple(ClipSpan("a" * 64, 2 * i, 2 * i + 2) for i in range(4)),
    )
    prompt = to_prompt(asked)
    first, second, third, last = prompt["multi_modal_data"]["audio"]
    assert torch.equal(first, values) and torch.equal(second, values)
    assert torch.equal(third, values.bfloat16())
    assert last == (sound.samples, SAMPLE_RATE_HZ)
    assert len(set(prompt["multi_modal_uuids"]["audio"])) == 4, "no cache may take one for another"


@pytest.mark.parametrize("spans", [[(1, 1)], [(2, 4), (3, 5)], [(4, 7)], [(3, 5), (0, 2)]])
def test_spans_that_cannot_be_are_refused(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(EngineError, match="request r: clip span"):
        to_prompt(request([PAD] * 6, spans))


def test_clips_must_match_their_spans() -> None:
    with pytest.raises(EngineError, match="1 clips for 2 clip spans"):
        to_prompt(request([PAD] * 6, [(0, 2), (3, 5)], num_clips=1))


@given(ids=st.lists(st.integers(0, 50), unique=True))
def test_ranges_hold_exactly_the_banned_ids(ids: list[int]) -> None:
    ranges = to_ranges(tuple(ids))
    assert [x for a, b in zip(ranges[::2], ranges[1::2], strict=True) for x in range(a, b)] == sorted(ids)
    assert all(a < b for a, b in itertools.pairwise(ranges))


@given(incarnation=st.integers(0, 10**6), number=st.integers(0, 10**9))
def test_versions_survive_being_text(incarnation: int, number: int) -> None:
    version = WeightVersion(incarnation, number)
    assert parse_version(str(version)) == version


@pytest.mark.parametrize("text", ["default", "1", "1.x", ""])
def test_a_version_that_was_never_set_is_an_error(text: str) -> None:
    with pytest.raises(EngineError, match="which rlaudio never set"):
        parse_version(text)


def test_settings_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'/nowhere' is not a folder"):
        EngineSettings(model="/nowhere", max_model_len=8)
    with pytest.raises(ConfigError, match=r"engine\.max_model_len \(for a judge.* is 0"):
        EngineSettings(model=str(tmp_path), max_model_len=0)
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_mb \(for a judge.* is not set"):
        EngineSettings(model=str(tmp_path), max_model_len=8, kv_cache_mb=None)


def test_cpu_engines_are_kept_off_each_others_cores(tmp_path: Path) -> None:
    environment = engine_environment(EngineSettings(model=str(tmp_path), max_model_len=8, num_threads=3))
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    gpu = engine_environment(EngineSettings(model=str(tmp_path), max_model_len=8, device="cuda"))
    assert "OMP_NUM_THREADS" not in gpu
    assert "TORCH_COMPILE_DISABLE" not in gpu


@pytest.mark.parametrize("kept", [False, True])
def test_tokens_behind_a_swap_that_kept_the_cache_are_marked_as_of_no_version(kept: bool) -> None:
    request = GenerationRequest("r", np.array([5, 6], np.int32), Sampling(max_new_tokens=3))
    spans = [SimpleNamespace(version="1.4", start=0, end=2), SimpleNamespace(version="1.5", start=2, end=3)]
    logprobs = SimpleNamespace(logprobs=[-0.1, -0.2, -0.3])
    said: Any = SimpleNamespace(token_ids=[7, 8, 9], logprobs=logprobs, weight_versions=spans)
    output: Any = SimpleNamespace(prompt_token_ids=[5, 6], outputs=[said])
    piece = to_piece(output, request, keep_kv_cache=kept)
    assert [(span.version.number, span.mixed) for span in piece.version_spans] == [(4, False), (5, kept)]
