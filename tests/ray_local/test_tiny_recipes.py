"""Every recipe of full size starts on a CPU with its own file: real Ray, vLLM and DeepSpeed, two steps.

One of them runs with the tests; the others, which serve a judge or play more turns, are cells of `make soak CELL=tiny`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlaudio.cli.main import main
from rlaudio.observe.tracker import read_curves

ROOT = Path(__file__).resolve().parents[2]
DEADLINES = [f"{role}.start_deadline_s=900" for role in ("rollout", "rewards", "learner")]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "example",
    [
        "qwen2_audio_aqa",
        pytest.param("qwen2_5_omni", marks=pytest.mark.soak),
        pytest.param("step_audio_r1_5", marks=pytest.mark.soak),
    ],
)
def test_a_full_size_recipe_trains_tiny(example: str, tmp_path: Path) -> None:
    config = ROOT / "examples" / example / "config.yaml"
    output = rlaudio("train", str(config), "--tiny", f"run.root={tmp_path}", "tracking.mlflow=false", *DEADLINES)
    assert "every other setting is the file's" in output
    (run,) = tmp_path.glob(f"{config.parent.name.replace('_', '-')}-tiny-*")
    assert output.rstrip().splitlines()[-1] == f"run: {run}"
    report = json.loads((run / "report.json").read_text())
    assert report["groups"]["trained"] == 2 * 2
    curves = read_curves(run / "metrics/metrics.jsonl")
    assert [step for step, _ in curves["loss"]] == [0, 1]  # what is not finite is no point of a curve
    assert [step for step, _ in curves["grad_norm"]] == [0, 1]
    assert json.loads((run / "doctor.json").read_text())  # the two sides were compared before the first step
    assert (run / "model/config.json").is_file()
    assert main(["audit", str(run)]) == 0


def rlaudio(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "rlaudio.cli.main", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1700,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
