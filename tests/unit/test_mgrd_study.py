"""The MGRD example: its demonstrations are what the README says, and its table counts only what is right and heard."""

import dataclasses
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from rlaudio.errors import DataError
from rlaudio.evals.stats import MAX_SEEDS, seeds_interval
from rlaudio.evals.summary import EvaluationResult, RewardPart, TurnResult
from rlaudio.recipes.pipeline import read_pipeline
from rlaudio.types import Message, PromptRecord, TextPart
from tests.conftest import ROOT
from tests.unit.evaluations import dialogue, evaluation, turn

EXAMPLE = ROOT / "examples" / "mgrd"
sys.path[:0] = [str(EXAMPLE), str(ROOT / "examples" / "quickstart")]

from mgrd_study import experiment  # noqa: E402
from mgrd_study.data import WAYS, demonstrated  # noqa: E402
from mgrd_study.measures import CONTRASTS, MEASURES, POLICIES, Change, difference, level, measure  # noqa: E402


def shown(number: int) -> PromptRecord:
    asked = Message("user", (TextPart("is my voice high or low"),), answer="high")
    gold = Message("assistant", (TextPart("sure it is high"),), thinking="the voice sounds high")
    return PromptRecord(f"r{number}", "pitch", (asked, gold) * 3)


def test_demonstrations_reason_in_the_stated_shares_and_are_as_often_right_with_and_without_hearing() -> None:
    kinds: Counter[tuple[bool, bool]] = Counter()
    for number in range(1000):
        for message in demonstrated(shown(number)).messages:
            if message.role == "assistant":
                speaks = (message.thinking or "").startswith("the voice sounds")
                assert speaks or (message.thinking or "").startswith("heard is my voice high or low . the answer is")
                kinds[speaks, message.text == "sure it is high"] += 1
                assert message.text in ("sure it is high", "sure it is low")
    assert sum(way.share for way in WAYS) == pytest.approx(1)
    for speaks in (True, False):
        assert (kinds[speaks, True] + kinds[speaks, False]) / 3000 == pytest.approx(0.5, abs=0.04)
        assert kinds[speaks, True] / (kinds[speaks, True] + kinds[speaks, False]) == pytest.approx(0.84, abs=0.04)
    assert demonstrated(shown(1)) == demonstrated(shown(1))


def answered(number: int, *, correct: bool, said: int, true: int, parsable: bool = True) -> TurnResult:
    part = RewardPart("measured", float(0 < said == true), 1.0, {"said": float(said), "true": float(true)})
    return turn(number, correct=correct, parsable=parsable, breakdown=(part,))


def of(*turns: TurnResult, asked: int | None = None, name: str = "p") -> EvaluationResult:
    return evaluation("after", dialogue(name, *turns, task="pitch", asked=asked))


@pytest.mark.parametrize(
    ("given", "counted"),
    [
        (answered(0, correct=True, said=1, true=1), {"grounded_right", "right", "grounded", "says"}),
        (answered(0, correct=False, said=1, true=1), {"grounded", "says"}),
        (answered(0, correct=True, said=1, true=0), {"right", "says"}),
        (answered(0, correct=True, said=2, true=1), {"right", "says"}),
        (answered(0, correct=True, said=0, true=0), {"right", "right_by_words"}),
        (answered(0, correct=True, said=1, true=1, parsable=False), {"says"}),
    ],
)
def test_only_right_answers_with_true_words_on_the_sound_are_grounded_and_right(
    given: TurnResult, counted: set[str]
) -> None:
    found = measure([of(given)])
    assert {name for name, values in found.items() if values["p"] == 1.0} == counted
    assert {name for name, values in measure([of(given, asked=2)]).items() if values["p"] == 0.5} == counted, (
        "a turn that was not played counts as nothing"
    )


def test_what_was_not_measured_and_what_comes_twice_is_refused() -> None:
    with pytest.raises(DataError, match="turn 0: source 'measured' said nothing"):
        measure([of(turn(0))])
    good = of(answered(0, correct=True, said=1, true=1))
    with pytest.raises(DataError, match="'p' is in two sets"):
        measure([good, good])
    with pytest.raises(DataError, match="other questions, such as 'p'"):
        difference([{"p": 1.0}], [{"q": 1.0}])
    with pytest.raises(DataError, match="no dialogue"):
        level([{}])


def test_one_seed_speaks_of_dialogues_and_several_of_seeds() -> None:
    alone = level([{"p": 0.0, "q": 1.0}])
    assert (alone.num_seeds, alone.num_dialogues, alone.mean) == (1, 2, 0.5)
    over = difference([{"p": 0.0}] * 3, [{"p": value} for value in (0.1, 0.2, 0.3)])
    half = 4.303 * 0.1 / 3**0.5  # t(0.975, 2) * deviation / sqrt(n)
    assert (over.mean, over.low, over.high) == tuple(pytest.approx(0.2 + d) for d in (0, -half, half))
    with pytest.raises(ValueError, match=f"2 to {MAX_SEEDS} seeds"):
        seeds_interval(np.zeros(1))
    with pytest.raises(ValueError, match="value 1 of 2"):
        seeds_interval([0.0, np.nan])


UP, DOWN, FLAT = (Change(mean, mean - 0.1, mean + 0.1, 9, 3) for mean in (0.2, -0.2, 0.01))


def results(change: Change, against: Change = FLAT) -> experiment.Results:
    flat = dict.fromkeys(MEASURES, FLAT)
    contrasts = {pair: dict(flat) for pair in CONTRASTS}
    contrasts["start", "mgrd_2"]["grounded_right"] = change
    contrasts["rl_only", "mgrd_2"]["grounded_right"] = against
    levels = {"all": dict.fromkeys(POLICIES, flat)}
    return experiment.Results((0, 1, 2), levels, {"all": contrasts}, {"mgrd_2": FLAT}, flat, {"s": {"kept": 1}})


@pytest.mark.parametrize(("change", "outcome"), [(UP, "shown"), (DOWN, "not shown"), (FLAT, "undecided")])
def test_the_verdict_follows_its_interval_alone(change: Change, outcome: str) -> None:
    assert experiment.verdict(results(change))[0] == outcome
    assert "more than reinforcement learning alone" in experiment.verdict(results(change, UP))[1]
    assert "less than" in experiment.verdict(results(change, DOWN))[1]
    assert "not clearly otherwise" in experiment.verdict(results(change))[1]
    assert "| all | mgrd_2 |" in experiment.tables(results(change))


def test_the_control_takes_as_many_steps_and_nobody_learns_what_is_held_out() -> None:
    stages = {one.name: one for one in read_pipeline(str(EXAMPLE / "pipeline.yaml"), ["run.seed=2"]).stages}
    loaded = {name: stage.load() for name, stage in stages.items()}
    rl = [dataclasses.asdict(loaded[name]) for name in ("rl_1", "rl_2", "rl_only")]
    assert rl[0]["run"]["steps"] + rl[1]["run"]["steps"] == rl[2]["run"]["steps"]
    for one in rl:
        for key in ("name", "root", "steps"):
            del one["run"][key]
        del one["model"]["path"]
    assert rl[0] == rl[1] == rl[2]
    held = {Path(path).name for path in loaded["evaluation"].data.heldout.values()}
    learned = {Path(one.path).name for name in ("sft_1", "sft_2") for p in loaded[name].phases for one in p.mixture}
    learned |= {Path(loaded[name].data.train).name for name in ("rl_1", "rl_only", "distil_1", "distil_2")}
    assert not held & learned and held == {"heldout_heard.jsonl", "voices_heard.jsonl", "heldout_other.jsonl"}
    assert list(loaded["evaluation"].policies) == list(POLICIES)
    assert loaded["silence"].evaluation.silence and not loaded["evaluation"].evaluation.silence
    filters = {one.source for one in loaded["distil_1"].distil.filters}
    assert "measured" not in filters, "what is measured must not be what is filtered"


def test_a_tiny_trial_keeps_to_folders_of_its_own() -> None:
    full, tiny = (experiment.Plan((0,), tiny=choice) for choice in (False, True))
    assert full.report_folder() != tiny.report_folder()
    stages = read_pipeline(tiny.pipeline, tiny.arms(0, until="rl_1"))
    assert stages.folder.name == "mgrd-tiny-seed0" and stages.config.run.until == "rl_1"
    assert next(stage for stage in stages.stages if stage.name == "rl_2").load().run.steps == 2
