"""Whether what a reasoning says of the user's voice is true of the sound, as `audio.measures` measures it.

`grounding` asks whether a reasoning speaks of perceived sound at all; this asks whether the sound is so. The last thing
that the reasoning says of each fact counts, near a word for sound, neither quoted from the user nor left open.
"""

import difflib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlaudio.audio.measures import MEASURES, measure
from rlaudio.dialogue.users import user_message
from rlaudio.errors import ConfigError
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.grounding import perceived
from rlaudio.rewards.verifier import Finding, Verifier, require_finite
from rlaudio.rewards.wording import words
from rlaudio.types import AudioPart, PromptRecord, Turn

RATE = "words_per_s"
"""Words of the transcript per second of speech; a measure of the sound and its words together."""
_CACHE = 4096
_FIELDS = ("measure", "boundary", "below", "above")


@dataclass(frozen=True, slots=True)
class Fact:
    """What words say of a measure: `below` are true under the boundary, `above` over it.

    Attributes:
        measure: one of `audio.measures.MEASURES`, or `RATE`.
        boundary: in the measure's unit.
    """

    measure: str
    boundary: float
    below: tuple[str, ...]
    above: tuple[str, ...]


class MeasuredSound(Verifier):
    """1 where the reasoning says one of the facts of the user's sound and all that it says is true; else 0.

    `said` in its detail is how many facts it speaks of, `true` how many of them are so. A message without a sound is
    not spoken of; of several sounds in one message the last counts.

    Args:
        facts: each with `measure`, `boundary`, and the single words `below` and `above`.
    """

    slow = True

    def __init__(
        self,
        services: JudgeServices,
        *,
        name: str = "measured",
        unplayed: float = 0.0,
        facts: Sequence[Mapping[str, object]],
    ) -> None:
        super().__init__(services, name=name, unplayed=unplayed)
        if not facts:
            raise ConfigError(f"reward source {name!r}: facts is empty, name at least one with {', '.join(_FIELDS)}")
        self._facts = [_checked(name, index, fact) for index, fact in enumerate(facts)]
        self._services = services
        self._known: OrderedDict[str, Mapping[str, float]] = OrderedDict()
        self._lock = threading.Lock()

    def speaks_of(self, record: PromptRecord, turn: int) -> bool:
        return _sound(record, turn) is not None

    def check(self, record: PromptRecord, turn: Turn) -> Finding:
        sound = _sound(record, turn.index)
        assert sound is not None, "asked only of turns that it speaks of"
        heard = " ".join(user_message(record, index).text for index in range(turn.index + 1))
        said, true = 0, 0
        for fact in self._facts:
            if mentions := perceived(turn.thinking or "", heard, (fact.below, fact.above)):
                said += 1
                true += mentions[-1] == int(self._measured(sound)[fact.measure] > fact.boundary)
        return Finding(float(0 < said == true), {"said": float(said), "true": float(true)})

    def _measured(self, sound: AudioPart) -> Mapping[str, float]:
        """Measures of a sound, taken once. Raises AudioError: it cannot be read or measured."""
        with self._lock:
            if sound.sha256 not in self._known:
                found = measure(self._services.require_clips(self.name).get(sound.sha256).samples).as_dict()
                found[RATE] = len(words(sound.transcript or "")) / max(found["duration_s"], 1e-2)
                self._known[sound.sha256] = found
                while len(self._known) > _CACHE:
                    self._known.popitem(last=False)
            return self._known[sound.sha256]


def _sound(record: PromptRecord, turn: int) -> AudioPart | None:
    sounds = [part for part in user_message(record, turn).parts if isinstance(part, AudioPart)]
    return sounds[-1] if sounds else None


def _checked(source: str, index: int, fact: Mapping[str, object]) -> Fact:
    place = f"reward source {source!r}: facts[{index}]"
    if not isinstance(fact, Mapping) or set(fact) != set(_FIELDS):
        raise ConfigError(f"{place} is {fact!r}, give {', '.join(_FIELDS)}")
    known = (*MEASURES, RATE)
    named, boundary = fact["measure"], fact["boundary"]
    if named not in known:
        near = difflib.get_close_matches(str(named), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"measures are {', '.join(known)}"
        raise ConfigError(f"{place}.measure is {named!r}: {hint}")
    require_finite(f"{source}: facts[{index}]", boundary=boundary)  # type: ignore[arg-type]
    below, above = (_words(place, key, fact[key]) for key in ("below", "above"))
    if both := sorted(set(below) & set(above)):
        raise ConfigError(f"{place}: {both[0]!r} is in below and in above, leave it in one")
    return Fact(str(named), float(boundary), below, above)  # type: ignore[arg-type]


def _words(place: str, key: str, given: object) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ConfigError(f"{place}.{key} is {given!r}, give a list of words")
    for word in given:
        if not isinstance(word, str) or len(words(word.rstrip("*"))) != 1:
            raise ConfigError(f"{place}.{key} names {word!r}, give single words")
    return tuple(given)
