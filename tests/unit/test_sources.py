"""Verifiers as sources: what they pay for, of which turns they speak, which options and records they refuse."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from rlaudio.errors import AudioError, ConfigError, JudgeError
from rlaudio.registry import load_object
from rlaudio.rewards.base import JudgeServices, Scores
from rlaudio.rewards.brevity import Brevity
from rlaudio.rewards.reasoning import ReasoningPresent
from rlaudio.rewards.rules import RulesKept
from rlaudio.rewards.spoken import SpokenReply
from rlaudio.rewards.verified import R1Audio, R1Text, VerifiedReward
from rlaudio.types import (
    SAMPLE_RATE_HZ,
    Choice,
    Constraint,
    Dialogue,
    FloatArray,
    Judgment,
    Message,
    PromptRecord,
    TextPart,
    Turn,
)

SERVICES = JudgeServices()


def user(*rules: Constraint, answer: str | None = None, choices: Sequence[str] = ()) -> Message:
    letters = tuple(Choice(letter, text) for letter, text in zip("ABCD", choices, strict=False))
    return Message("user", (TextPart("q"),), answer=answer, constraints=rules, choices=letters)


def played(*replies: str, thinking: str | None = "because", sibling: int = 0) -> Dialogue:
    ids = np.arange(5, dtype=np.int32)
    return Dialogue(
        "r",
        0,
        sibling,
        tuple(Turn(i, ids, ids, ids.astype(np.float32), (), (), thinking, r, "stop") for i, r in enumerate(replies)),
    )


async def one_by_one(source: Any, record: PromptRecord, *replies: str, thinking: str | None = "so") -> list[Judgment]:
    scores: Scores = await source.score(record, [played(*replies, thinking=thinking)])
    assert not scores.failures
    return list(scores.judgments)


async def test_presets_are_those_of_the_report() -> None:
    record = PromptRecord("r", "t", (user(answer="seven"), user(answer="seven")))
    audio, text = R1Audio(SERVICES), R1Text(SERVICES)
    assert [j.value for j in await one_by_one(audio, record, "seven", "six")] == pytest.approx([1.0, 0.2])
    assert [j.value for j in await one_by_one(audio, record, "seven", "six", thinking="")] == pytest.approx([0.8, 0.0])
    assert [j.value for j in await one_by_one(audio, record, "seven", thinking=None)] == [0.0]
    assert [j.value for j in await one_by_one(text, record, "seven", "six")] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("options", "message", "right", "wrong"),
    [
        ({"match": "exact"}, user(answer="seven"), "Seven!", "it is seven"),
        ({"match": "numeric", "tolerance": 0.5}, user(answer="7 km"), "seven point four kilometers", "8 km"),
        ({"match": "choice"}, user(answer="B", choices=("a cat", "a dog")), "it is a dog", "a cat or a dog"),
        ({}, user(answer="B", choices=("a cat", "a dog")), "(b)", "a cat"),
        ({}, user(Constraint("max_tokens", "5"), answer="seven"), "seven", "eight"),
    ],
)
async def test_an_answer_is_matched_as_the_options_say(
    options: dict[str, Any], message: Message, right: str, wrong: str
) -> None:
    source = VerifiedReward(SERVICES, format_weight=0, correct_weight=1, **options)
    record = PromptRecord("r", "t", (message, message))
    assert [j.detail["correct"] for j in await one_by_one(source, record, right, wrong)] == [1.0, 0.0]
    assert not list(source.record_problems(record, options))


async def test_an_early_rule_is_checked_in_every_later_turn() -> None:
    polite = Constraint("ends_with", "please", persists=True)
    record = PromptRecord("r", "t", (user(polite, answer="one"), user(answer="two"), user(answer="three")))
    found = await one_by_one(VerifiedReward(SERVICES), record, "one please", "two", "three please")
    assert [j.detail["correct"] for j in found] == [1.0, 0.0, 1.0]


async def test_rules_alone_speak_only_where_there_are_some_and_tell_retained_from_own() -> None:
    polite, short = Constraint("ends_with", "please", persists=True), Constraint("max_words", "2")
    record = PromptRecord("r", "t", (user(), user(polite), user(short), user()))
    found = await one_by_one(RulesKept(SERVICES), record, "hi", "yes", "a please", "so many words")
    assert [(j.turn, j.value) for j in found] == [(1, 0.0), (2, 1.0), (3, 0.0)]
    assert [j.detail.get("retained") for j in found] == [None, 1.0, 0.0]
    both = await one_by_one(RulesKept(SERVICES), record, "hi", "please", "three words please")
    assert (both[-1].value, both[-1].detail["correct"]) == (0.5, 0.0)
    assert (await one_by_one(RulesKept(SERVICES, partly=False), record, "a", "please", "b c please"))[-1].value == 0.0
    unparsable = await one_by_one(RulesKept(SERVICES), record, "hi", "please", thinking=None)
    assert unparsable[-1].value == 0.0


async def test_reasoning_is_words_between_the_tags() -> None:
    record = PromptRecord("r", "t", (user(),))
    source = ReasoningPresent(SERVICES, min_words=2, max_words=3)
    for thinking, value in ((None, 0.0), ("", 0.0), ("\n\n", 0.0), ("one", 0.0), ("one two", 1.0), ("a b c d", 0.0)):
        assert [j.value for j in await one_by_one(source, record, "hi", thinking=thinking)] == [value], thinking


async def test_brevity_counts_the_reply_alone_and_never_pays_for_ending_early() -> None:
    record = PromptRecord("r", "t", (user(),))
    source = Brevity(SERVICES, most=4)
    for reply, value in (("", 1.0), ("one", 0.75), ("One, two!", 0.5), ("a b c d", 0.0), ("a b c d e", 0.0)):
        assert [j.value for j in await one_by_one(source, record, reply)] == [value], reply
        assert value >= source.unplayed
    assert [j.value for j in await one_by_one(source, record, "one", thinking="many words " * 9)] == [0.75]
    assert [j.value for j in await one_by_one(source, record, "one", thinking=None)] == [0.0]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("verified:VerifiedReward", {"match": "nummeric"}, "match is 'nummeric', did you mean numeric"),
        ("verified:VerifiedReward", {"correct_weight": -1}, "correct_weight is -1, set at least 0"),
        ("verified:VerifiedReward", {"correct_weight": 0, "format_weight": 0}, "are both 0"),
        ("verified:VerifiedReward", {"tolerance": 0.1}, "a tolerance is for match=numeric"),
        ("verified:VerifiedReward", {"unplayed": float("nan")}, "unplayed is nan"),
        ("verified:VerifiedReward", {"tolerance": "wide", "match": "numeric"}, "tolerance is 'wide'"),
        ("reasoning:ReasoningPresent", {"min_words": 5, "max_words": 3}, "swap them"),
        ("brevity:Brevity", {"most": 0}, "most is 0, set at least 1"),
        ("spoken:SpokenReply", {"voice": "x:y", "targets": {}}, "targets is empty"),
        ("spoken:SpokenReply", {"voice": "x:y", "targets": {"pitch": [1, 2]}}, "targets.pitch is no measure: did you"),
        ("spoken:SpokenReply", {"voice": "x:y", "targets": {"stoi": [0, 1]}}, "it needs squim"),
        ("spoken:SpokenReply", {"voice": "x:y", "targets": {"pitch_hz": [2, 1]}}, "low must be below high"),
        ("spoken:SpokenReply", {"voice": "x:y", "targets": {"pitch_hz": [1]}}, "give [low, high]"),
        ("spoken:SpokenReply", {"voice": "nowhere:V", "targets": {"pitch_hz": [1, 2]}}, "no module 'nowhere'"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_object(f"rlaudio.rewards.{name}")(SERVICES, name="mine", **options)


def test_records_that_cannot_be_checked() -> None:
    def problems(message: Message, **options: Any) -> str:
        return "; ".join(VerifiedReward.record_problems(PromptRecord("r", "t", (message,)), options))

    assert "user message 1: answer '7 or 8' names 2 numbers" in problems(user(answer="7 or 8"), match="numeric")
    assert "an answer and no choices" in problems(user(answer="B"), match="choice")
    assert "constraint kind 'rhymes' is unknown" in problems(user(Constraint("rhymes", "x")))
    assert problems(user(answer="7 or 8")) == problems(user()) == ""


class Buzz:
    """A voice of ten buzzes a second, lower with every word; says nothing of the word "mute"."""

    def __init__(self, base_hz: float = 200.0) -> None:
        self.base_hz = base_hz
        self.spoken: list[str] = []

    def speak(self, text: str) -> FloatArray:
        if text == "mute":
            raise AudioError("lost my voice")
        self.spoken.append(text)
        t = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
        pitch = self.base_hz / len(text.split())
        return (0.1 * np.sin(2 * np.pi * pitch * t) + 0.1 * np.sin(4 * np.pi * pitch * t)).astype(np.float32)


async def test_a_spoken_reply_is_paid_for_lying_in_its_ranges() -> None:
    voice = "tests.unit.test_sources:Buzz"
    source = SpokenReply(SERVICES, voice=voice, targets={"pitch_hz": [150, 250], "words_per_s": [0.5, 1.5]})
    record = PromptRecord("r", "t", (user(), user(), user()))
    one, two, none = await one_by_one(source, record, "hello", "hello there", "...")
    assert one.value == pytest.approx(1.0)
    assert one.detail["pitch_hz"] == pytest.approx(200, rel=0.02)
    # 100 Hz is half a width below the range; two words a second half a width above.
    assert two.value == pytest.approx(0.5, abs=0.05)
    assert (none.value, none.detail) == (0.0, {})


async def test_a_voice_that_fails_leaves_the_turn_unjudged_and_equal_replies_are_spoken_once() -> None:
    source = SpokenReply(SERVICES, voice="tests.unit.test_sources:Buzz", targets={"pitch_hz": [150, 250]})
    record = PromptRecord("r", "t", (user(), user()))
    scores = await source.score(record, [played("mute", "hi"), played("hi", "hi", sibling=1)])
    assert [(f.sibling, f.turn, f.reason) for f in scores.failures] == [(0, 0, "lost my voice")]
    assert len(scores.judgments) == 3
    assert source._voice.spoken == ["hi"]  # type: ignore[attr-defined]


async def test_a_simulated_record_that_cannot_be_checked_is_a_judge_error_with_its_id() -> None:
    record = PromptRecord("r", "t", (user(Constraint("rhymes", "x")),))
    with pytest.raises(JudgeError, match="record 'r': constraint kind 'rhymes'"):
        await VerifiedReward(SERVICES).score(record, [played("x")])
