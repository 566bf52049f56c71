"""Training a judge as a user does: real DeepSpeed, real vLLM; the figures of what came out lie in the run folder."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlaudio.models.step_audio import create_tiny
from rlaudio.rewards.prompt import PROMPT_WORDS

WORDS = "say one two three four five right wrong".split()


def write_pairs(path: Path, *, first: int, num: int) -> None:
    lines = [
        {
            "id": f"p{number}",
            "axis": ("even", "odd")[number % 2],
            "messages": [{"role": "user", "content": [{"text": f"say {' '.join(['one'] * number)}"}]}],
            "reference": "one two",
            "response": "one two" if number % 2 else "three",
            "level": 2 if number % 2 else 0,
            "reasoning": "right" if number % 2 else "wrong",
        }
        for number in range(first, first + num)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))


def rlaudio(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "rlaudio.cli.main", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=800)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    create_tiny(tmp_path / "init", words=[*PROMPT_WORDS, *WORDS], seed=0)
    write_pairs(tmp_path / "train.jsonl", first=0, num=24)
    write_pairs(tmp_path / "heldout.jsonl", first=24, num=6)
    settings: dict[str, Any] = {
        "recipe": "reward_model",
        "run": {"name": "tiny", "output": "out"},
        "model": {"path": "init"},
        "heldout": "heldout.jsonl",
        "phases": [{"name": "judge", "data": "train.jsonl", "steps": 2, "rows_per_step": 8}],
        "engine": {"max_model_len": 160, "max_num_seqs": 8},
        "asking": {"max_new_tokens": 4},
        "calibration": {"bootstrap": 50},
        "tracking": {"mlflow": False},
    }
    (tmp_path / "judge.yaml").write_text(json.dumps(settings))  # JSON is YAML
    return tmp_path


@pytest.mark.timeout(900)
def test_a_judge_is_trained_and_measured(files: Path) -> None:
    done = rlaudio(files, "train", "judge.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (files / "runs").glob("tiny-*")
    assert "== heldout" in done.stdout and "liking for the first place" in done.stdout
    assert (files / "out" / "model.safetensors").stat().st_size > 0
    found = json.loads((run / "calibration.json").read_text())["heldout"]
    assert found["num_pairs"] == 6 and set(found["axes"]) == {"even", "odd"}
    verdicts = [json.loads(line) for line in (run / "verdicts-heldout.jsonl").read_text().splitlines()]
    assert len(verdicts) == 12
    assert found["failure_rate"] == sum(one["level"] is None for one in verdicts) / 12
    steps = [json.loads(line) for line in (run / "metrics" / "metrics.jsonl").read_text().splitlines()]
    assert sum("judge/loss" in str(step) for step in steps) == 2


def test_what_is_held_out_and_learned_from_stops_the_run_before_it_starts(files: Path) -> None:
    write_pairs(files / "heldout.jsonl", first=23, num=6)
    done = rlaudio(files, "train", "judge.yaml")
    assert done.returncode == 2
    assert "1 held-out comparisons are learned from too: 'p23'" in done.stderr
    assert not (files / "out").exists()


@pytest.mark.soak
def test_agreement_is_learned_by_playing_the_judge_s_own_prompts(files: Path) -> None:
    """The RL recipe on the records that this one writes: one step, evaluated before and after."""
    agreement = (
        "agreement={steps: 1, settings: {algorithm: {group_size: 4, groups_per_step: 2, dynamic_sampling: false}}}"
    )
    done = rlaudio(files, "train", "judge.yaml", agreement)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (files / "runs").glob("tiny-*")
    (played,) = (run / "agreement").glob("agreement-*")
    assert json.loads((played / "report.json").read_text())
    trained, supervised = (path / "model.safetensors" for path in (files / "out", run / "supervised"))
    assert trained.read_bytes() == (played / "model" / "model.safetensors").read_bytes() != supervised.read_bytes()
