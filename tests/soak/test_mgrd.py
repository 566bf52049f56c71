"""MGRD with three seeds, in cells of at most half an hour: one per seed, and the table over them.

`make soak CELL=mgrd`, or `CELL="mgrd and seed1"`. A cell that was cut off goes on where it was.
"""

import json
from datetime import date
from pathlib import Path

import pytest

from tests.soak.learning import ROOT, add_row, make_world, run_example

pytestmark = pytest.mark.soak

EXAMPLE = ROOT / "examples" / "mgrd"
SEEDS = (0, 1, 2)


def run(*arguments: str) -> str:
    return run_example(EXAMPLE, "mgrd_study", *arguments)


@pytest.mark.parametrize("seed", SEEDS, ids=[f"seed{seed}" for seed in SEEDS])
def test_a_seed(seed: int) -> None:
    make_world()
    run("--seed", str(seed), "--until", "silence")


def test_the_table_over_seeds() -> None:
    page = Path(run("--seeds", str(len(SEEDS))).rstrip().splitlines()[-1].removeprefix("report: "))
    report = json.loads(page.with_name("report.json").read_text(encoding="utf-8"))
    assert report["seeds"] == list(SEEDS)

    def percent(change: dict[str, float]) -> str:
        return f"{100 * change['mean']:.1f} ({100 * change['low']:.1f} to {100 * change['high']:.1f})"

    for policy, levels in report["levels"]["all"].items():
        add_row(
            ROOT / "bench" / "RESULTS.md",
            section="MGRD, three seeds (`make soak CELL=mgrd`)",
            about="Shares of turns in % on 200 held-out dialogues on pitch and rate; 95 % t intervals over the seeds. "
            "Grounded: what the reasoning says of the sound is true of it as measured.",
            columns=["date", "policy", "grounded and right", "right", "grounded", "says something of the sound"],
            row=[
                date.today().isoformat(),
                policy,
                *(percent(levels[name]) for name in ("grounded_right", "right", "grounded", "says")),
            ],
        )
