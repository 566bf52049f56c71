"""Public sets that judges are measured on, from a local copy: RewardBench 2 and JudgeBench, scored as they define it.

A judge here compares two replies, one of which its prompt calls the reference. These sets know no reference, so a match
of two replies is asked twice with the texts exchanged in one and the same prompt: a liking for a place, and one for the
name, both cancel.

**RewardBench 2** (arXiv:2506.01937; rows `id, prompt, chosen[], rejected[], subset`): every other reply meets the first
chosen one, and the mean value of the match is its score (that one's is 0). Best of 4: right when no rejected reply
scores as high; among k equal best ones it counts 1/k. Subset "Ties": see `ties_score`. The whole is the subsets' mean.

**JudgeBench** (arXiv:2410.12784; rows `pair_id, source, question, response_A, response_B, label`): right when the two
verdicts together lean to the label: both say so, or one does and the other is a tie or unreadable. `strict` asks for
both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlaudio.errors import DataError
from rlaudio.evals.stats import Interval, mean_interval
from rlaudio.rewards.json_fields import Fields, read_objects
from rlaudio.rewards.levels import Scale
from rlaudio.rewards.prompt import Comparison, Said
from rlaudio.rewards.verdicts import Answer, Ask

TIES = "ties"
"""The subset of RewardBench 2 with several right replies, whatever its case."""

_JUDGE_BENCH_GROUPS = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}


@dataclass(frozen=True, slots=True)
class BestOf:
    """One prompt of RewardBench 2: replies, the first `num_correct` of them right."""

    id: str
    subset: str
    prompt: str
    replies: tuple[str, ...]
    num_correct: int


@dataclass(frozen=True, slots=True)
class Duel:
    """One pair of JudgeBench."""

    id: str
    source: str
    question: str
    reply_a: str
    reply_b: str
    a_is_better: bool

    @property
    def group(self) -> str:
        """The benchmark's own four, or the source where it is none of them."""
        found = (group for prefix, group in _JUDGE_BENCH_GROUPS.items() if self.source.startswith(prefix))
        return next(found, self.source)


@dataclass(frozen=True, slots=True)
class SubsetScore:
    """`interval` is None where the score is no mean over items."""

    num_items: int
    score: float
    interval: Interval | None = None


@dataclass(frozen=True, slots=True)
class SetFigures:
    """What a judge reached on a public set.

    Attributes:
        score: as the set defines it.
        subsets: by name.
        unreadable: share of verdicts that could not be read; they never win.
        others: further figures by name.
    """

    kind: str
    num_items: int
    score: float
    subsets: Mapping[str, SubsetScore]
    unreadable: float
    others: Mapping[str, float]

    def table(self) -> str:
        """One line per subset, ready to print."""
        lines = [f"{self.kind}, {self.num_items} items", f"{'score':<30}{self.score:.3f}"]
        for name, one in sorted(self.subsets.items()):
            beside = f"  [{one.interval.low:.3f}, {one.interval.high:.3f}]" if one.interval else ""
            lines.append(f"  {name[:27]:<28}{one.score:.3f}{beside}  ({one.num_items})")
        lines += [f"{name:<30}{value:.3f}" for name, value in self.others.items()]
        return "\n".join([*lines, f"{'unreadable':<30}{self.unreadable:.3f}"])

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "num_items": self.num_items,
            "score": self.score,
            "subsets": {
                name: {
                    "num_items": one.num_items,
                    "score": one.score,
                    "interval": [one.interval.low, one.interval.high] if one.interval else None,
                }
                for name, one in sorted(self.subsets.items())
            },
            "unreadable": self.unreadable,
            **self.others,
        }


def match(question: str, one: str, other: str) -> list[Ask]:
    """The two questions about two replies; see the module."""
    history = (Said("user", question),)
    return [
        Ask(Comparison(history, reference=one, response=other), response_first=False),
        Ask(Comparison(history, reference=other, response=one), response_first=False),
    ]


# ---- RewardBench 2 ------------------------------------------------------------------------------------------------


def read_reward_bench_2(path: str | Path) -> list[BestOf]:
    """Read a local copy (JSONL or Parquet). Raises DataError: names file, line or row, id, field, value and fix."""
    items = read_objects(path, _best_of, id_of=lambda item: f"{item.subset}/{item.id}")
    tied = [item for item in items if item.subset.lower() == TIES]
    if tied and not {_ties_number(item) for item in tied if _is_reference(item)} & {
        _ties_number(item) for item in tied if not _is_reference(item)
    }:
        raise DataError(
            f"{path}: no prompt of the subset Ties has both its 'ref:' and its 'tied:' record, and its score "
            "compares the two: copy the whole subset"
        )
    return items


def _best_of(value: object) -> BestOf:
    fields = Fields(value)
    chosen, rejected, subset = fields.texts("chosen"), fields.texts("rejected"), fields.text("subset")
    name = fields.get("id")
    if isinstance(name, int) and not isinstance(name, bool):
        name = str(name)  # some copies number their rows
    if not isinstance(name, str) or not name:
        raise fields.bad("id", "must be a non-empty string")
    if subset.lower() == TIES:
        kind, _, number = name.partition(":")
        if kind not in ("ref", "tied") or not number.isdigit():
            raise fields.bad("id", "in the subset Ties it is ref:NUMBER or tied:NUMBER")
    elif len(chosen) != 1:
        raise fields.bad("chosen", "outside the subset Ties there is exactly one right reply")
    if "num_correct" in fields and fields.get("num_correct") != len(chosen):
        raise fields.bad("num_correct", f"there are {len(chosen)} chosen replies: copy the row again")
    return BestOf(name, subset, fields.text("prompt"), (*chosen, *rejected), len(chosen))


def best_of_asks(item: BestOf) -> list[Ask]:
    """Every other reply against the first."""
    return [ask for other in item.replies[1:] for ask in match(item.prompt, item.replies[0], other)]


def reply_scores(answers: Sequence[Answer], *, scale: Scale) -> list[float] | None:
    """[replies] score of each from the answers to `best_of_asks`; None where a verdict could not be read."""
    scores = [0.0]
    for other, first in zip(answers[::2], answers[1::2], strict=True):
        if other.level is None or first.level is None:
            return None
        scores.append((scale.even_phi[other.level] - scale.even_phi[first.level]) / 2)
    return scores


def best_of_credit(scores: Sequence[float] | None) -> float:
    """1 where the first reply, the right one, is best alone; 1/k where it shares that with k - 1 others; else 0."""
    if scores is None or scores[0] < max(scores):
        return 0.0
    return 1.0 / sum(score == scores[0] for score in scores)


def ties_score(items: Sequence[BestOf], scores: Sequence[Sequence[float] | None]) -> float:
    """The subset Ties as RewardBench 2 defines it, about 0 to 1.

    0.3 x share of "tied" prompts (several right replies) whose worst right reply beats the best wrong one, 0.3 x the
    same of "ref" prompts (one right reply), 0.2 x share of prompts where right replies differ by less than right from
    wrong, 0.2 x the same with the smaller gap of the prompt and its "ref", and 0.01 x tanh(that gap / difference - 1).

    Args:
        items: of the subset.
        scores: of each one's replies; None counts as wrong in everything.
    """
    accurate: tuple[list[float], list[float]] = ([], [])
    spread: dict[str, float] = {}
    gap: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for item, found in zip(items, scores, strict=True):
        right, wrong = (found[: item.num_correct], found[item.num_correct :]) if found is not None else ((), ())
        between = min(right) - max(wrong) if found is not None else -math.inf
        is_reference, number = _is_reference(item), _ties_number(item)
        accurate[is_reference].append(float(between > 0))
        gap[is_reference][number] = between
        if not is_reference:
            spread[number] = max(right) - min(right) if found is not None else 0.0
    numbers = sorted(gap[False].keys() & gap[True].keys())
    if not numbers or not all(accurate):
        return math.nan
    differ = np.array([spread[number] for number in numbers])
    tied = np.array([gap[False][number] for number in numbers])
    smaller = np.minimum(tied, [gap[True][number] for number in numbers])
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = np.nan_to_num(np.tanh(smaller / differ - 1), nan=0.0)
    return float(
        0.3 * np.mean(accurate[False])
        + 0.3 * np.mean(accurate[True])
        + 0.2 * np.mean(tied > differ)
        + 0.2 * np.mean(smaller > differ)
        + 0.01 * np.mean(margin)
    )


def reward_bench_2_figures(
    items: Sequence[BestOf], answers: Sequence[Sequence[Answer]], *, scale: Scale, num_resamples: int = 2000
) -> SetFigures:
    """Figures from the answers to `best_of_asks` of each item."""
    scores = [reply_scores(some, scale=scale) for some in answers]
    subsets: dict[str, SubsetScore] = {}
    for subset in sorted({item.subset for item in items}):
        chosen = [index for index, item in enumerate(items) if item.subset == subset]
        if subset.lower() == TIES:
            value = ties_score([items[index] for index in chosen], [scores[index] for index in chosen])
            subsets[subset] = SubsetScore(len(chosen), value)
            continue
        credits = [best_of_credit(scores[index]) for index in chosen]
        interval = mean_interval(credits, num_resamples=num_resamples)
        subsets[subset] = SubsetScore(len(chosen), interval.mean, interval)
    whole = float(np.mean([one.score for one in subsets.values()]))
    return SetFigures("reward_bench_2", len(items), whole, subsets, _unreadable(answers), {})


def _is_reference(item: BestOf) -> bool:
    return item.id.startswith("ref:")


def _ties_number(item: BestOf) -> str:
    return item.id.partition(":")[2]


# ---- JudgeBench ---------------------------------------------------------------------------------------------------


def read_judge_bench(path: str | Path) -> list[Duel]:
    """Read a local copy (JSONL or Parquet). Raises DataError: names file, line or row, id, field, value and fix."""
    return read_objects(path, _duel, id_of=lambda item: item.id, id_field="pair_id")


def _duel(value: object) -> Duel:
    fields = Fields(value)
    label = fields.get("label")
    if label not in ("A>B", "B>A"):
        raise fields.bad("label", "must be 'A>B' or 'B>A'")
    return Duel(
        id=fields.text("pair_id"),
        source=fields.text("source"),
        question=fields.text("question"),
        reply_a=fields.text("response_A"),
        reply_b=fields.text("response_B"),
        a_is_better=label == "A>B",
    )


def duel_asks(item: Duel) -> list[Ask]:
    return match(item.question, item.reply_a, item.reply_b)


def judge_bench_figures(
    items: Sequence[Duel], answers: Sequence[Sequence[Answer]], *, scale: Scale, num_resamples: int = 2000
) -> SetFigures:
    """Figures from the answers to `duel_asks` of each item."""
    right, strict, consistent = [], [], []
    for item, (of_b, of_a) in zip(items, answers, strict=True):
        wanted = 1 if item.a_is_better else -1
        sides = [-_side(of_b, scale) * wanted, _side(of_a, scale) * wanted]
        right.append(float(sum(sides) > 0))
        strict.append(float(min(sides) > 0))
        consistent.append(float(sides[0] == sides[1] and of_a.level is not None and of_b.level is not None))
    groups: dict[str, list[float]] = {}
    for item, credit in zip(items, right, strict=True):
        groups.setdefault(item.group, []).append(credit)
    subsets = {}
    for name, credits in groups.items():
        interval = mean_interval(credits, num_resamples=num_resamples)
        subsets[name] = SubsetScore(len(credits), interval.mean, interval)
    others = {"strict": float(np.mean(strict)), "consistency": float(np.mean(consistent))}
    return SetFigures("judge_bench", len(items), float(np.mean(right)), subsets, _unreadable(answers), others)


def _side(answer: Answer, scale: Scale) -> float:
    """1 where the response of the question is better, -1 worse, 0 neither or unreadable."""
    return 0.0 if answer.level is None else float(np.sign(scale.even_phi[answer.level]))


def _unreadable(answers: Sequence[Sequence[Answer]]) -> float:
    return float(np.mean([answer.level is None for some in answers for answer in some]))
