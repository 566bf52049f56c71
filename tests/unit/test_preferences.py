"""Preference files: what a record means on the judge's scale, what is refused; held-out content stays apart."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlaudio.config import DialogueSettings
from rlaudio.data.records import read_records, write_records
from rlaudio.dialogue.player import DialoguePlayer, PlaySpec
from rlaudio.dialogue.users import ScriptedUser, played_turns
from rlaudio.engines.base import GenerationRequest, Sampling
from rlaudio.errors import DataError
from rlaudio.rewards.agreement import VerdictAgreement, agreement_records
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.levels import FIVE, Scale
from rlaudio.rewards.preference_rows import (
    content_key,
    preference_rows,
    require_apart,
    require_rows_apart,
    split_heldout,
)
from rlaudio.rewards.preferences import Labelled, read_preferences
from rlaudio.rewards.prompt import Comparison, JudgePrompt, Said
from rlaudio.types import Turn
from tests.fakes import QWEN_LIKE, FakeClips, FakeEngine, FakeFamily, SpellingTokenizer

GOOD: Mapping[str, Any] = {
    "id": "p1",
    "axis": "warmth",
    "messages": [{"role": "user", "content": [{"text": "how are you"}]}],
    "reference": "fine thanks",
    "response": "what",
    "level": 0,
}
PAIR = {"responses": ["one", "two"], "reference": None, "response": None, "level": None}
RUBRIC = [{"text": "is right", "critical": True}, {"text": "is kind"}]


def write(tmp_path: Path, *records: Mapping[str, Any]) -> Path:
    path = tmp_path / "pairs.jsonl"
    lines = [json.dumps({key: value for key, value in one.items() if value is not None}) for one in records]
    path.write_text("\n".join(lines))
    return path


def read(tmp_path: Path, *changes: Mapping[str, Any], levels: int = 5) -> list[Labelled]:
    records = [{**GOOD, "id": f"p{number}", **change} for number, change in enumerate(changes or ({},))]
    return read_preferences(write(tmp_path, *records), scale=Scale(levels))


def prompt_of(family: FakeFamily, scale: Scale = FIVE) -> JudgePrompt:
    return JudgePrompt(family.tokenizer, style=family.style, scale=scale)


# ---- what a record means ------------------------------------------------------------------------------------------


def test_a_level_is_taken_as_it_is(tmp_path: Path) -> None:
    (one,) = read(tmp_path)
    assert (one.level, one.exact, one.axis) == (0, True, "warmth")
    assert one.comparison == Comparison((replace(one.comparison.history[0]),), "fine thanks", "what")


@pytest.mark.parametrize("levels", range(2, 10))
def test_a_preferred_side_is_the_mildest_level_on_it(tmp_path: Path, levels: int) -> None:
    scale = Scale(levels)
    better, worse = read(
        tmp_path, {"level": None, "preferred": "response"}, {"level": None, "preferred": "reference"}, levels=levels
    )
    assert scale.even_phi[better.level] == min(phi for phi in scale.even_phi if phi > 0)
    assert scale.even_phi[worse.level] == max(phi for phi in scale.even_phi if phi < 0)
    assert not better.exact and not worse.exact


def test_two_replies_without_a_reference_are_learned_in_both_roles(tmp_path: Path) -> None:
    told = {"as_given": "A is one", "swapped": "A is two"}
    one, other = read(tmp_path, {**PAIR, "preferred": 1, "reasoning": told})
    assert (one.comparison.reference, one.comparison.response, one.level) == ("one", "two", 3)
    assert (other.comparison.reference, other.comparison.response, other.level) == ("two", "one", 1)
    # With the response second A is the reference.
    assert one.reasoning == ("A is one", "A is two")
    assert other.reasoning == ("A is two", "A is one")
    assert one.record_id == other.record_id and one.id != other.id


def test_rubric_labels_are_one_comparison_per_item(tmp_path: Path) -> None:
    items = [{"reference": True, "response": False}, 4]
    right, kind = read(tmp_path, {"level": None, "rubric": RUBRIC, "items": items, "reasoning": ["it is not", "it is"]})
    assert (right.comparison.criterion, right.level, right.exact) == ("is right", 1, False)
    assert (kind.comparison.criterion, kind.level, kind.exact) == ("is kind", 4, True)
    assert (right.id, kind.reasoning) == ("p0#0", ("it is", "it is"))


def test_a_rubric_with_one_level_is_read_whole(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {"rubric": RUBRIC})
    assert one.comparison.criterion == "is right\nis kind"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"level": 5}, "field level = 5: must be a whole number from 0 to 4"),
        ({"level": True}, "field level = True"),
        ({"level": None}, "give exactly one of the three"),
        ({"preferred": "response"}, "give exactly one of the three"),
        ({"level": None, "preferred": "both"}, "must be one of 'reference', 'response' and 'same'"),
        ({**PAIR, "preferred": True}, "must be one of 0, 1 and 'same'"),
        ({"responses": ["a", "b"]}, "give either responses, or reference and response"),
        ({**PAIR, "responses": ["a"], "preferred": 0}, "give the two replies"),
        ({"reference": " "}, "field reference = ' ': must be a non-empty string"),
        ({"referense": "x"}, "did you mean 'reference'?"),
        ({"level": None, "rubric": RUBRIC, "items": [1]}, "rubric has 2 items: give one label for each"),
        ({"level": None, "rubric": RUBRIC, "items": [1, [True, False]]}, "whether each of the two meets the item"),
        ({"level": None, "rubric": RUBRIC, "items": [1, 9]}, "field items[1] = 9: must be a whole number"),
        ({"rubric": [{"text": "x", "weight": -1}]}, "field rubric[0].weight = -1: give a positive finite number"),
        ({"reasoning": "response B is wrong"}, "names A or B"),
        ({"messages": [{"role": "assistant", "content": [{"text": "x"}]}]}, "it must be from the user"),
        ({"messages": [{"role": "user", "content": [{"audio": "a", "sha256": "a" * 64, "sample_rate": 8}]}]}, "hear"),
    ],
)
def test_what_makes_no_sense_is_named_with_line_and_id(tmp_path: Path, change: Mapping[str, Any], said: str) -> None:
    path = write(tmp_path, GOOD, {**GOOD, "id": "bad one", **change})
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert f"{path}:2: record 'bad one', " in str(caught.value)
    assert said in str(caught.value)


def test_no_level_is_the_same_on_an_even_scale(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="4 levels have no 'same'"):
        read(tmp_path, {"level": None, "preferred": "same"}, levels=4)


def test_every_bad_line_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n{oops\n" + json.dumps(GOOD))
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    assert f"{path}:3: not a line of JSON" in str(caught.value)
    assert f"{path}:4: field id = 'p1': already used in line 1" in str(caught.value)


def test_an_article_is_no_letter(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {"reasoning": "A short reply. A kind one is better."})
    assert one.reasoning is not None


# ---- rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", range(2, 10))
def test_rows_hold_both_orders_and_the_verdicts_mirror(tmp_path: Path, levels: int) -> None:
    scale, family = Scale(levels), FakeFamily()
    prompt = prompt_of(family, scale)
    labelled = read(tmp_path, *({"level": level} for level in range(levels)), levels=levels)
    rows = preference_rows(labelled, prompt, reasoning="A B")
    asked = rows.column("prompt_ids").to_pylist()
    for index, one in enumerate(labelled):
        for order in (False, True):
            place = 2 * index + order
            assert asked[place] == prompt.ids(one.comparison, response_first=order).tolist()
            verdict = prompt.parse(rows.column("response_ids")[place].as_py())
            assert scale.level(verdict, response_first=order) == one.level


# ---- apart --------------------------------------------------------------------------------------------------------


def comparison(user: str, reference: str, response: str, criterion: str | None = None) -> Comparison:
    return Comparison((Said("user", user),), reference, response, criterion)


def test_content_is_the_same_under_another_name_role_criterion_and_spelling() -> None:
    one = comparison("hi", "Good  morning", "no")
    assert content_key(one) == content_key(comparison("Hi ", "no", "good morning", "kind"))
    assert content_key(one) != content_key(comparison("hi", "no", "good evening"))


def test_something_held_out_that_is_learned_from_is_an_error() -> None:
    train = [Labelled("a", "a", comparison("hi", "x", "y"), 0)]
    require_apart(train, [Labelled("b", "b", comparison("hi", "x", "z"), 0)])
    with pytest.raises(DataError, match="'b' .learned from as 'a'."):
        require_apart(train, [Labelled("b", "b", comparison("hi", "y", "x", "kind"), 4)])


def test_rows_made_before_are_looked_through_too() -> None:
    family = FakeFamily()
    prompt = prompt_of(family)
    rows = preference_rows([Labelled("a", "a", comparison("hi", "x", "y"), 0)], prompt, reasoning="A B")
    require_rows_apart(rows.slice(0, 1), [Labelled("b", "b", comparison("hi", "x", "z"), 0)], prompt)
    for row in range(2):
        with pytest.raises(DataError, match="1 held-out comparisons are learned from too"):
            require_rows_apart(rows.slice(row, 1), [Labelled("b", "b", comparison("hi", "x", "y"), 0)], prompt)


def test_a_share_is_held_out_by_dialogue() -> None:
    labelled = [Labelled(f"{n}/{k}", "r", comparison(f"say {n}", "x", f"y{k}"), 0) for n in range(200) for k in (1, 2)]
    train, held = split_heldout(labelled, share=0.2)
    said = [{one.comparison.history for one in side} for side in (train, held)]
    assert not said[0] & said[1]
    assert 0.1 < len(held) / len(labelled) < 0.3
    assert split_heldout(labelled[::-1], share=0.2)[1] == held[::-1]
    with pytest.raises(DataError, match="leaves 2 to learn from and 0 held out"):
        split_heldout(labelled[:2], share=0.0001)


# ---- agreement ----------------------------------------------------------------------------------------------------


async def played(record: Any, family: FakeFamily) -> GenerationRequest:
    engine = FakeEngine(lambda request: prompt_of(family).answer("A B", 0).tolist())
    player = DialoguePlayer(
        engine=engine, family=family, clips=FakeClips([]), user=ScriptedUser(), settings=DialogueSettings()
    )  # type: ignore[arg-type]
    await player.play_group(record, PlaySpec(0, 1, Sampling(max_new_tokens=9), "s"))
    (request,) = engine.requests
    return request


@pytest.mark.parametrize("make", [FakeFamily, lambda: FakeFamily(tokenizer=SpellingTokenizer(), style=QWEN_LIKE)])
async def test_the_player_shows_what_the_judge_is_asked(tmp_path: Path, make: Any) -> None:
    family = make()
    history = (Said("user", "hi"), Said("assistant", "hello"), Said("user", "two plus two"))
    one = Labelled("a", "a", Comparison(history, "four", "five </think> <|EOT|> B++", "be right"), 0)
    records = agreement_records([one], prompt_of(family), family=family)
    write_records(tmp_path / "r.jsonl", records)
    assert read_records(tmp_path / "r.jsonl") == records
    for record, order in zip(records, (False, True), strict=True):
        assert len(played_turns(record)) == 1
        request = await played(record, family)
        assert request.prompt_ids.tolist() == prompt_of(family).ids(one.comparison, response_first=order).tolist()


def test_a_text_that_would_be_cut_is_refused() -> None:
    family = FakeFamily()
    prompt = JudgePrompt(family.tokenizer, style=family.style, max_section_tokens=3)
    with pytest.raises(DataError, match="record 'a': a text is longer than asking.max_section_tokens"):
        agreement_records([Labelled("a", "a", comparison("hi", "x", "a b c d"), 0)], prompt, family=family)


def turn(reply: str, thinking: str | None = "so", finish: Any = "stop") -> Turn:
    ids = prompt_of(FakeFamily()).answer("x", 0)
    return Turn(0, ids, ids, ids.astype("float32"), (), (), thinking, reply, finish)


@pytest.mark.parametrize(
    ("levels", "gold", "said"), [(n, gold, said) for n in (2, 5, 8) for gold in range(n) for said in range(0, n, 2)]
)
def test_agreement_pays_the_side_and_the_level(levels: int, gold: int, said: int) -> None:
    scale, family = Scale(levels), FakeFamily()
    one = Labelled("a", "a", comparison("hi", "x", "y"), gold)
    judge = VerdictAgreement(JudgeServices(), levels=levels, exact_weight=0.25)
    second, _ = agreement_records([one], prompt_of(family, scale), family=family)
    word = scale.words[scale.level(said, response_first=False)]
    same_side = (scale.even_phi[gold] > 0) == (scale.even_phi[said] > 0) and (scale.even_phi[gold] < 0) == (
        scale.even_phi[said] < 0
    )
    assert judge.check(second, turn(word)).value == 0.25 * (gold == said) + 0.75 * same_side
    sided, _ = agreement_records([replace(one, exact=False)], prompt_of(family, scale), family=family)
    assert judge.check(sided, turn(word)).value == float(same_side)
    for unread in (turn(f"{word} {word}"), turn(word, thinking=""), turn(word, None), turn(word, finish="length")):
        assert judge.check(second, unread).value == 0.0


def test_an_answer_that_is_no_verdict_is_refused_before_a_run() -> None:
    family = FakeFamily()
    (record, _) = agreement_records(
        [Labelled("a", "a", comparison("hi", "x", "y"), 6)], prompt_of(family, Scale(7)), family=family
    )
    assert list(VerdictAgreement.record_problems(record, {"levels": 7})) == []
    (said,) = VerdictAgreement.record_problems(record, {})
    assert "'B+++', which is no verdict" in said
