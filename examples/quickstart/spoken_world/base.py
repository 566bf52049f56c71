"""Rebuild the checkpoints from nothing: `python -m spoken_world.base`, in the folder of the quickstart.

The world for supervised training; the policy from a random tiny checkpoint; the judge from another one, then again with
the words of attacks; the hearing judge, which begins as the policy. `--only PART` goes on where a rebuild ended; the
world that is there already is not made again.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from rlaudio.models.step_audio import StepAudio
from rlaudio.rewards.calibration import Calibration
from spoken_world.attacking import JUDGE_VOCABULARY
from spoken_world.building import fresh, run_recipe, served, widened, write_card
from spoken_world.hearing import build_hearing_judge
from spoken_world.heldout import write_heldout
from spoken_world.judging import ATTACKED_PHASES, JUDGE_PHASES, calibrate_judge, judge_phases
from spoken_world.make import WorldConfig, make_world
from spoken_world.vocabulary import WORDS

BASE_WORLD = WorldConfig(seed=7, train=0, heldout=0, heldout_voices=0, base=6000)
PLAIN_JUDGE = Path("build/judge-plain")
"""The judge before it met attacks."""
HELDOUT = Path("build/judge-heldout.jsonl")
"""As `judge.yaml` names it."""


def build_policy(*, seed: int) -> None:
    """Sounds, then the phases of `policy.yaml`."""
    make_world(Path("base_data"), BASE_WORLD, num_processes=2)
    fresh(Path("build/policy-init"), words=WORDS, seed=seed)
    run_recipe("policy.yaml", f"run.seed={seed}")
    write_card(
        Path("checkpoints/policy"),
        f"The tiny Step-Audio policy of the quickstart, seed {seed}: hears 16 kHz speech, reasons, replies.",
    )


def build_plain_judge(*, seed: int) -> None:
    """Comparisons with known verdicts, then the phases of `spoken_world.judging`: a judge of honest replies."""
    init = Path("build/judge-init")
    write_heldout(HELDOUT)
    fresh(init, words=WORDS, seed=seed)
    phases = judge_phases(Path("build/judge-rows"), family=StepAudio(init), seed=seed)
    run_recipe("judge.yaml", f"run.seed={seed}", f"model.path={init}", f"run.output={PLAIN_JUDGE}", phases=phases)


def build_judge(*, seed: int) -> None:
    """The plain judge learns the words of the attacks, and that what is hidden in a reply is part of the reply."""
    init = Path("build/judge-wide")
    write_heldout(HELDOUT)
    family = widened(init, narrow=PLAIN_JUDGE, words=JUDGE_VOCABULARY, seed=seed)
    first = seed + len(JUDGE_PHASES)
    phases = judge_phases(Path("build/judge-rows"), family=family, seed=first, phases=ATTACKED_PHASES)
    path = Path("checkpoints/judge")
    run_recipe("judge.yaml", f"run.seed={seed}", f"model.path={init}", f"run.output={path}", phases=phases)
    write_card(
        path,
        f"The tiny generative judge of the quickstart, seed {seed}: compares a reply with a reference reply.",
        measured=calibration_line(asyncio.run(_calibrated(path, seed=seed))),
        knows="It knows the closed vocabulary of the spoken world, the words of `rlaudio/rewards/attack_texts.py`, and "
        "nothing else.",
    )


async def _calibrated(path: Path, *, seed: int) -> Calibration:
    """Figures of the finished judge on comparisons it never learned from; about 12 s."""
    family = StepAudio(path)
    async with served(family, seed=seed) as engine:
        return await calibrate_judge(engine, family, num=300)


def calibration_line(figures: Calibration) -> str:
    """The judge's figures as its card says them."""
    return (
        f"{figures.num_pairs} held-out comparisons in both orders: right verdict of five {figures.accuracy:.0%}, right "
        f"sign {figures.sign_accuracy:.0%}, orders consistent {figures.consistency:.0%}, unreadable "
        f"{figures.failure_rate:.1%}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parts = {
        "policy": build_policy,
        "plain_judge": build_plain_judge,
        "judge": build_judge,
        "hearing_judge": build_hearing_judge,
    }
    parser.add_argument("--only", choices=tuple(parts), help="build one part; judge goes on from plain_judge")
    arguments = parser.parse_args()
    for name, build in parts.items():
        if arguments.only in (None, name):
            build(seed=arguments.seed)


if __name__ == "__main__":
    main()
