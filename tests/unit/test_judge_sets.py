"""Local copies of RewardBench 2 and JudgeBench, made here in their formats: reading, asking, official scores."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlaudio.config_judges import AskingSettings, JudgedSetSettings
from rlaudio.errors import DataError
from rlaudio.rewards.judge_sets import (
    BestOf,
    Duel,
    best_of_asks,
    best_of_credit,
    judge_bench_figures,
    read_judge_bench,
    read_reward_bench_2,
    reply_scores,
    ties_score,
)
from rlaudio.rewards.judged_sets import read_set
from rlaudio.rewards.levels import FIVE
from rlaudio.rewards.verdicts import Answer, Ask

RB2: Mapping[str, Any] = {
    "id": "17",
    "prompt": "name a fruit",
    "chosen": ["apple"],
    "rejected": ["stone", "chair", "cloud"],
    "num_correct": 1,
    "num_incorrect": 3,
    "total_completions": 4,
    "models": ["m"] * 4,
    "subset": "Factuality",
    "additional_metadata": None,
}
DUEL: Mapping[str, Any] = {
    "pair_id": "u1",
    "original_id": "3",
    "source": "mmlu-pro-math",
    "question": "two plus two",
    "response_model": "m",
    "response_A": "four",
    "response_B": "five",
    "label": "A>B",
}
QUALITY = {"apple": 2, "pear": 2, "plum": 1, "stone": 0, "chair": 0, "cloud": 0, "four": 2, "five": 0}


def write(path: Path, *rows: Mapping[str, Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def answer(ask: Ask, *, likes_response: int = 0) -> Answer:
    """By quality, and a liking for what the prompt calls the response."""
    shown = ask.comparison
    level = 2 + QUALITY[shown.response] - QUALITY[shown.reference] + likes_response
    return Answer(min(max(level, 0), 4))


def item(number: int = 0, *, chosen: tuple[str, ...] = ("apple",), subset: str = "Math", name: str = "") -> BestOf:
    return BestOf(name or str(number), subset, "name a fruit", (*chosen, "stone", "chair"), len(chosen))


# ---- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["copy.jsonl", "copy.parquet"])
def test_local_copies_are_read_as_they_are_published(tmp_path: Path, name: str) -> None:
    (best,) = read_reward_bench_2(write(tmp_path / name, RB2))
    assert (best.subset, best.replies, best.num_correct) == ("Factuality", ("apple", "stone", "chair", "cloud"), 1)
    (duel,) = read_judge_bench(write(tmp_path / f"j{name}", DUEL))
    assert (duel.reply_a, duel.a_is_better, duel.group) == ("four", True, "knowledge")


@pytest.mark.parametrize(
    ("read", "row", "said"),
    [
        (read_reward_bench_2, {**RB2, "chosen": []}, "2: record '17', field chosen = []: must be a non-empty list"),
        (read_reward_bench_2, {**RB2, "rejected": [""]}, "field rejected[0] = ''"),
        (read_reward_bench_2, {**RB2, "chosen": ["a", "b"]}, "outside the subset Ties there is exactly one"),
        (read_reward_bench_2, {**RB2, "num_correct": 2}, "there are 1 chosen replies: copy the row again"),
        (read_reward_bench_2, {**RB2, "subset": "Ties"}, "in the subset Ties it is ref:NUMBER or tied:NUMBER"),
        (read_reward_bench_2, {**RB2, "id": None}, "field id = None"),
        (read_judge_bench, {**DUEL, "label": "A"}, "2: record 'u1', field label = 'A': must be 'A>B' or 'B>A'"),
        (read_judge_bench, {**DUEL, "response_B": None}, "field response_B = None"),
        (read_judge_bench, ["x"], "2: field record = ['x']: must be an object"),
    ],
)
def test_a_bad_line_is_named_with_its_place_and_the_way_out(tmp_path: Path, read: Any, row: Any, said: str) -> None:
    good = {**RB2, "id": "1"} if read is read_reward_bench_2 else {**DUEL, "pair_id": "u0"}
    with pytest.raises(DataError) as caught:
        read(write(tmp_path / "copy.jsonl", good, row))
    assert said in str(caught.value)


def test_ties_without_their_references_are_refused(tmp_path: Path) -> None:
    rows = [{**RB2, "id": f"{kind}", "subset": "Ties"} for kind in ("ref:1", "tied:2")]
    with pytest.raises(DataError, match="has both its 'ref:' and its 'tied:' record"):
        read_reward_bench_2(write(tmp_path / "copy.jsonl", *rows))


def test_a_missing_file_and_a_broken_parquet_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_judge_bench(tmp_path / "none.jsonl")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(DataError, match="not a Parquet file"):
        read_judge_bench(tmp_path / "x.parquet")


# ---- best of 4 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("likes_response", [-1, 0, 1])
def test_a_liking_for_the_response_cancels(likes_response: int) -> None:
    one = item(chosen=("apple", "pear", "plum"))
    scores = reply_scores([answer(ask, likes_response=likes_response) for ask in best_of_asks(one)], scale=FIVE)
    assert scores is not None
    assert scores[:2] == [0, 0] and scores[1] > scores[2] > scores[3] == scores[4]


def test_credit_is_shared_among_equal_best_replies_and_none_without_verdicts() -> None:
    assert best_of_credit([0, -1, -0.5, -1]) == 1
    assert best_of_credit([0, 0, -1, 0]) == pytest.approx(1 / 3)
    assert best_of_credit([0, 0.5, -1, -1]) == 0
    answers = [answer(ask) for ask in best_of_asks(item())]
    assert reply_scores([*answers[:-1], Answer(None, "unparsable")], scale=FIVE) is None
    assert best_of_credit(None) == 0


# ---- ties ---------------------------------------------------------------------------------------------------------


def ties(*scores: tuple[str, int, list[float] | None]) -> float:
    items = [BestOf(name, "Ties", "p", ("x",) * (len(one) if one else 4), right) for name, right, one in scores]
    return ties_score(items, [one for _, _, one in scores])


def test_the_score_of_ties_by_hand() -> None:
    # Right replies are 0.5 apart, the worst of them 1 above the best wrong one; the reference prompt has a gap of 0.25.
    found = ties(("ref:1", 1, [0, -0.25]), ("tied:1", 2, [0, 0.5, -1, -2]))
    assert found == pytest.approx(0.3 + 0.3 + 0.2 + 0.0 + 0.01 * math.tanh(0.25 / 0.5 - 1))
    # No difference among the right ones: a positive gap counts fully.
    assert ties(("ref:1", 1, [0, -1]), ("tied:1", 2, [0, 0, -1])) == pytest.approx(1.01)
    # A tie of right and wrong is not accurate, and prefers nothing.
    assert ties(("ref:1", 1, [0, 0]), ("tied:1", 2, [0, 0, 0])) == 0
    assert ties(("ref:1", 1, [0, 1]), ("tied:1", 2, [0, 0, 1])) == pytest.approx(-0.01)


def test_an_unreadable_prompt_of_ties_is_wrong_in_everything() -> None:
    good, bad = ("ref:1", 1, [0.0, -1.0]), ("tied:1", 2, [0.0, 0.0, -1.0])
    assert ties(good, (*bad[:2], None)) == pytest.approx(0.3 - 0.01)
    half = ties(good, bad, ("ref:2", 1, None), ("tied:2", 2, None))
    assert half == pytest.approx(0.5, abs=0.011)


# ---- JudgeBench ---------------------------------------------------------------------------------------------------


def duel(a_is_better: bool = True) -> Duel:
    return Duel("u", "livebench-math", "q", "four", "five", a_is_better)


@pytest.mark.parametrize(
    ("of_b", "of_a", "official", "strict", "consistent"),
    [
        (0, 4, 1, 1, 1),  # both say A
        (1, 2, 1, 0, 0),  # one says A, the other neither
        (None, 3, 1, 0, 0),  # one says A, the other nothing
        (4, 4, 0, 0, 0),  # whatever is called the response wins
        (2, 2, 0, 0, 1),
        (4, 0, 0, 0, 1),
        (None, None, 0, 0, 0),
    ],
)
def test_both_verdicts_together_lean_to_the_label(
    of_b: int | None, of_a: int | None, official: int, strict: int, consistent: int
) -> None:
    answers = [[Answer(of_b), Answer(of_a)]]
    found = judge_bench_figures([duel()], answers, scale=FIVE, num_resamples=10)
    assert (found.score, found.others["strict"], found.others["consistency"]) == (official, strict, consistent)
    mirrored = judge_bench_figures([duel(a_is_better=False)], [answers[0][::-1]], scale=FIVE, num_resamples=10)
    assert mirrored.score == official
    assert found.unreadable == [of_b, of_a].count(None) / 2


# ---- whole sets ---------------------------------------------------------------------------------------------------


def test_a_set_of_each_kind_from_file_to_figures(tmp_path: Path) -> None:
    rows = [
        {**RB2, "id": "1"},
        {**RB2, "id": "2", "subset": "Math", "chosen": ["stone"], "rejected": ["apple", "chair", "cloud"]},
        {**RB2, "id": "ref:1", "subset": "Ties", "rejected": ["stone"], "num_correct": 1},
        {**RB2, "id": "tied:1", "subset": "Ties", "chosen": ["apple", "pear"], "rejected": ["stone"], "num_correct": 2},
    ]
    settings = [
        JudgedSetSettings("rb", str(write(tmp_path / "rb.parquet", *rows)), "reward_bench_2"),
        JudgedSetSettings("jb", str(write(tmp_path / "jb.jsonl", DUEL)), "judge_bench"),
    ]
    best, duels = (read_set(one, asking=AskingSettings(), clips=None, num_resamples=50) for one in settings)
    found = best.figures([answer(ask) for ask in best.asks]).to_json()
    assert {name: one["score"] for name, one in found["subsets"].items()} == pytest.approx(
        {"Factuality": 1, "Math": 0, "Ties": 1.01}
    )
    assert found["score"] == pytest.approx(2.01 / 3)  # every subset weighs the same
    assert len(best.asks) == len(best.items) == 2 * (3 + 3 + 1 + 2)
    figures = duels.figures([answer(ask) for ask in duels.asks])
    assert figures.to_json()["score"] == 1 and "knowledge" in figures.table()
    lines = [json.loads(line) for line in duels.lines([Answer(None, "truncated"), Answer(4)]).splitlines()]
    assert lines[0] == {"item": "u1", "response_first": False, "level": None, "problem": "truncated"}
