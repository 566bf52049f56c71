"""The quickstart's pipeline: in one go, and killed with SIGKILL in the middle of every stage and started again.

`make soak CELL=pipeline`, in cells of at most half an hour: in one go, one per killed stage
(`CELL="pipeline and cold_start"`), and the comparison, which adds the rows. What a cell finished is kept below
`runs/soak/`; one that was cut off goes on. `SOAK_STEPS=n` shortens every stage to try the mechanics.

Supervised stages must come out bit for bit as in one go. Of played ones the figures stand side by side: what is
computed together depends on timing, and the last bits on that.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from rlaudio.runs import write_json_atomic
from tests.soak.learning import CELL_DEADLINE_S, QUICKSTART, ROOT, STEPS, add_row, make_world

pytestmark = pytest.mark.soak

KEPT = ROOT / "runs" / "soak" / (f"pipeline-{STEPS}-steps" if STEPS else "pipeline")
ROWS = KEPT / "RESULTS.md" if STEPS else ROOT / "bench" / "RESULTS.md"
WHOLE, KILLED = KEPT / "whole", KEPT / "killed"
NAME = "quickstart-pipeline-seed0"
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


@pytest.fixture(scope="module", autouse=True)
def data() -> None:
    make_world()
    subprocess.run(
        [sys.executable, "-m", "spoken_world.stages", "--processes", "2"],
        cwd=QUICKSTART, check=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{QUICKSTART}"},
    )  # fmt: skip
    for root in (WHOLE, KILLED):
        root.mkdir(parents=True, exist_ok=True)


def launch(root: Path) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    file = QUICKSTART / "pipeline.yaml"
    command = [sys.executable, "-m", "rlaudio.cli.main", "train", str(file), f"run.root={root}", *overrides()]
    with (root / "log.txt").open("a") as log:
        return subprocess.Popen(
            command, cwd=root, env=environment, text=True, stdout=log, stderr=log, start_new_session=True
        )


def ended(root: Path) -> dict[str, Any]:
    """Start the pipeline, or go on with it, to its end; what its report says."""
    process = launch(root)
    try:
        assert process.wait(CELL_DEADLINE_S) == 0, (root / "log.txt").read_text()[-3000:]
    finally:
        end(process)
    return dict(json.loads((root / NAME / "report.json").read_text()))


def end(process: "subprocess.Popen[str]") -> None:
    """SIGKILL to the driver and whatever shares its session; Ray's workers follow by themselves."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def forget_unless_done(root: Path, stage: str) -> None:
    """Leave nothing of a stage in which an earlier cell was cut off: it is to be made in one go."""
    folder = root / NAME / "stages" / stage
    if (folder / "stage.json").is_file() and not outputs(folder):
        shutil.rmtree(folder)


def outputs(folder: Path) -> dict[str, str]:
    return dict(json.loads((folder / "stage.json").read_text())["outputs"])


def killed_so_far() -> list[str]:
    path = KILLED / "killed.json"
    return list(json.loads(path.read_text())["stages"]) if path.is_file() else []


def kill_in_the_middle(stage: str) -> None:
    folder = KILLED / NAME / "stages" / stage
    shutil.rmtree(folder, ignore_errors=True)
    process, until = launch(KILLED), time.monotonic() + CELL_DEADLINE_S
    try:
        while not MIDDLES[stage](folder / "runs"):
            assert process.poll() is None, f"{stage}: {(KILLED / 'log.txt').read_text()[-3000:]}"
            assert time.monotonic() < until, f"{stage} has no middle"
            time.sleep(0.1)
    finally:
        end(process)
    assert not outputs(folder), f"{stage} was over before it was killed"
    write_json_atomic(KILLED / "killed.json", {"stages": [*killed_so_far(), stage]})


def test_in_one_go() -> None:
    for stage in MIDDLES:
        forget_unless_done(WHOLE, stage)
    ended(WHOLE)


@pytest.mark.parametrize("stage", MIDDLES)
def test_killed_in(stage: str) -> None:
    before = list(MIDDLES)[: list(MIDDLES).index(stage)]
    assert killed_so_far()[: len(before)] == before, f"run the cells of {', '.join(before)} first"
    if stage not in killed_so_far():
        kill_in_the_middle(stage)


def test_they_end_alike() -> None:
    assert killed_so_far() == list(MIDDLES), "run the cells before this one first"
    whole, killed = ended(WHOLE), ended(KILLED)
    for stage in MIDDLES:
        runs = list((KILLED / NAME / "stages" / stage / "runs").glob("*/run.json"))
        assert len(runs) == 1, f"{stage} was begun again instead of gone on with"
    for stage in MADE_ALIKE:
        one, other = (
            (root / NAME / "stages" / stage / "model" / "model.safetensors").read_bytes() for root in (WHOLE, KILLED)
        )
        assert one == other, stage
    for one, other in zip(whole["stages"], killed["stages"], strict=True):
        assert one["stage"] == other["stage"]
        add_row(
            ROWS,
            section="The pipeline, in one go and killed in every stage (`make soak CELL=pipeline`)",
            about="Held-out dialogues answered right (known, new voices) and the gain over the policy before, in "
            "points with 95 % bootstrap intervals; of stages that make no policy, their own figures. Supervised stages "
            "are equal bit for bit.",
            columns=["date", "stage", "in one go", "gain", "s", "killed and resumed", "gain", "s"],
            row=[
                date.today().isoformat(),
                one["stage"],
                *(value for line in (one, other) for value in (line["level"], line["gain"], f"{line['wall_s']:.0f}")),
            ],
        )
