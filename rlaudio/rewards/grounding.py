"""Does reasoning speak of perceived sound, or does it quote a transcript? A lexicon measure with its limits.

Counted are the *aspects* of sound that a text names (pitch, rate, loudness, pauses, intonation, emotion, voice,
speaker, background), in two ways: phrases that mean sound by themselves ("pitch", "out of breath"), and words that do
so only near a word for sound ("high" within four words of "voice"). Not counted is what

- repeats the user: runs of three words or more that the transcript holds, words for sound in them included. Reasoning
  that only says the question again, "is my voice high or low", has perceived nothing;
- leaves it open: "high or low" names two words of one aspect joined by "or".

Three more things lower the value: the share of the reasoning that repeats the transcript, speaking of the sound as text
("the transcript says"), and denying to hear ("I cannot hear the audio": value 0).

What it cannot know: whether the perception is true (mix it with a verified answer; `AcousticGrounding` pays only for
right ones by default), nor whether it was needed. It reads English, word by word: irony, paraphrase without these words
and other languages are missed, and a policy that sprinkles "the tone is calm" everywhere is paid. `wanted` aspects are
enough, so stuffing more in pays nothing. It is meant as a small reward on tasks that need hearing, and as the filter of
modality-grounded distillation (MGRD, arXiv:2511.15848), where wrong answers are thrown out anyway.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rlaudio.errors import ConfigError
from rlaudio.rewards.wording import words

_NEAR = 4
_RUN = 3


@dataclass(frozen=True, slots=True)
class Aspect:
    """How one property of sound is named; "*" at the end of a word stands for any ending.

    Attributes:
        clear: phrases that mean it by themselves.
        near: single words that mean it only near a word for sound.
    """

    clear: tuple[str, ...]
    near: tuple[str, ...] = ()


SOUND_WORDS = (
    "voice* sound* speech speak* spoken spoke tone audio utterance* recording* clip hear hears heard hearing listen* "
    "talk* delivery"
).split()

ASPECTS: Mapping[str, Aspect] = {
    "pitch": Aspect(
        ("pitch*", "high pitched", "low pitched", "fundamental frequency", "falsetto", "octave*"),
        ("high", "higher", "low", "lower", "deep", "deeper", "shrill", "rising", "falling", "treble", "bass"),
    ),
    "rate": Aspect(
        ("tempo", "speech rate", "speaking rate", "words per minute", "drawl*", "rushed"),
        ("pace*", "fast", "faster", "slow", "slower", "slowly", "quick*", "rapid*", "hurried*", "unhurried"),
    ),
    "loudness": Aspect(
        ("loudness", "whisper*", "shout*", "yell*", "murmur*", "mumbl*", "decibel*"),
        ("volume", "loud*", "quiet*", "soft*", "faint*"),
    ),
    "pauses": Aspect(
        ("pause*", "pausing", "hesitat*", "stammer*", "stutter*", "filled pause*", "false start*", "silence between"),
        ("silent", "silence", "break*", "um", "uh"),
    ),
    "intonation": Aspect(
        ("intonation", "prosod*", "cadence", "rhythm*", "inflection", "monoton*", "singsong", "stressed syllable*"),
        ("emphas*", "stress*", "flat", "melod*", "lilting"),
    ),
    "emotion": Aspect(
        ("tone of voice", "sigh*", "sob*", "laugh*", "giggl*", "chuckl*", "trembl*", "choked up", "tearful"),
        tuple("happy sad angry calm* excit* nervous* anxious* cheerful* sarcas* bored tired upset warm* tense".split()),
    ),
    "voice": Aspect(
        ("timbre", "breath*", "hoarse*", "raspy", "husky", "nasal", "creak*", "gravelly", "resonan*", "out of breath"),
        tuple("rough smooth thin bright dark clear harsh shaky".split()),
    ),
    "speaker": Aspect(
        ("accent*", "male voice", "female voice", "two speakers", "another speaker", "native speaker", "dialect"),
        tuple("man woman male female child elderly young old boy girl".split()),
    ),
    "background": Aspect(
        ("background noise*", "background music", "in the background", "noise", "noisy", "reverb*"),
        tuple("background echo* static hum music traffic siren* birdsong distant muffled crackl* rain wind".split()),
    ),
}

_SPEAKS_OF_TEXT = re.compile(
    r"\b(?:transcripts?|transcription|captions?|subtitles?|(?:the|this|given|provided) text|"
    r"(?:user|speaker|he|she|they) (?:wrote|typed|writes|types)|as written|reading the (?:words|question))\b",
    re.IGNORECASE,
)
_DENIES_HEARING = re.compile(
    r"\b(?:can\s?not|can['’]?t|could\s?n['’]?o?t|could not|unable to|do(?:es)? ?n['’]?o?t|did ?n['’]?o?t)\s+"
    r"(?:\w+\s+)?(?:hear|listen|perceive|access)\b|"
    r"\bno (?:audio|sound|recording)(?: \w+)? (?:available|provided|given|attached|file)\b|"
    r"\bwithout (?:the |any )?(?:audio|sound|hearing|listening)\b|\bonly (?:have |see )?(?:the )?(?:text|transcript)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Grounding:
    """What a reasoning says of sound.

    Attributes:
        aspects: those it names, in the lexicon's order.
        quoted: share of its words in runs of three or more that the transcript holds.
        speaks_of_text: it treats what was heard as something written.
        denies_hearing: it says that it hears nothing.
        value: in [0, 1]; see `measure_grounding`.
    """

    aspects: tuple[str, ...]
    quoted: float
    speaks_of_text: bool
    denies_hearing: bool
    value: float

    def keeps(self, *, wanted: int = 1, max_quoted: float = 0.5) -> bool:
        """MGRD's first condition: it names `wanted` aspects, hears, and does not mainly quote."""
        return (
            len(self.aspects) >= wanted
            and self.quoted <= max_quoted
            and not self.speaks_of_text
            and not self.denies_hearing
        )


def measure_grounding(
    thinking: str,
    transcript: str,
    *,
    aspects: Mapping[str, Aspect] = ASPECTS,
    wanted: int = 1,
    text_factor: float = 0.5,
) -> Grounding:
    """Measure one reasoning.

    `value` is min(1, aspects / wanted) * (1 - quoted), times `text_factor` where it speaks of text, and 0 where it
    denies hearing or is empty.

    Args:
        thinking: the reasoning, without its tags.
        transcript: everything the user said so far; empty where nobody knows.
        aspects: the lexicon; see `lexicon`.
    """
    said = words(thinking)
    quoted = _quoted(said, words(transcript))
    named = tuple(name for name, aspect in aspects.items() if _names(said, quoted, aspect))
    share = sum(quoted) / len(said) if said else 0.0
    of_text, denies = bool(_SPEAKS_OF_TEXT.search(thinking)), bool(_DENIES_HEARING.search(thinking))
    value = 0.0 if denies else min(1.0, len(named) / wanted) * (1.0 - share) * (text_factor if of_text else 1.0)
    return Grounding(named, share, of_text, denies, value)


def perceived(thinking: str, transcript: str, groups: Sequence[Sequence[str]]) -> list[int]:
    """What a reasoning says of the sound, in its order: of which group (by number) each such word is.

    Said of the sound is what stands near a word for sound, neither repeating the user nor left open ("high or low").

    Args:
        groups: single words, "*" at the end for any ending.
    """
    said = words(thinking)
    every = [phrase for group in groups for phrase in group]
    return [
        next(number for number, group in enumerate(groups) if any(_pattern(one).fullmatch(said[at]) for one in group))
        for at in _near_sound(said, _quoted(said, words(transcript)), every)
    ]


def lexicon(
    *, more: Mapping[str, Sequence[str]] | None = None, without: Iterable[str] = (), source: str = "grounding"
) -> dict[str, Aspect]:
    """`ASPECTS`, changed: phrases added to an aspect (or a new one), aspects left out.

    Raises:
        ConfigError: an aspect to leave out is unknown, all are left out, or an added phrase has no word.
    """
    made = dict(ASPECTS)
    for name, phrases in (more or {}).items():
        if isinstance(phrases, str) or not all(isinstance(one, str) and words(one.rstrip("*")) for one in phrases):
            raise ConfigError(f"reward source {source!r}: more.{name} is {phrases!r}, give a list of phrases")
        old = made.get(name, Aspect(()))
        made[name] = Aspect((*old.clear, *phrases), old.near)
    for name in without:
        if name not in made:
            near = difflib.get_close_matches(name, made, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(made)}"
            raise ConfigError(f"reward source {source!r}: without names the aspect {name!r}, {hint}")
        del made[name]
    if not made:
        raise ConfigError(f"reward source {source!r}: without leaves no aspect, keep one")
    return made


def _quoted(said: list[str], transcript: list[str]) -> list[bool]:
    """Which words lie in a run that the transcript holds; a shorter transcript is a run as a whole."""
    length = min(_RUN, len(transcript))
    runs = {tuple(transcript[i : i + length]) for i in range(len(transcript) - length + 1)} if length else set()
    marks = [False] * len(said)
    for at in range(len(said) - length + 1):
        if tuple(said[at : at + length]) in runs:
            marks[at : at + length] = [True] * length
    return marks


def _names(said: list[str], quoted: list[bool], aspect: Aspect) -> bool:
    for phrase in aspect.clear:
        patterns = [_pattern(word) for word in phrase.split()]
        for at in range(len(said) - len(patterns) + 1):
            if all(p.fullmatch(w) for p, w in zip(patterns, said[at:], strict=False)) and not quoted[at]:
                return True
    return bool(_near_sound(said, quoted, aspect.near))


def _near_sound(said: list[str], quoted: list[bool], phrases: Sequence[str]) -> list[int]:
    """Where one of these words stands near a word for sound; neither quoted, nor left open."""
    near = [any(_pattern(one).fullmatch(word) for one in phrases) for word in said]
    return [
        at
        for at in range(len(said))
        if near[at] and not quoted[at] and not _left_open(said, near, at) and _has_sound(said, quoted, at)
    ]


def _left_open(said: list[str], near: list[bool], at: int) -> bool:
    after = said[at + 1 : at + 2] == ["or"] and near[at + 2 : at + 3] == [True]
    before = at >= 2 and said[at - 1] == "or" and near[at - 2]
    return after or before


def _has_sound(said: list[str], quoted: list[bool], at: int) -> bool:
    """Whether one of the user's words for sound is near: not one that only repeats the question."""
    around = [word for place, word in enumerate(said) if 0 < abs(place - at) <= _NEAR and not quoted[place]]
    return any(_pattern(one).fullmatch(word) for one in SOUND_WORDS for word in around)


@lru_cache(maxsize=4096)
def _pattern(word: str) -> re.Pattern[str]:
    return re.compile(re.escape(word.rstrip("*")) + (r"\w*" if word.endswith("*") else ""))
