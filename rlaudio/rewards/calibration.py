"""How good is a judge? Figures on held-out comparisons whose right verdict is known.

Read them together: a judge can be perfectly consistent between the orders while it ignores what is right.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlaudio.engines.base import Engine
from rlaudio.errors import JudgeError
from rlaudio.evals.stats import Interval, mean_interval
from rlaudio.models.base import ModelFamily
from rlaudio.rewards.asking import Asking, ServedModel
from rlaudio.rewards.levels import FIVE, Scale
from rlaudio.rewards.preferences import Labelled
from rlaudio.rewards.prompt import Comparison
from rlaudio.rewards.verdicts import Answer, Ask, verdicts_of


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """One comparison with known verdict, judged in both orders. Levels are the response's: 0 is much worse.

    Attributes:
        gold: the known level.
        as_second, as_first: the judge's level with the response as B and as A; None where its verdict was unreadable.
        extra_words: how many words the response is longer than the reference.
        exact: False where only the side of `gold` is known.
        axis: what kind of comparison it is, for figures of its own.
        unit: equal where comparisons are not independent (items of one record); empty: independent of all others.
    """

    gold: int
    as_second: int | None
    as_first: int | None
    extra_words: int
    exact: bool = True
    axis: str | None = None
    unit: str = ""

    @property
    def levels(self) -> tuple[int | None, int | None]:
        return self.as_second, self.as_first


@dataclass(frozen=True, slots=True)
class AxisFigures:
    """The figures of one axis; see `Calibration`."""

    num_pairs: int
    accuracy: float
    sign_accuracy: float
    consistency: float
    failure_rate: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Figures over comparisons; an unreadable verdict counts as wrong and as inconsistent. NaN: nothing to tell it by.

    Values of levels rise evenly from -1 to 1; the reward of a comparison is their mean over the two orders. Shares and
    means are first taken within a record, then over records.

    Attributes:
        num_pairs: comparisons, each judged in both orders.
        accuracy: share of verdicts at the known level, of the comparisons whose level is known.
        sign_accuracy: share of verdicts on the right side: worse, same, better.
        severe_accuracy: share of verdicts that are right about whether the response is much worse.
        consistency: share of comparisons whose two verdicts mirror each other.
        tie_rate: share of comparisons whose two verdicts cancel or are both "same".
        failure_rate: share of unreadable verdicts.
        length_correlation: of the reward with `extra_words`; a judge that pays for length is well above the next.
        gold_length_correlation: of the known level's value with `extra_words`.
        recall: known level -> share of its verdicts at that level, for the levels that occur.
        num_levels: of a verdict.
        reward_sign_accuracy: share of comparisons whose reward is on the right side.
        first_place: half the value by which a reply gains when it stands first; 0: the places do not matter. The reward
            is free of it, a verdict in one order is not.
        first_accuracy, second_accuracy: sign accuracy of the verdicts with the response first, and second.
        tie_longer: where the truth is "same" and the lengths differ: mean sign of the reward times that of
            `extra_words`; above 0 length is paid for.
        error_length_correlation: of reward minus known value with `extra_words`; the same where levels are known.
        intervals: figure -> its 95 % interval, whole units drawn again.
        axes: axis -> its figures.
    """

    num_pairs: int
    accuracy: float
    sign_accuracy: float
    severe_accuracy: float
    consistency: float
    tie_rate: float
    failure_rate: float
    length_correlation: float
    gold_length_correlation: float
    recall: dict[int, float]
    num_levels: int = FIVE.num_levels
    reward_sign_accuracy: float = math.nan
    first_place: float = math.nan
    first_accuracy: float = math.nan
    second_accuracy: float = math.nan
    tie_longer: float = math.nan
    error_length_correlation: float = math.nan
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    axes: Mapping[str, AxisFigures] = field(default_factory=dict)

    def table(self) -> str:
        """One figure per line, ready to print."""
        names = level_names(self.num_levels)
        rows = [
            ("comparisons", f"{self.num_pairs}"),
            (f"accuracy ({_NUMBERS[self.num_levels]} levels)", self._shown("accuracy")),
            ("sign accuracy", self._shown("sign_accuracy")),
            ("  of both orders together", self._shown("reward_sign_accuracy")),
            ("  of the response first", self._shown("first_accuracy")),
            ("  of the response second", self._shown("second_accuracy")),
            ("much worse or not", self._shown("severe_accuracy")),
            ("consistency of the orders", self._shown("consistency")),
            ("liking for the first place", self._shown("first_place", sign="+")),
            ("tie rate", self._shown("tie_rate")),
            ("unreadable", self._shown("failure_rate")),
            ("longer one of equals", self._shown("tie_longer", sign="+")),
            ("length correlation", f"{self.length_correlation:+.3f} (truth {self.gold_length_correlation:+.3f})"),
            ("error with length", f"{_number(self.error_length_correlation, '+')}"),
            *((f"  recall of {names[level]!r}", f"{share:.3f}") for level, share in sorted(self.recall.items())),
        ]
        lines = [f"{name:<30}{value}" for name, value in rows]
        if self.axes:
            lines.append(f"{'axis':<30}{'pairs':>6}{'accuracy':>10}{'sign':>8}{'consistent':>12}{'unreadable':>12}")
        lines += [
            f"{name[:29]:<30}{one.num_pairs:>6}{_number(one.accuracy):>10}{one.sign_accuracy:>8.3f}"
            f"{one.consistency:>12.3f}{one.failure_rate:>12.3f}"
            for name, one in sorted(self.axes.items())
        ]
        return "\n".join(lines)

    def _shown(self, name: str, *, sign: str = "") -> str:
        interval = self.intervals.get(name)
        beside = f"  [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]" if interval else ""
        return _number(getattr(self, name), sign) + beside

    def to_json(self) -> dict[str, Any]:
        """Every figure under its name; None for what nothing tells."""
        plain = ("intervals", "axes", "recall")
        figures = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in plain}
        return {
            **{name: _or_none(value) for name, value in figures.items()},
            "recall": {str(level): share for level, share in sorted(self.recall.items())},
            "intervals": {name: [one.low, one.high] for name, one in self.intervals.items()},
            "axes": {
                name: {key: _or_none(getattr(one, key)) for key in one.__dataclass_fields__}
                for name, one in sorted(self.axes.items())
            },
        }


_NUMBERS = ("", "", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def level_names(num_levels: int) -> tuple[str, ...]:
    """Words for people, from "much worse" to "much better"; more than two levels on a side are counted."""
    half = num_levels // 2
    strengths = {1: ("",), 2: ("", "much ")}.get(half) or tuple(f"{n + 1} of {half} " for n in range(half))
    worse = [f"{strength}worse" for strength in reversed(strengths)]
    return (*worse, *(("same",) if num_levels % 2 else ()), *(f"{strength}better" for strength in strengths))


def calibrate(pairs: Iterable[JudgedPair], *, scale: Scale = FIVE, num_resamples: int = 2000) -> Calibration:
    """Compute the figures.

    Args:
        scale: of the levels.
        num_resamples: for the intervals; 0 leaves them out.

    Raises:
        JudgeError: no pairs.
    """
    judged = list(pairs)
    if not judged:
        raise JudgeError("no judged comparisons to calibrate on: make some with known verdicts first")
    look = _Look(scale)
    per_pair: dict[str, list[float | None]] = {
        name: [measure(pair) for pair in judged] for name, measure in look.measures().items()
    }
    units = [pair.unit or f"\0{index}" for index, pair in enumerate(judged)]
    per_unit = {name: _unit_means(values, units) for name, values in per_pair.items()}
    whole = [(pair, reward) for pair in judged if (reward := look.reward(pair)) is not None]
    graded = [(pair, reward - look.value(pair.gold)) for pair, reward in whole if pair.exact]
    axes = sorted({pair.axis for pair in judged if pair.axis is not None})
    return Calibration(
        num_pairs=len(judged),
        length_correlation=_correlation([reward for _, reward in whole], [pair.extra_words for pair, _ in whole]),
        gold_length_correlation=_correlation(
            [look.value(pair.gold) for pair in judged], [pair.extra_words for pair in judged]
        ),
        error_length_correlation=_correlation([error for _, error in graded], [p.extra_words for p, _ in graded]),
        recall={
            gold: _mean([value for pair in judged if pair.exact and pair.gold == gold for value in look.exact(pair)])
            for gold in sorted({pair.gold for pair in judged if pair.exact})
        },
        num_levels=scale.num_levels,
        intervals={
            name: mean_interval(values, num_resamples=num_resamples)
            for name, values in per_unit.items()
            if num_resamples and values
        },
        axes={axis: _axis([pair for pair in judged if pair.axis == axis], scale) for axis in axes},
        **{name: _mean(values) for name, values in per_unit.items()},
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """What one judged pair gives to each figure; None: nothing."""

    scale: Scale

    def measures(self) -> dict[str, Callable[[JudgedPair], float | None]]:
        return {
            "accuracy": lambda pair: _mean(self.exact(pair)) if pair.exact else None,
            "sign_accuracy": lambda pair: _mean(self.sided(pair)),
            "severe_accuracy": self.severe,
            "consistency": lambda pair: float(pair.as_second is not None and pair.as_second == pair.as_first),
            "tie_rate": lambda pair: float(self.reward(pair) == 0),
            "failure_rate": lambda pair: _mean([float(level is None) for level in pair.levels]),
            "reward_sign_accuracy": self.reward_sided,
            "first_place": self.first_place,
            "first_accuracy": lambda pair: self.sided(pair)[1],
            "second_accuracy": lambda pair: self.sided(pair)[0],
            "tie_longer": self.tie_longer,
        }

    def value(self, level: int) -> float:
        return self.scale.even_phi[level]

    def reward(self, pair: JudgedPair) -> float | None:
        if pair.as_second is None or pair.as_first is None:
            return None
        return (self.value(pair.as_second) + self.value(pair.as_first)) / 2

    def exact(self, pair: JudgedPair) -> list[float]:
        return [float(level == pair.gold) for level in pair.levels]

    def sided(self, pair: JudgedPair) -> list[float]:
        gold = np.sign(self.value(pair.gold))
        return [float(level is not None and np.sign(self.value(level)) == gold) for level in pair.levels]

    def severe(self, pair: JudgedPair) -> float | None:
        if not pair.exact:
            return None
        return _mean([float(level is not None and (pair.gold == 0) == (level == 0)) for level in pair.levels])

    def reward_sided(self, pair: JudgedPair) -> float:
        reward = self.reward(pair)
        return float(reward is not None and np.sign(reward) == np.sign(self.value(pair.gold)))

    def first_place(self, pair: JudgedPair) -> float | None:
        if pair.as_second is None or pair.as_first is None:
            return None
        return (self.value(pair.as_first) - self.value(pair.as_second)) / 2

    def tie_longer(self, pair: JudgedPair) -> float | None:
        reward = self.reward(pair)
        if reward is None or pair.extra_words == 0 or self.value(pair.gold) != 0:
            return None
        return float(np.sign(reward) * np.sign(pair.extra_words))


def _axis(pairs: Sequence[JudgedPair], scale: Scale) -> AxisFigures:
    found = calibrate([replace(pair, axis=None) for pair in pairs], scale=scale, num_resamples=0)
    return AxisFigures(found.num_pairs, found.accuracy, found.sign_accuracy, found.consistency, found.failure_rate)


def _unit_means(values: Sequence[float | None], units: Sequence[str]) -> list[float]:
    """One value per unit that has any: every record weighs the same, however many rubric items it has."""
    found: dict[str, list[float]] = {}
    for value, unit in zip(values, units, strict=True):
        if value is not None:
            found.setdefault(unit, []).append(value)
    return [_mean(some) for some in found.values()]


def both_orders(labelled: Sequence[Labelled]) -> list[Ask]:
    """What a judge is asked for `judged_pairs`."""
    return [Ask(one.comparison, order) for one in labelled for order in (False, True)]


def judged_pairs(labelled: Sequence[Labelled], answers: Sequence[Answer]) -> list[JudgedPair]:
    """Labelled comparisons with the answers to `both_orders` of them."""
    return [
        JudgedPair(
            one.level,
            answers[2 * index].level,
            answers[2 * index + 1].level,
            extra_words(one.comparison),
            exact=one.exact,
            axis=one.axis,
            unit=one.record_id,
        )
        for index, one in enumerate(labelled)
    ]


async def judge_pairs_with(
    engine: Engine,
    family: ModelFamily,
    pairs: Sequence[tuple[Comparison, int]],
    *,
    max_new_tokens: int = 32,
    deadline_s: float = 120.0,
    scale: Scale = FIVE,
) -> list[JudgedPair]:
    """Ask a served judge about (comparison, known level) pairs, greedily, once per order.

    Raises:
        EngineError: the engine failed.
        JudgeError: an answer took longer than `deadline_s`.
    """
    model = ServedModel(engine, family, Asking("calibrate", scale=scale, max_new_tokens=max_new_tokens))
    labelled = [Labelled(str(index), str(index), *pair) for index, pair in enumerate(pairs)]
    return judged_pairs(labelled, await verdicts_of(model, both_orders(labelled), scale=scale, deadline_s=deadline_s))


def extra_words(comparison: Comparison) -> int:
    """How many words the response is longer than the reference."""
    return len(comparison.response.split()) - len(comparison.reference.split())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _number(value: float, sign: str = "") -> str:
    return "-" if math.isnan(value) else f"{value:{sign}.3f}"


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Pearson; 0 where one side does not vary."""
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])
