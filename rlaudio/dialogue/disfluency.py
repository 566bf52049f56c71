"""How people talk: hesitations, self-repairs and revisions put into a text, by seed alone.

Nothing that is meant gets lost: every word of the text is said, in its order, and the last word on a matter is its own.
The kinds are those of Shriberg, "Preliminaries to a theory of speech disfluencies" (1994): filled pauses, repetitions,
and substitutions with an editing term.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

FILLERS = ("um,", "uh,", "well,")
EDITING_TERMS = ("no, sorry,", "no, wait,", "I mean,")
CLASSES: tuple[tuple[str, ...], ...] = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    tuple("January February March April May June July August September October November December".split()),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    ("first", "second", "third", "fourth", "fifth"),
    ("morning", "afternoon", "evening"),
    ("left", "right"),
)
"""Words of one kind: a user may begin with the wrong one."""

_WORD = re.compile(r"[^\s\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]")
"""A word where words are parted by space; a character of Chinese and Japanese, which part none."""


@dataclass(frozen=True, slots=True)
class Disfluency:
    """How often, and with which words; the defaults are English.

    Attributes:
        hesitations: chance of a filler before each word.
        repairs: chance that a text's speaker stumbles once: says up to three words, and says them again.
        revisions: chance that the speaker first says another word of a class, where the text has one of it.
        fillers: of hesitations and stumbles.
        editing_terms: between the wrong word and the right one.
        classes: words of one kind, see `CLASSES`.
    """

    hesitations: float = 0.05
    repairs: float = 0.15
    revisions: float = 0.15
    fillers: Sequence[str] = FILLERS
    editing_terms: Sequence[str] = EDITING_TERMS
    classes: Sequence[Sequence[str]] = field(default=CLASSES)

    def problems(self) -> Iterator[str]:
        for name in ("hesitations", "repairs", "revisions"):
            yield from chance_problems(**{name: getattr(self, name)})
        if not self.fillers and (self.hesitations or self.repairs):
            yield "fillers is empty: give some, or set hesitations and repairs to 0"
        if not self.editing_terms and self.revisions:
            yield "editing_terms is empty: give some, or set revisions to 0"


def chance_problems(**chances: float) -> Iterator[str]:
    for name, value in chances.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            yield f"{name} is {value!r}: set a chance, 0 to 1"


def disfluent(text: str, how: Disfluency, *, seed: str) -> str:
    """`text` as somebody says it who thinks while speaking; equal texts, settings and seeds give equal speech."""
    drawn = random.Random(seed)  # of text: the same on every machine
    words = text.split()
    before: dict[int, str] = {}
    # Always all draws in one order, so that one setting does not change what another one does.
    stumbles, revises = drawn.random() < how.repairs, drawn.random() < how.revisions
    where, length, term = drawn.random(), 1 + drawn.randrange(3), drawn.random()
    if revises and (found := _revisable(words, how.classes)):
        place, others = found[drawn.randrange(len(found))]
        before[place] = f"{_plain(others[drawn.randrange(len(others))])}, {_pick(how.editing_terms, term)}"
    if stumbles and len(words) > 1:
        start = int(where * (len(words) - 1))
        again = " ".join(_plain(word) for word in words[start : start + length])
        before.setdefault(start, f"{again}, {_pick(how.fillers, term)}")
    said: list[str] = []
    for place, word in enumerate(words):
        if drawn.random() < how.hesitations:
            said.append(_pick(how.fillers, drawn.random()))
        said += [before[place], word] if place in before else [word]
    return " ".join(said)


def first_words(text: str, num_words: int) -> str:
    """The beginning of `text` up to the end of its `num_words`-th word."""
    ends = [match.end() for match in _WORD.finditer(text)]
    return text[: ends[min(num_words, len(ends)) - 1]] if ends and num_words > 0 else ""


def count_words(text: str) -> int:
    return sum(1 for _ in _WORD.finditer(text))


def _revisable(words: Sequence[str], classes: Sequence[Sequence[str]]) -> list[tuple[int, list[str]]]:
    """(place of a word, the others of its class)."""
    others: Mapping[str, list[str]] = {
        word.casefold(): [other for other in one if other != word] for one in classes for word in one
    }
    places = ((place, others.get(_plain(word).casefold(), [])) for place, word in enumerate(words))
    return [(place, found) for place, found in places if found]


def _plain(word: str) -> str:
    return word.strip(".,;:!?\"'()")


def _pick(choices: Sequence[str], draw: float) -> str:
    return choices[int(draw * len(choices))]


def sentences_within(text: str, max_words: int) -> str:
    """`text` if it is short enough, else its whole sentences that are, else its first words."""
    if count_words(text) <= max_words:
        return text
    ends = [match.end() for match in re.finditer(r"[.!?。！？]+(?=\s|$)", text)]
    fitting = [end for end in ends if count_words(text[:end]) <= max_words]
    return text[: fitting[-1]] if fitting else first_words(text, max_words)
