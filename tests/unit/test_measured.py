"""What reasoning says of a sound is held against the sound itself; what it repeats or leaves open says nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlaudio.audio.store import ClipStore
from rlaudio.errors import ConfigError
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.coherence import Coherence, leads_to
from rlaudio.rewards.measured import MeasuredSound
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart, Choice, Dialogue, Message, PromptRecord, TextPart, Turn

FACTS: list[dict[str, Any]] = [
    {"measure": "pitch_hz", "boundary": 150, "below": ["low", "deep"], "above": ["high"]},
    {"measure": "words_per_s", "boundary": 4, "below": ["slow"], "above": ["fast"]},
]
HIGH_HZ, LOW_HZ = 240, 90


def turn(thinking: str | None, reply: str = "high") -> Turn:
    ids = np.zeros(1, np.int32)
    return Turn(0, ids, ids, ids.astype(np.float32), (), (), thinking, reply, "stop")


def asked(clips: ClipStore, *, pitch_hz: float, said: str = "is my voice high or low") -> PromptRecord:
    """One second of a buzz, so that six words are six per second."""
    times = np.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    sound = sum(np.sin(2 * np.pi * pitch_hz * harmonic * times) / harmonic for harmonic in range(1, 6))
    clip = clips.put((0.2 * sound).astype(np.float32))
    part = AudioPart(clips.uri(clip.sha256), clip.sha256, SAMPLE_RATE_HZ, said)
    return PromptRecord("p", "pitch", (Message("user", (part,), answer="high"),))


@pytest.fixture
def clips(tmp_path: Path) -> ClipStore:
    return ClipStore(str(tmp_path))


async def scored(clips: ClipStore, record: PromptRecord, thinking: str | None) -> tuple[float, float, float]:
    source = MeasuredSound(JudgeServices(clips=clips), facts=FACTS)
    [found] = (await source.score(record, [Dialogue("p", 0, 0, (turn(thinking),))])).judgments
    return found.value, found.detail["said"], found.detail["true"]


@pytest.mark.parametrize(
    ("thinking", "of_high", "of_low"),
    [
        ("the voice sounds high", (1, 1, 1), (0, 1, 0)),
        ("the voice sounds deep", (0, 1, 0), (1, 1, 1)),
        ("the voice sounds low no the voice sounds high", (1, 1, 1), (0, 1, 0)),
        ("the voice sounds high and the speech is fast", (1, 2, 2), (0, 2, 1)),
        ("the voice sounds high and the speech is slow", (0, 2, 1), (0, 2, 0)),
        ("is my voice high or low", (0, 0, 0), (0, 0, 0)),
        ("heard is my voice high or low . the answer is high", (0, 0, 0), (0, 0, 0)),
        ("the price is high", (0, 0, 0), (0, 0, 0)),
        ("the voice is high or low", (0, 0, 0), (0, 0, 0)),
        ("", (0, 0, 0), (0, 0, 0)),
        (None, (0, 0, 0), (0, 0, 0)),
    ],
)
async def test_only_what_is_true_of_the_sound_counts(
    clips: ClipStore, thinking: str | None, of_high: tuple[int, int, int], of_low: tuple[int, int, int]
) -> None:
    """The words and the question are the same: only the sound differs."""
    assert await scored(clips, asked(clips, pitch_hz=HIGH_HZ), thinking) == of_high
    assert await scored(clips, asked(clips, pitch_hz=LOW_HZ), thinking) == of_low


async def test_what_is_left_open_says_nothing_whoever_said_the_words(clips: ClipStore) -> None:
    unheard = asked(clips, pitch_hz=HIGH_HZ, said="tell me how i sound")
    assert await scored(clips, unheard, "it sounds high or low") == (0, 0, 0)
    assert await scored(clips, unheard, "it sounds high or low . it sounds high") == (1, 1, 1)


async def test_rates_are_of_the_words_that_were_said(clips: ClipStore) -> None:
    slow = asked(clips, pitch_hz=HIGH_HZ, said="how fast")
    assert (await scored(clips, slow, "the speech is slow"))[0] == 1
    assert (await scored(clips, slow, "the speech is fast"))[0] == 0


async def test_a_message_that_is_read_is_not_spoken_of(clips: ClipStore) -> None:
    read = PromptRecord("p", "pitch", (Message("user", (TextPart("is my voice high or low"),), answer="high"),))
    source = MeasuredSound(JudgeServices(clips=clips), facts=FACTS)
    assert not (await source.score(read, [Dialogue("p", 0, 0, (turn("the voice sounds high"),))])).judgments


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ([], "facts is empty"),
        ([{**FACTS[0], "measure": "pitch"}], r"facts\[0\]\.measure is 'pitch': did you mean pitch_hz"),
        ([FACTS[0], {**FACTS[1], "above": ["slow"]}], r"facts\[1\]: 'slow' is in below and in above"),
        ([{**FACTS[0], "below": "low"}], r"facts\[0\]\.below is 'low', give a list"),
        ([{**FACTS[0], "below": ["very low"]}], "names 'very low', give single words"),
        ([{"measure": "pitch_hz"}], r"facts\[0\] is .*boundary"),
    ],
)
def test_facts_that_cannot_be_meant_are_named(clips: ClipStore, facts: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MeasuredSound(JudgeServices(clips=clips), facts=facts)


# ---- coherence ----------------------------------------------------------------------------------------------------

RIVALS = [[["high"], ["low"]], [["very", "fast"], ["slow"]]]


@pytest.mark.parametrize(
    ("thinking", "reply", "leads"),
    [
        ("the voice sounds high", "sure it is high", True),
        ("the voice sounds low", "sure it is high", False),
        ("low . no it is high", "high", True),
        ("it is high . no it is low", "high", False),
        ("it is high and not low", "high", True),
        ("it is not high", "high", False),
        ("the user asks something", "high", False),
        ("", "high", False),
        ("it is very fast", "very fast", True),
        ("it is fast", "very fast", False),
    ],
)
def test_reasoning_leads_to_what_it_says_last(thinking: str, reply: str, leads: bool) -> None:
    assert leads_to(thinking, reply, rivals=RIVALS) is leads


def test_of_choices_the_texts_are_looked_for() -> None:
    choices = (Choice("A", "a dog"), Choice("B", "a cat"))
    assert leads_to("it barks so a dog", "A", choices=choices)
    assert not leads_to("it barks so a cat", "A", choices=choices)
    assert not leads_to("so A it is", "A", choices=choices)


@pytest.mark.parametrize("rivals", [[["high"]], ["high low"], [["high", "high"]], [["high", ""]]])
def test_rivals_that_cannot_be_meant_are_named(rivals: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"rivals\[0\]"):
        Coherence(JudgeServices(), rivals=rivals)
