"""Figures of a judge: any number of levels, planted faults show, and swapping takes a liking for a place out."""

import json
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest

from rlaudio.errors import VerdictError
from rlaudio.rewards.asking import Question
from rlaudio.rewards.calibration import (
    Calibration,
    JudgedPair,
    both_orders,
    calibrate,
    judged_pairs,
    level_names,
)
from rlaudio.rewards.levels import FIVE, Scale
from rlaudio.rewards.preferences import Labelled
from rlaudio.rewards.prompt import Comparison, Said
from rlaudio.rewards.verdicts import Answer, verdicts_of


@dataclass(frozen=True)
class PlantedJudge:
    """Says `says(level that is true, response_first)` of the response, or nothing readable at None."""

    gold: dict[Comparison, int]
    says: Callable[[Comparison, int, bool], int | None]
    scale: Scale = FIVE

    def question(self, comparison: Comparison, *, response_first: bool) -> Question:
        async def ask(attempt: int) -> int:
            level = self.says(comparison, self.gold[comparison], response_first)
            if level is None:
                raise VerdictError("nothing to read", kind="truncated")
            level = min(max(level, 0), self.scale.num_levels - 1)
            return self.scale.level(level, response_first=response_first)

        asked: Callable[[int], Awaitable[int]] = ask
        return Question(repr((comparison, response_first)).encode(), asked)


def labelled(levels: Sequence[int], *, words: Sequence[int] | None = None, axis: str | None = None) -> list[Labelled]:
    """One comparison per level, with replies of so many words more than the reference's four."""
    return [
        Labelled(
            str(number),
            str(number),
            Comparison((Said("user", f"say {number}"),), "a b c d", "x " * (4 + (words[number] if words else 0))),
            level,
            axis=axis,
        )
        for number, level in enumerate(levels)
    ]


async def measured(
    known: Sequence[Labelled], says: Callable[[Comparison, int, bool], int | None], *, scale: Scale = FIVE
) -> Calibration:
    judge = PlantedJudge({one.comparison: one.level for one in known}, says, scale)
    answers = await verdicts_of(judge, both_orders(known), scale=scale)
    return calibrate(judged_pairs(known, answers), scale=scale, num_resamples=200)


# ---- any number of levels -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", range(2, 10))
async def test_a_perfect_and_a_mirrored_judge_on_every_scale(levels: int) -> None:
    scale = Scale(levels)
    known = labelled([number % levels for number in range(4 * levels)])
    right = await measured(known, lambda _, gold, first: gold, scale=scale)
    assert (right.accuracy, right.sign_accuracy, right.reward_sign_accuracy, right.consistency) == (1, 1, 1, 1)
    assert (right.first_place, right.failure_rate, right.severe_accuracy) == (0, 0, 1)
    assert set(right.recall.values()) == {1.0} and len(right.recall) == levels
    wrong = await measured(known, lambda _, gold, first: levels - 1 - gold, scale=scale)
    assert wrong.sign_accuracy == wrong.reward_sign_accuracy == (levels % 2) / levels
    assert wrong.consistency == 1


@pytest.mark.parametrize("levels", range(2, 10))
def test_the_table_and_the_json_speak_of_every_level(levels: int) -> None:
    names = level_names(levels)
    assert len(set(names)) == levels
    scale = Scale(levels)
    found = calibrate([JudgedPair(level, level, level, 1, axis="x") for level in range(levels)], scale=scale)
    table = found.table()
    assert all(f"recall of {name!r}" in table for name in names)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["num_levels"] == levels


def test_five_levels_keep_their_names() -> None:
    assert level_names(5) == ("much worse", "worse", "same", "better", "much better")


# ---- a liking for a place -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", range(2, 10))
@pytest.mark.parametrize("strength", [1, 2, 3])
async def test_swapping_takes_a_planted_liking_for_the_first_place_out(levels: int, strength: int) -> None:
    """A judge that lifts whatever stands first by so many levels, as far as the scale goes."""
    scale = Scale(levels)
    known = labelled(range(levels))
    judge = PlantedJudge(
        {one.comparison: one.level for one in known},
        lambda _, gold, first: gold + (strength if first else -strength),
        scale,
    )
    pairs = judged_pairs(known, await verdicts_of(judge, both_orders(known), scale=scale))
    value = scale.even_phi
    rewards = [(value[pair.as_first or 0] + value[pair.as_second or 0]) / 2 for pair in pairs]
    # Unbiased: a reply's reward and that of the same reply as the reference are opposites, so ties earn nothing and
    # nothing is ever on the wrong side. One order alone is off in one direction, at every level.
    assert rewards == pytest.approx([-reward for reward in reversed(rewards)])
    assert all(reward * value[gold] >= 0 for gold, reward in enumerate(rewards))
    assert sum(value[pair.as_first or 0] for pair in pairs) > 0 > sum(value[pair.as_second or 0] for pair in pairs)
    found = calibrate(pairs, scale=scale, num_resamples=0)
    assert found.first_place > 0 and found.consistency < 1


async def test_the_reward_of_two_orders_is_unbiased_where_that_of_one_is_not() -> None:
    """The planted-bias figures: with the truth "same", one order says the response wins or loses by its place alone."""
    ties = labelled([2] * 100)
    liking = await measured(ties, lambda _, gold, first: gold + (1 if first else -1))
    assert (liking.first_accuracy, liking.second_accuracy, liking.reward_sign_accuracy) == (0, 0, 1)
    assert liking.first_place == 0.5 and liking.tie_rate == 1
    mixed = labelled([number % 5 for number in range(500)])
    rng = random.Random(0)
    noisy = await measured(mixed, lambda _, gold, first: gold + (1 if first else -1) * (rng.random() < 0.5))
    assert noisy.intervals["first_place"].low > 0.1
    assert noisy.intervals["reward_sign_accuracy"].low > noisy.intervals["first_accuracy"].high


# ---- length -------------------------------------------------------------------------------------------------------


async def test_a_planted_liking_for_length_shows_and_an_honest_judge_has_none() -> None:
    words = [(number * 7) % 9 - 4 for number in range(180)]
    known = labelled([number % 5 for number in range(180)], words=words)

    def likes_length(comparison: Comparison, gold: int, first: bool) -> int:
        extra = len(comparison.response.split()) - len(comparison.reference.split())
        return gold + (extra > 1) - (extra < -1)

    liking = await measured(known, likes_length)
    honest = await measured(known, lambda _, gold, first: gold)
    assert liking.tie_longer > 0.5 and liking.intervals["tie_longer"].low > 0
    assert liking.error_length_correlation > 0.5
    assert honest.tie_longer == 0 == honest.error_length_correlation
    assert honest.length_correlation == pytest.approx(honest.gold_length_correlation)


# ---- what cannot be read, what is not known -----------------------------------------------------------------------


async def test_unreadable_verdicts_are_wrong_and_counted() -> None:
    found = await measured(labelled([0, 4, 2, 1]), lambda _, gold, first: None if first else gold)
    assert (found.accuracy, found.failure_rate, found.consistency) == (0.5, 0.5, 0)
    assert math.isnan(found.first_place) and found.to_json()["first_place"] is None
    assert "liking for the first place    -" in found.table()


async def test_the_kind_of_what_could_not_be_read_is_kept() -> None:
    known = labelled([0])
    judge = PlantedJudge({known[0].comparison: 0}, lambda *_: None)
    assert await verdicts_of(judge, both_orders(known), scale=FIVE) == [Answer(None, "truncated")] * 2


def test_where_only_the_side_is_known_levels_are_not_judged() -> None:
    sided = [JudgedPair(3, 4, 4, 0, exact=False), JudgedPair(3, 3, 1, 0, exact=False)]
    found = calibrate(sided)
    assert found.sign_accuracy == 0.75
    assert math.isnan(found.accuracy) and math.isnan(found.severe_accuracy) and found.recall == {}
    both = calibrate([*sided, JudgedPair(0, 0, 1, 0)])
    assert both.accuracy == 0.5


# ---- records and axes ---------------------------------------------------------------------------------------------


def test_a_record_with_many_items_weighs_as_much_as_one_with_one() -> None:
    many = [JudgedPair(0, 0, 0, 0, unit="many")] * 9
    found = calibrate([*many, JudgedPair(0, 4, 4, 0, unit="one")])
    assert found.accuracy == 0.5
    assert found.intervals["accuracy"].low == 0 and found.intervals["accuracy"].high == 1


def test_axes_have_figures_of_their_own() -> None:
    found = calibrate([JudgedPair(0, 0, 0, 0, axis="warm"), JudgedPair(0, 4, None, 0, axis="cold")])
    assert found.axes["warm"].accuracy == 1 and found.axes["cold"].accuracy == 0
    assert found.axes["cold"].failure_rate == 0.5 and found.axes["warm"].num_pairs == 1
    assert "cold" in found.table()
