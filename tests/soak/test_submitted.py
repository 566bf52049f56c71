"""The quickstart's real trainer as a job: submitted to a head with a token, stopped, submitted again to go on.

`make soak CELL=submitted`: about five minutes on two idle cores. In CI `tests/ray_local/test_submit.py` does the same
with a stand-in for engines and learner.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ray_local.cluster_head import Head, head_environment, running_head

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
DEADLINE_S = 3600.0

pytestmark = pytest.mark.soak


def submit(head: Head, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "rlaudio.cli.main", "submit", "--address", head.address, *arguments]
    return subprocess.Popen(
        command, env=head_environment(head), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def settings(world: Path, root: Path, *, steps: int) -> list[str]:
    return [
        *(str(QUICKSTART / "config.yaml"), "--python", sys.executable),
        *(f"data.train={world}/train.jsonl", f"data.clips={world}"),
        *(f"data.heldout.heldout={world}/heldout.jsonl", f"data.heldout.heldout_voices={world}/heldout_voices.jsonl"),
        *(f"run.root={root}", f"run.steps={steps}", "run.checkpoint_every=1"),
        *("algorithm.groups_per_step=2", "algorithm.group_size=4", "learner.ranks=2", "learner.num_cpus=0.3"),
    ]


def test_submitted_stopped_and_submitted_again(tmp_path: Path) -> None:
    world = tmp_path / "data"
    counts = ["--train", "12", "--heldout", "6", "--heldout-voices", "6"]
    made = [sys.executable, "-m", "spoken_world.make", "--out", str(world), *counts]
    subprocess.run(made, cwd=QUICKSTART, check=True, timeout=600, env={**os.environ})
    root = tmp_path / "runs"
    with running_head() as head:
        first = submit(head, *settings(world, root, steps=400))
        until = time.monotonic() + DEADLINE_S
        while not list(root.glob("*/checkpoints/step-*/manifest.json")):
            assert first.poll() is None and time.monotonic() < until, first.communicate()[0]
            time.sleep(0.5)
        listed, _ = submit(head, "--list").communicate(timeout=DEADLINE_S)
        (job_id,) = re.findall(r"\bRUNNING +(quickstart-\S+)", listed)
        told, _ = submit(head, "--stop", job_id).communicate(timeout=DEADLINE_S)
        assert f"job {job_id} stopped" in told
        output, _ = first.communicate(timeout=DEADLINE_S)
        (run,) = root.glob("quickstart-*")
        assert first.returncode == 130 and f"run folder: {run}\n" in output, output
        assert re.search(r"^curves: env .*mlflow ui ", output, re.MULTILINE) and f"--resume {run}" in output

        stopped_at = max(int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/*/manifest.json"))
        again = submit(head, *settings(world, root, steps=stopped_at + 2), "--resume", str(run))
        output, _ = again.communicate(timeout=DEADLINE_S)
        assert again.returncode == 0, output
        assert f"run: {run}\n" in output and json.loads((run / "report.json").read_text())["timings_s"]["train"] > 0
