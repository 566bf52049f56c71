"""Verified reward alone against the joint reward: the quickstart twice, from one start, on the same data and seed.

`make soak CELL=sources`: under half an hour on two idle cores, hours on crowded ones. What is read is MLflow's store,
as a person would. A run that is finished is kept in `runs/soak/sources` and not made again; `SOAK_STEPS=n` shortens
them to try the mechanics.
"""

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaudio.evals.summary import read_evaluation
from rlaudio.runs import write_json_atomic
from tests.soak.learning import QUICKSTART, ROOT, STEPS, add_row, make_world

pytestmark = pytest.mark.soak

KEPT = ROOT / "runs" / "soak" / (f"sources-{STEPS}-steps" if STEPS else "sources")
ROWS = KEPT / "RESULTS.md" if STEPS else ROOT / "bench" / "RESULTS.md"
RUN_DEADLINE_S = 3 * 3600.0
WEIGHTS = {"verifier only": 0.0, "joint": 0.2}
"""Of the judge. At 0 it is measured and moves nothing."""

CURVES = ("reward/verified", "reward/judge", "share/verified", "share/judge", "correct", "style/words", "style/warm")


@dataclass(frozen=True, slots=True)
class Run:
    """What is kept of one.

    Attributes:
        curves: of MLflow's store: name -> values by step.
        before: record -> reply texts of the evaluation before training.
        held_out: set -> source or "accuracy" -> before, after.
    """

    steps: int
    config: dict[str, Any]
    curves: dict[str, list[float]]
    before: dict[str, list[str]]
    held_out: dict[str, dict[str, list[float]]]
    trap: dict[str, Any]
    train_s: float


def finished(name: str) -> Run:
    """The kept result, or the quickstart from start to report."""
    kept = KEPT / f"{name.replace(' ', '-')}.json"
    if kept.is_file():
        return Run(**json.loads(kept.read_text(encoding="utf-8")))
    root = KEPT / f"runs-{name.replace(' ', '-')}"
    settings = [f"run.root={root}", f"rewards.sources[1].weight={WEIGHTS[name]}", "evaluation.voice=''"]
    settings += [f"run.steps={STEPS}", "evaluation.max_dialogues=10"] if STEPS else ["evaluation.max_dialogues=200"]
    command = [sys.executable, "-m", "rlaudio.cli.main", "train", str(QUICKSTART / "config.yaml"), *settings]
    ended = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=RUN_DEADLINE_S)
    assert ended.returncode == 0, ended.stdout
    folder = Path(ended.stdout.rstrip().splitlines()[-1].removeprefix("run: "))
    run = _read(folder, root / "mlflow.db")
    write_json_atomic(kept, asdict(run))
    return run


def _read(folder: Path, store: Path) -> Run:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    named = folder / "mlflow_run.json"
    assert named.is_file(), "MLflow was not ready before the run ended: the machine is too busy, or steps are too few"
    run_id = json.loads(named.read_text(encoding="utf-8"))["run_id"]
    curves: dict[str, list[float]] = {}
    with contextlib.closing(sqlite3.connect(store)) as database:
        query = "select key, value from metrics where run_uuid = ? order by key, step"
        for key, value in database.execute(query, (run_id,)):
            curves.setdefault(key, []).append(value)
    sets = [name for name in ("heldout", "heldout_voices") if name in report]
    before = [read_evaluation(folder / f"evaluation-before-{name}.json") for name in sets]
    return Run(
        steps=len(curves["loss"]),
        config=yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")),
        curves={name: values for name, values in curves.items() if "/" in name or name in CURVES},
        before={f"{r.name}/{d.prompt_id}": [turn.reply for turn in d.turns] for r in before for d in r.dialogues},
        held_out={
            name: {
                "accuracy": [report[name][side]["accuracy"]["all"] for side in ("before", "after")],
                **{s: [found["before"], found["after"]] for s, found in report[name]["sources"].items()},
            }
            for name in sets
        },
        trap=report["trap"],
        train_s=report["timings_s"]["train"],
    )


@pytest.fixture(scope="module")
def runs() -> dict[str, Run]:
    make_world()
    new = not all((KEPT / f"{name.replace(' ', '-')}.json").is_file() for name in WEIGHTS)
    found = {name: finished(name) for name in WEIGHTS}
    if new:
        _add_rows(found)
    return found


def _add_rows(runs: dict[str, Run]) -> None:
    for name, run in runs.items():
        add_row(
            ROWS,
            section="Verified reward alone against the joint reward (`make soak CELL=sources`)",
            about="The quickstart, one seed, the judge at weight 0 (measured only) or 0.2. Training: means over the "
            "first and the last 10 steps. Held-out: the first 200 dialogues of each set. One run each: nothing is "
            "claimed of their difference.",
            columns=[
                *("date", "sources", "steps", "verified in training", "judge in training", "share of the judge"),
                *("held-out accuracy", "held-out judge", "trap alert", "minutes of training"),
            ],
            row=[
                date.today().isoformat(),
                name,
                run.steps,
                _ends(run.curves["reward/verified"]),
                _ends(run.curves["reward/judge"]),
                f"{_mean(run.curves['share/judge']):.3f}",
                " / ".join(_change(values["accuracy"]) for values in run.held_out.values()),
                " / ".join(_change(values["judge"]) for values in run.held_out.values()),
                run.trap["training"]["alert"] or "none",
                f"{run.train_s / 60:.1f}",
            ],
        )


def _ends(values: Sequence[float]) -> str:
    return _change([_mean(values[:10]), _mean(values[-10:])])


def _change(values: Sequence[float]) -> str:
    return f"{values[0]:.3f} to {values[1]:.3f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("name", WEIGHTS)
def test_sources_have_curves_of_their_own_in_mlflow(runs: dict[str, Run], name: str) -> None:
    run = runs[name]
    for curve in CURVES:
        assert len(run.curves[curve]) == run.steps, curve
    assert run.curves["reward/verified"] != run.curves["reward/judge"]
    assert {"detail/verified/correct", "detail/judge/consistent", "detail/judge/as_first"} <= set(run.curves)
    assert all({"verified", "judge"} <= set(values) for values in run.held_out.values())


def test_sources_start_alike_and_only_the_joint_run_is_moved_by_the_judge(runs: dict[str, Run]) -> None:
    alone, joint = runs["verifier only"], runs["joint"]
    settings = [json.loads(json.dumps(run.config)) for run in (alone, joint)]
    for one in settings:
        del one["run"]["root"], one["rewards"]["sources"][1]["weight"]
    assert settings[0] == settings[1], "they differ in more than the judge's weight"
    assert alone.before.keys() == joint.before.keys() and alone.steps == joint.steps
    same = sum(alone.before[name] == joint.before[name] for name in alone.before)
    assert same >= 0.95 * len(alone.before), "greedy replies of one start"
    assert set(alone.curves["share/judge"]) == {0.0}
    assert _mean(joint.curves["share/judge"]) > 0.0
    assert alone.curves["reward/verified"] != joint.curves["reward/verified"]
