"""What the experiment needs beside the quickstart's world: the other judge's lessons, two halves for the staged arm.

The evaluating judge learns from comparisons of seeds that the quickstart's judge never met, beginning from other random
weights; it reads the same closed world, because there is no other. What is there is left as it is.
"""

from __future__ import annotations

import json
from pathlib import Path

from spoken_world.attacking import JUDGE_VOCABULARY
from spoken_world.building import fresh
from spoken_world.heldout import pair_lines
from spoken_world.judging import JUDGE_PHASES, judge_pairs

from rlaudio.data.records import read_records, write_records
from rlaudio.rewards.preference_rows import content_key
from rlaudio.runs import write_text_atomic

JUDGE_SEED = 11
HELDOUT_SEED = 98
"""The quickstart's judge is measured on 99."""
NUM_HELDOUT = 300
NUM_PAIRS = {"items": 3900, "whole": 10300}
"""Comparisons per phase of `judge.yaml`; each is two rows, one per order, and every row is met about once."""


def make_data(out: Path, *, world: Path) -> None:
    """Make what is missing.

    Args:
        world: the folder with the quickstart's `train.jsonl`.
    """
    out.mkdir(parents=True, exist_ok=True)
    _make_comparisons(out)
    if not (out / "judge-init" / "config.json").is_file():
        fresh(out / "judge-init", words=JUDGE_VOCABULARY, seed=JUDGE_SEED)
    records = read_records(world / "train.jsonl")
    middle = len(records) // 2
    for name, half in (("first", records[:middle]), ("second", records[middle:])):
        write_records(out / f"train-{name}.jsonl", half)


def _make_comparisons(out: Path) -> None:
    mix = JUDGE_PHASES[-1]
    held = list(judge_pairs(seed=HELDOUT_SEED, num=NUM_HELDOUT, items=mix.items, plain=mix.plain, heldout=True))
    # The world keeps them apart in one order only; the recipe refuses a comparison that is learned the other way round.
    known = {content_key(pair.comparison) for pair in held}
    if not (out / "judge-heldout.jsonl").is_file():
        write_text_atomic(
            out / "judge-heldout.jsonl", "".join(json.dumps(line) + "\n" for line in pair_lines(iter(held)))
        )
    for number, (name, count) in enumerate(NUM_PAIRS.items()):
        path = out / f"judge-{name}.jsonl"
        if path.is_file():
            continue
        phase = JUDGE_PHASES[number]
        pairs = judge_pairs(seed=JUDGE_SEED + number, num=count, items=phase.items, plain=phase.plain)
        lines = pair_lines(pair for pair in pairs if content_key(pair.comparison) not in known)
        numbered = ({**line, "id": f"{name}-{index}"} for index, line in enumerate(lines))
        write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in numbered))
