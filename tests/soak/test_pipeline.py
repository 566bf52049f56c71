"""The quickstart's pipeline, killed with SIGKILL in the middle of every stage and started again each time.

`make soak CELL=pipeline`: twice `make pipeline`; `SOAK_STEPS=n` shortens every stage to try the mechanics. Supervised
stages must come out bit for bit as in one go. Played ones are not compared: what is computed together depends on
timing, and the last bits on that.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.soak.learning import QUICKSTART, ROOT, STEPS, make_world

pytestmark = pytest.mark.soak

STAGE_DEADLINE_S = 40 * 60.0
MADE_ALIKE = ("mid_training", "cold_start", "reward_model")
MIDDLES: dict[str, Callable[[Path], bool]] = {
    "mid_training": lambda runs: any(runs.glob("*/checkpoints/step-*/manifest.json")),
    "cold_start": lambda runs: any(runs.glob("*/checkpoints/step-*/manifest.json")),
    "reward_model": lambda runs: any(runs.glob("*/checkpoints/step-*/manifest.json")),
    "curation": lambda runs: any(len(file.read_bytes().splitlines()) >= 5 for file in runs.glob("*/rolled.jsonl")),
    "joint": lambda runs: any(runs.glob("*/checkpoints/step-*/manifest.json")),
    "evaluation": lambda runs: any(runs.glob("*/evaluation-*.json")),
}
"""Stage -> whether it has done something and not all, by its run folders."""


def overrides() -> list[str]:
    """Resume points close enough together that every stage has a middle; short stages where they are asked for."""
    every = json.dumps({"checkpoint_every": max(1, (STEPS or 40) // 4)})
    lines = [f"stages[{index}].settings.run={every}" for index in (0, 1, 2)]
    lines.append(f"stages[4].settings.run={json.dumps({'checkpoint_every': 1 if STEPS else 10})}")
    if STEPS:
        lines += [f"stages[{index}].settings.phases[0].steps={STEPS}" for index in (0, 1, 2)]
        # A judge of a few steps says nothing that can be read, and a policy of a few steps is seldom right.
        lines += [f"stages[{index}].settings.phases[0].lr=1.0e-4" for index in (0, 1)]
        judge, run = {"judge_model": {"path": "checkpoints/judge"}}, {"steps": 3, "checkpoint_every": 1}
        lines += [
            f"stages[3].settings.curation={json.dumps({'max_records': 40, 'keep': [1, 7]})}",
            f"stages[4].settings.rewards={json.dumps(judge)}",
            f"stages[4].settings.run={json.dumps(run)}",
            f"stages[4].settings.evaluation={json.dumps({'max_dialogues': 12})}",
            f"stages[5].settings.evaluation={json.dumps({'max_dialogues': 24})}",
        ]
    return lines


def launch(root: Path) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    file = QUICKSTART / "pipeline.yaml"
    command = [sys.executable, "-m", "rlaudio.cli.main", "train", str(file), f"run.root={root}", *overrides()]
    with (root / "log.txt").open("a") as log:
        return subprocess.Popen(
            command, cwd=root, env=environment, text=True, stdout=log, stderr=log, start_new_session=True
        )


def kill_in_the_middle(root: Path, stage: str) -> None:
    process, until = launch(root), time.monotonic() + STAGE_DEADLINE_S
    runs = root / "quickstart-pipeline-seed0" / "stages" / stage / "runs"
    while not MIDDLES[stage](runs):
        assert process.poll() is None, f"{stage}: {(root / 'log.txt').read_text()[-3000:]}"
        assert time.monotonic() < until, f"{stage} has no middle"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = json.loads((runs.parent / "stage.json").read_text())["outputs"]
    assert not done, f"{stage} was over before it was killed"


def test_killed_in_every_stage_it_ends_as_in_one_go(tmp_path: Path, record_property: Callable[..., None]) -> None:
    make_world()
    subprocess.run(
        [sys.executable, "-m", "spoken_world.stages", "--processes", "2"],
        cwd=QUICKSTART, check=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{QUICKSTART}"},
    )  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        root.mkdir()
    assert launch(whole).wait() == 0, (whole / "log.txt").read_text()[-3000:]
    for stage in MIDDLES:
        kill_in_the_middle(killed, stage)
    assert launch(killed).wait() == 0, (killed / "log.txt").read_text()[-3000:]
    for stage in MADE_ALIKE:
        one, other = (
            (root / "quickstart-pipeline-seed0" / "stages" / stage / "model" / "model.safetensors").read_bytes()
            for root in (whole, killed)
        )
        assert one == other, stage
    for stage in MIDDLES:
        runs = list((killed / "quickstart-pipeline-seed0" / "stages" / stage / "runs").glob("*/run.json"))
        assert len(runs) == 1, f"{stage} was begun again instead of gone on with"
    lines = json.loads((whole / "quickstart-pipeline-seed0" / "report.json").read_text())["stages"]
    record_property("table", "\n".join(f"{line['stage']:14} {line['level']:50} {line['gain']}" for line in lines))
