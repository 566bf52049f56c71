"""What the tiny hearing judge learns from: one sentence, spoken twice, and two replies of which each fits one sound.

Within a pair the words of the user and both replies are the same; voice, rate and pitch too, but for the one property
that the replies are about. So the right verdict is worse in one sound and better in the other, and nothing but the
sound tells which. Held-out pairs are of sentences and voices that the training pairs do not have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import pyarrow as pa

from rlaudio.audio.store import ClipStore
from rlaudio.dialogue.render import clip_pieces
from rlaudio.experience.builder import make_batch
from rlaudio.models.base import ModelFamily
from rlaudio.rewards.prompt import Comparison, JudgePrompt, Said
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart
from spoken_world.make import (
    HELDOUT_VOICES_OTHER,
    HELDOUT_VOICES_PITCHED,
    TRAIN_VOICES_OTHER,
    TRAIN_VOICES_PITCHED,
    Spoken,
)
from spoken_world.tasks import TASKS, Line, Manner
from spoken_world.voice import synthesizer

PROPERTIES: Mapping[str, tuple[Manner, Manner]] = {"rate": ("slow", "fast"), "pitch": ("low", "high")}
RATES_WPM = {"slow": (110, 140), "fast": (240, 320), "plain": (140, 190)}
PITCHES = {"low": (10, 22), "high": (78, 92), "plain": (30, 70)}
"""As `make.py` speaks the acoustic tasks."""

_HELDOUT_SHARE = 20


@dataclass(frozen=True, slots=True)
class HeardPair:
    """One sentence in two sounds.

    Attributes:
        property: a key of `PROPERTIES`.
        spoken: the two sounds; `replies[i]` fits `spoken[i]`.
        reference: which of the replies stands as the reference, in both sounds.
    """

    property: str
    spoken: tuple[Spoken, Spoken]
    replies: tuple[str, str]
    reference: int

    @property
    def text(self) -> str:
        return self.spoken[0].text

    def comparison(self, sound: AudioPart) -> Comparison:
        """The two replies to a sound of this sentence."""
        said = Said("user", self.text, (sound,))
        return Comparison((said,), self.replies[self.reference], self.replies[1 - self.reference])

    def response_fits(self, which: int) -> bool:
        """Whether the response, and not the reference, is right about sound `which`."""
        return which != self.reference

    def rationale(self, which: int, *, response_first: bool) -> str:
        """What the judge should write about sound `which`: what it hears, then what of it each reply says."""
        manners = PROPERTIES[self.property]
        first = 1 - self.reference if response_first else self.reference
        told = [f"the voice sounds {manners[which]} ."]
        for letter, reply in zip("AB", (first, 1 - first), strict=True):
            told.append(f"{letter} {manners[reply]} {'right' if reply == which else 'wrong'}")
        return " ".join(told)


def heard_pairs(*, seed: int, num: int, heldout: bool = False) -> Iterator[HeardPair]:
    """Pairs, as many of rate as of pitch, no sound twice."""
    random = Random(f"hearing/{seed}/{heldout}")
    used: set[Spoken] = set()
    properties = sorted(PROPERTIES)
    made = 0
    while made < num:
        pair = _draw_pair(random, properties[made % len(properties)], heldout=heldout)
        if pair is not None and used.isdisjoint(pair.spoken):
            used.update(pair.spoken)
            made += 1
            yield pair


def sentence_is_heldout(text: str) -> bool:
    digest = hashlib.sha256(f"hearing|{text}".encode()).digest()
    return int.from_bytes(digest[:4], "little") % 100 < _HELDOUT_SHARE


def voices(name: str, *, heldout: bool) -> Sequence[str]:
    """Who may speak for a property: for pitch those that share one boundary between high and low."""
    pitched = HELDOUT_VOICES_PITCHED if heldout else TRAIN_VOICES_PITCHED
    return pitched if name == "pitch" else [*pitched, *(HELDOUT_VOICES_OTHER if heldout else TRAIN_VOICES_OTHER)]


def _draw_pair(random: Random, name: str, *, heldout: bool) -> HeardPair | None:
    # Half of the sentences ask about the sound, half are about anything.
    task = name if random.random() < 0.5 else random.choice(tuple(TASKS))
    text = random.choice(TASKS[task](random).lines).text
    if sentence_is_heldout(text) != heldout:
        return None
    voice = f"en-us+{random.choice(voices(name, heldout=heldout))}"
    rate, pitch = random.randint(*RATES_WPM["plain"]), random.randint(*PITCHES["plain"])
    spoken, replies = [], []
    for manner in PROPERTIES[name]:
        if name == "rate":
            rate = random.randint(*RATES_WPM[manner])
        else:
            pitch = random.randint(*PITCHES[manner])
        spoken.append(Spoken(text, voice, rate, pitch))
        replies.append(Line(text, manner, "", "style").reply(random, warm=random.random() < 0.7))
    return HeardPair(name, (spoken[0], spoken[1]), (replies[0], replies[1]), random.randrange(2))


def speak(spoken: Spoken, store: ClipStore) -> AudioPart:
    """Put the sound into the store."""
    samples = synthesizer().speak(spoken.text, voice=spoken.voice, rate_wpm=spoken.rate_wpm, pitch=spoken.pitch)
    clip = store.put(samples)
    return AudioPart(store.uri(clip.sha256), clip.sha256, SAMPLE_RATE_HZ, transcript=spoken.text)


def heard_rows(family: ModelFamily, pairs: Sequence[HeardPair], *, clips: ClipStore) -> pa.RecordBatch:
    """Supervised rows in the experience schema: both sounds of every pair, each in both orders."""
    prompt = JudgePrompt(
        family.tokenizer, style=family.style, pieces=lambda part: clip_pieces(part, family=family, clips=clips)
    )
    asked = [
        (number, pair, which, comparison, first)
        for number, pair in enumerate(pairs)
        for which in (0, 1)
        for comparison in [pair.comparison(speak(pair.spoken[which], clips))]
        for first in (False, True)
    ]
    prompts = [prompt.render(comparison, response_first=first) for *_, comparison, first in asked]
    rationales = [pair.rationale(which, response_first=first) for _, pair, which, _, first in asked]
    best = prompt.scale.num_levels - 1
    verdicts = [best if pair.response_fits(which) == first else 0 for _, pair, which, _, first in asked]
    return make_batch(
        prompt_id=[f"heard-{number}-{which}" for number, _, which, _, _ in asked],
        task=[pair.property for _, pair, *_ in asked],
        group=[number for number, *_ in asked],
        sibling=[0] * len(asked),
        turn=[0] * len(asked),
        prompt_ids=[one.ids for one in prompts],
        response_ids=[prompt.answer(text, verdict) for text, verdict in zip(rationales, verdicts, strict=True)],
        clips=[one.clips for one in prompts],
        thinking=rationales,
        reply=[prompt.scale.words[verdict] for verdict in verdicts],
    )
