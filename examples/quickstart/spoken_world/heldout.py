"""The judge's held-out comparisons as a preference file, which the recipe keeps apart and reports on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rlaudio.runs import write_text_atomic
from spoken_world.judging import JUDGE_PHASES, JudgePair, judge_pairs


def write_heldout(path: Path, *, seed: int = 99, num: int = 300) -> None:
    """The comparisons of `judging.calibrate_judge`."""
    pairs = heldout_pairs(seed=seed, num=num)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "".join(json.dumps(line) + "\n" for line in pair_lines(pairs)))


def heldout_pairs(*, seed: int = 99, num: int = 300) -> Iterator[JudgePair]:
    """Mixed as in the judge's last phase."""
    phase = JUDGE_PHASES[-1]
    return judge_pairs(seed=seed, num=num, items=phase.items, plain=phase.plain, heldout=True)


def pair_lines(pairs: Iterator[JudgePair]) -> Iterator[dict[str, object]]:
    """Lines of a preference file, as the reward-model recipe reads them."""
    for number, pair in enumerate(pairs):
        shown = pair.comparison
        items = shown.criterion.split("\n") if shown.criterion else []
        yield {
            "id": f"heldout-{number}",
            "axis": ("no rule", "one rule", "whole rubric")[min(len(items), 2)],
            "messages": [{"role": said.role, "content": [{"text": said.text}]} for said in shown.history],
            "reference": shown.reference,
            "response": shown.response,
            "level": pair.level,
            "reasoning": {"as_given": pair.rationale[0], "swapped": pair.rationale[1]},
            **({"rubric": [{"text": text} for text in items]} if items else {}),
        }
