"""What the soak cells on learning share: one quickstart run as a user starts it, what is kept of it, how runs compare.

A result is kept as JSON and never made twice; to start afresh, delete its folder. `SOAK_STEPS=n` shortens the runs to
try the mechanics: results and rows then go to a folder of their own and mean nothing.
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from rlaudio.evals.stats import Interval, mean_interval
from rlaudio.evals.summary import read_evaluation
from rlaudio.runs import write_json_atomic

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
STEPS = int(os.environ.get("SOAK_STEPS", "0"))
"""0: as many as the quickstart takes."""

KEPT = ROOT / "runs" / "soak" / (f"staleness-{STEPS}-steps" if STEPS else "staleness")
ROWS = KEPT / "RESULTS.md" if STEPS else ROOT / "bench" / "RESULTS.md"
SEEDS = (0, 1, 2)
RUN_DEADLINE_S = 25 * 60.0
CELL_DEADLINE_S = 30 * 60.0

T_90 = {2: 6.314, 3: 2.920, 4: 2.353, 5: 2.132}
"""0.95 quantile of Student's t, by the number of values that the mean is of."""


@dataclass(frozen=True, slots=True)
class Run:
    """What is kept of one finished run; dialogues are those of all held-out sets, in order.

    Attributes:
        before, after: accuracy per dialogue.
        age_max: of all tokens trained on, in versions.
    """

    staleness: int
    seed: int
    steps: int
    date: str
    commit: str
    wall_s: float
    train_s: float
    dialogues: list[str]
    before: list[float]
    after: list[float]
    age_max: float

    @property
    def gain(self) -> float:
        return float(np.mean(self.after) - np.mean(self.before))


def path_of(staleness: int, seed: int) -> Path:
    return KEPT / f"staleness-{staleness}-seed-{seed}.json"


def kept(staleness: int, seed: int) -> Run | None:
    """The finished run, if there is one."""
    path = path_of(staleness, seed)
    return Run(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def make_world() -> None:
    """The world of `make world`; made once."""
    counts = ["--train", "600", "--heldout", "450", "--heldout-voices", "300", "--processes", "2"]
    command = [sys.executable, "-m", "spoken_world.make", "--out", "data", *counts]
    subprocess.run(command, cwd=QUICKSTART, check=True, timeout=600, stdout=subprocess.DEVNULL)


def finished(staleness: int, seed: int) -> Run:
    """The kept result, or the quickstart from start to report. Raises AssertionError with the output: it failed."""
    if (known := kept(staleness, seed)) is not None:
        return known
    root = KEPT / f"runs-staleness-{staleness}-seed-{seed}"
    settings = [f"algorithm.max_staleness={staleness}", f"run.seed={seed}", f"run.root={root}"]
    settings += [f"run.steps={STEPS}", "evaluation.max_dialogues=20"] if STEPS else []
    command = [sys.executable, "-m", "rlaudio.cli.main", "train", str(QUICKSTART / "config.yaml"), *settings]
    began_s = time.monotonic()
    ended = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=RUN_DEADLINE_S)
    assert ended.returncode == 0, ended.stdout
    folder = Path(ended.stdout.rstrip().splitlines()[-1].removeprefix("run: "))
    run = _read(folder, staleness=staleness, seed=seed, wall_s=time.monotonic() - began_s)
    write_json_atomic(path_of(staleness, seed), asdict(run))
    return run


def _read(folder: Path, *, staleness: int, seed: int, wall_s: float) -> Run:
    report = json.loads((folder / "report.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics" / "metrics.jsonl").read_text().splitlines()]
    ages = [line["age/max"] for line in lines if "age/max" in line]
    before, after = (_accuracies(folder, moment) for moment in ("before", f"after-step{len(ages):06d}"))
    assert before.keys() == after.keys()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False
    )
    return Run(
        staleness=staleness,
        seed=seed,
        steps=len(ages),
        date=date.today().isoformat(),
        commit=commit.stdout.strip() or "unknown",
        wall_s=round(wall_s, 1),
        train_s=round(report["timings_s"]["train"], 1),
        dialogues=list(before),
        before=list(before.values()),
        after=[after[name] for name in before],
        age_max=max(ages),
    )


def _accuracies(folder: Path, moment: str) -> dict[str, float]:
    results = [read_evaluation(folder / f"evaluation-{moment}-{name}.json") for name in ("heldout", "heldout_voices")]
    return {f"{result.name}/{one.prompt_id}": one.accuracy for result in results for one in result.dialogues}


# ---- comparing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """Accuracy after training, one staleness minus another, run against run of the same seed.

    Attributes:
        per_seed: mean over dialogues.
        over_seeds: 90 % t interval of their mean: inside a bound, two one-sided tests at 5 % find it there.
        over_dialogues: 95 % bootstrap of the seeds' mean per dialogue; it speaks of these very runs only.
    """

    per_seed: tuple[float, ...]
    over_seeds: Interval
    over_dialogues: Interval

    def verdict(self, bound: float) -> str:
        """ "equivalent", "different" (both beyond the noise of the seeds), or "inconclusive"."""
        low, high = self.over_seeds.low, self.over_seeds.high
        if -bound <= low and high <= bound:
            return "equivalent"
        return "different" if low > bound or high < -bound else "inconclusive"


def compare(runs: Sequence[Run], others: Sequence[Run]) -> Comparison:
    """`runs` minus `others`, which are of the same seeds and dialogues, in order."""
    for run, other in zip(runs, others, strict=True):
        assert (run.seed, run.dialogues, run.steps) == (other.seed, other.dialogues, other.steps), "not a pair"
    table = np.array([run.after for run in runs]) - np.array([other.after for other in others])  # [seeds, dialogues]
    per_seed = table.mean(axis=1)
    half = T_90[len(runs)] * float(per_seed.std(ddof=1)) / math.sqrt(len(runs))
    mean = float(per_seed.mean())
    return Comparison(
        tuple(per_seed.tolist()), Interval(mean, mean - half, mean + half), mean_interval(table.mean(axis=0))
    )


# ---- rows ---------------------------------------------------------------------------------------------------------


def run_example(folder: Path, module: str, *arguments: str) -> str:
    """`python -m MODULE` in an example's folder, within half an hour; what it printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(QUICKSTART)))}
    ended = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=CELL_DEADLINE_S, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-5000:]
    return ended.stdout


def add_row(path: Path, *, section: str, about: str, columns: Sequence[str], row: Sequence[Any]) -> None:
    """Append a row to the table of a section of a Markdown file; section and table are made when they are missing."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else ["# Measurements"]
    heading, new = f"## {section}", "| " + " | ".join(str(cell) for cell in row) + " |"
    if heading not in lines:
        lines += ["", heading, "", about, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    start = lines.index(heading)
    place = max(index for index in range(start, _end(lines, start)) if lines[index].startswith("|"))
    lines.insert(place + 1, new)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _end(lines: Sequence[str], start: int) -> int:
    following = (index for index in range(start + 1, len(lines)) if lines[index].startswith("## "))
    return next(following, len(lines))


def signed(value: float) -> str:
    return f"{value:+.3f}"


def interval(value: Interval) -> str:
    return f"{signed(value.low)} to {signed(value.high)}"
