"""The tiny judges at length: `make soak CELL=hearing_judge` and `CELL=attacks`.

The hearing judge is the one of the repository; with `SOAK_REMAKE=1` it is trained anew first (six minutes).
"""

import asyncio
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.soak.learning import QUICKSTART, ROOT, add_row

pytestmark = pytest.mark.soak

REMAKE = bool(os.environ.get("SOAK_REMAKE"))
KEPT = ROOT / "runs" / "soak" / ("hearing_judge-remade" if REMAKE else "hearing_judge")
RESULTS = ROOT / "bench" / "RESULTS.md"
MACHINE = f"{os.cpu_count()} cores, no GPU"
NUM_COMPARISONS = 100


def test_hearing_judge() -> None:
    """Measured as one command does it; finished figures are read, not made again."""
    file = KEPT / "figures.json"
    if made := not file.is_file():
        places = ["--work", str(KEPT / "work"), "--figures", str(file)]
        what = ["--output", str(KEPT / "hearing_judge")] if REMAKE else ["--measure"]
        subprocess.run(
            [sys.executable, "-m", "spoken_world.hearing", *what, *places], cwd=QUICKSTART, check=True, timeout=7200
        )
    found = {one["condition"]: one for one in json.loads(file.read_text(encoding="utf-8"))}
    if made:
        add_row(
            RESULTS,
            section="A judge that hears (`make soak CELL=hearing_judge`)",
            about="Held-out pairs: one sentence in two sounds, the same two replies, one fits each; sentences and "
            "voices that training had not. Share of fitting replies preferred, both orders, 95 % bootstrap over pairs. "
            "Silence is as long as another sound; with the length kept what is left is told by the length.",
            columns=["date", "machine", "judge", "pairs", *found],
            row=[
                date.today().isoformat(),
                MACHINE,
                "trained anew" if REMAKE else "of the repository",
                found["heard"]["num_pairs"],
                *map(_share, found.values()),
            ],
        )
    assert found["heard"]["num_pairs"] >= 200
    assert found["heard"]["accuracy"]["low"] > 0.5
    for deaf in ("silenced", "transcript"):
        assert found[deaf]["accuracy"]["low"] <= 0.5 <= found[deaf]["accuracy"]["high"], found[deaf]


def _share(one: dict[str, Any]) -> str:
    accuracy = one["accuracy"]
    return f"{accuracy['mean']:.3f} ({accuracy['low']:.3f} to {accuracy['high']:.3f})"


@pytest.mark.filterwarnings("ignore")  # vLLM is built in this process
def test_attacks() -> None:
    """Every readable attack on the quickstart's judge, on four times as many comparisons as in the daily test."""
    sys.path.insert(0, str(QUICKSTART))
    from spoken_world.attack_suite import MAX_MODEL_LEN, SuiteOutcome, run_suite
    from spoken_world.building import served

    from rlaudio.models.step_audio import StepAudio

    async def outcome() -> SuiteOutcome:
        family = StepAudio(Path(QUICKSTART / "checkpoints" / "judge"))
        async with served(family, max_model_len=MAX_MODEL_LEN) as engine:
            return await run_suite(engine, family, num=NUM_COMPARISONS)

    found = asyncio.run(outcome())
    print(found.table())
    sets = (found.every, found.learned, found.heldout)
    add_row(
        RESULTS,
        section="Attacks on the tiny judge (`make soak CELL=attacks`)",
        about="Held-out comparisons, each without and with every attack that the judge can read; share of replies that "
        "beat the reference, and the paired difference with its 95 % bootstrap over comparisons.",
        columns=[
            "date",
            "attacks",
            "comparisons",
            "wins without",
            "every attack",
            "kinds in training",
            "kinds held out",
        ],
        row=[
            date.today().isoformat(),
            len(found.attacks),
            NUM_COMPARISONS,
            f"{found.every.wins_without:.3f}",
            *(
                f"{one.wins_with:.3f}, {one.wins.mean:+.3f} ({one.wins.low:+.3f} to {one.wins.high:+.3f})"
                for one in sets
            ),
        ],
    )
    assert not found.paying, found.table()
