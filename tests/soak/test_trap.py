"""The trap experiment with three seeds, in cells of half an hour: one per seed and arm.

`make soak CELL=trap`, or `CELL="trap and seed1 and joint"`. A cell runs the pipeline up to its own stage: what an
earlier cell left is not made again, one that was cut off goes on. The last writes the report over all seeds and rows.
"""

import json
from datetime import date
from pathlib import Path

import pytest

from tests.soak.learning import ROOT, add_row, make_world, run_example

pytestmark = pytest.mark.soak

EXAMPLE = ROOT / "examples" / "verifiable_reward_trap"
SEEDS = (0, 1, 2)
STAGES = (
    "judge",
    "rlvr",
    "rlvr_brief",
    "rlhf",
    "joint",
    "staged_first",
    "staged",
    "warm_rlvr",
    "warm_brief",
    "evaluation",
)


def run(*arguments: str) -> str:
    return run_example(EXAMPLE, "trap_arms", *arguments)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("seed", SEEDS, ids=[f"seed{seed}" for seed in SEEDS])
def test_an_arm(seed: int, stage: str) -> None:
    make_world()
    run("--seed", str(seed), "--until", stage)


def test_the_report_over_seeds() -> None:
    page = Path(run("--seeds", str(len(SEEDS))).rstrip().splitlines()[-1].removeprefix("report: "))
    report = json.loads(page.with_name("report.json").read_text(encoding="utf-8"))
    assert report["seeds"] == list(SEEDS) and page.stat().st_size > 10_000

    def told(change: dict[str, float]) -> str:
        return f"{change['mean']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f})"

    for arm, changes in report["since_start"].items():
        add_row(
            ROOT / "bench" / "RESULTS.md",
            section="The trap experiment, three seeds (`make soak CELL=trap`)",
            about="Change since the start on 240 held-out dialogues, by a judge that trained none; 95 % t intervals "
            "over the seeds. Right: the other judge's liking of replies that are right on both sides.",
            columns=["date", "arm", "accuracy", "right", "courtesy", "words per reply", "different siblings"],
            row=[
                date.today().isoformat(),
                arm,
                *(
                    told(changes[name]) if name in changes else "-"
                    for name in ("accuracy", "preference_right", "warm", "words", "distinct")
                ),
            ],
        )
