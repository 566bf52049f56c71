"""What a reward model learns from: comparisons with a known verdict, as JSON lines.

One object per line: `id`, `axis`?, `license`?, `messages[]` (the dialogue up to the user message that is answered:
`role`, `content[]` of `{"text"}` or `{"audio", "sha256", "sample_rate", "transcript"?}` as in prompt records; as much
of it as the judge will be shown, see `max_history` of `GenerativeJudge`), then

- two replies: `reference` (taken to be right) and `response`; or `responses: [one, other]`, where neither is special;
- one label: `level` of the second against the first, 0 much worse to `levels - 1` much better; or `preferred`:
  "reference", "response", 0, 1 or "same"; or `items`, one per entry of `rubric`: a level, or whether each of the two
  meets the item, `{"reference": true, "response": false}` (with `responses`: `[true, false]`);
- `rubric`? `[{"text", "weight"?, "critical"?}]`: read whole with `level` and `preferred`, item by item with `items`;
- `reasoning`? what a judge shall write before its verdict: `{"as_given": ..., "swapped": ...}`, where A is the first of
  the two and where it is the second; one string where it names neither letter; with `items` a list of those.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rlaudio.audio.store import ClipStore
from rlaudio.errors import AudioError
from rlaudio.rewards.json_fields import BadField, Fields, read_objects
from rlaudio.rewards.levels import FIVE, Scale
from rlaudio.rewards.prompt import Comparison, Said, whole_rubric
from rlaudio.types import AudioPart, Part, Role, RubricItem, TextPart

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LETTER = re.compile(r"\bB\b|(?<!^)(?<![.!?]\s)\bA\b")
"""A letter that stands for a reply. "A" that begins a sentence is an article."""

_FIELDS = (
    "id", "axis", "license", "messages", "reference", "response", "responses",
    "level", "preferred", "items", "rubric", "reasoning",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Labelled:
    """One comparison with its known verdict.

    Attributes:
        id: the record's, with the number of the rubric item and "swapped" where a record makes several.
        record_id: several comparisons of one record are not independent.
        level: of the response, 0 much worse than the reference.
        exact: False where only the side is known: `level` is then the mildest one on it.
        reasoning: what to write with the response second (B), and with it first; None where nothing is known.
    """

    id: str
    record_id: str
    comparison: Comparison
    level: int
    exact: bool = True
    reasoning: tuple[str, str] | None = None
    axis: str | None = None


def read_preferences(
    path: str | Path, *, scale: Scale = FIVE, hears: bool = False, clips: ClipStore | None = None
) -> list[Labelled]:
    """Read and check a file; a record makes one comparison, or one per rubric item, and with `responses` twice as many.

    Args:
        scale: of the judge; levels are numbers on it.
        hears: the judge is given the sounds. Otherwise each needs a transcript.
        clips: where given, every sound is looked up.

    Raises:
        DataError: the file cannot be read, or holds bad records: names file:line, id, field, value and fix.
    """
    reader = _Reader(scale, hears=hears, clips=clips)
    records = read_objects(path, reader.record, id_of=lambda made: made[0].record_id)
    return [one for made in records for one in made]


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two replies, the first of them what the other is compared with."""

    first: str
    second: str
    special: bool

    @property
    def names(self) -> tuple[str, str]:
        return ("reference", "response") if self.special else ("0", "1")


class _Reader:
    def __init__(self, scale: Scale, *, hears: bool, clips: ClipStore | None) -> None:
        self._scale, self._hears, self._clips = scale, hears, clips
        self._heard: set[str] = set()

    def record(self, value: object) -> list[Labelled]:
        fields = Fields(value, allowed=_FIELDS)
        name, pair = fields.text("id"), _pair(fields)
        history = tuple(self._said(item, f"messages[{i}]") for i, item in enumerate(fields.items("messages")))
        if history[-1].role != "user":
            raise fields.bad("messages", "the last message is the one that is answered: it must be from the user")
        rubric = tuple(_rubric_item(v, f"rubric[{i}]") for i, v in enumerate(_optional_list(fields, "rubric")))
        labels = [label for label in ("level", "preferred", "items") if label in fields]
        if len(labels) != 1:
            raise BadField("level, preferred, items", labels, "give exactly one of the three")
        whole = Labelled(
            name,
            name,
            Comparison(history, pair.first, pair.second, whole_rubric(rubric) if rubric else None),
            level=0,
            axis=fields.optional_text("axis"),
        )
        if "items" in fields:
            made = list(self._item_labels(fields, whole, rubric, pair))
        else:
            level, exact = self._label(fields, labels[0], pair)
            reasoning = _reasoning(fields.get("reasoning"), "reasoning")
            made = [replace(whole, level=level, exact=exact, reasoning=reasoning)]
        return made if pair.special else [one for label in made for one in (label, self._swapped(label))]

    def _item_labels(
        self, fields: Fields, whole: Labelled, rubric: Sequence[RubricItem], pair: _Pair
    ) -> Iterator[Labelled]:
        items = fields.items("items")
        if len(items) != len(rubric):
            raise fields.bad("items", f"rubric has {len(rubric)} items: give one label for each")
        told = fields.get("reasoning") or [None] * len(items)
        if not isinstance(told, list) or len(told) != len(items):
            raise fields.bad("reasoning", f"with items it is a list of {len(items)}, one per item")
        for number, (item, label) in enumerate(zip(rubric, items, strict=True)):
            level, exact = self._item_label(label, f"items[{number}]", pair)
            yield replace(
                whole,
                id=f"{whole.id}#{number}",
                comparison=replace(whole.comparison, criterion=item.text),
                level=level,
                exact=exact,
                reasoning=_reasoning(told[number], f"reasoning[{number}]"),
            )

    def _swapped(self, label: Labelled) -> Labelled:
        """The same two replies with the other one as the reference."""
        shown = label.comparison
        return replace(
            label,
            id=f"{label.id}/swapped",
            comparison=replace(shown, reference=shown.response, response=shown.reference),
            level=self._scale.num_levels - 1 - label.level,
            reasoning=None if label.reasoning is None else (label.reasoning[1], label.reasoning[0]),
        )

    def _label(self, fields: Fields, label: str, pair: _Pair) -> tuple[int, bool]:
        if label == "level":
            return fields.whole("level", low=0, high=self._scale.num_levels - 1), True
        value = fields.get("preferred")
        sides: dict[object, int] = dict(zip(pair.names if pair.special else (0, 1), (-1, 1), strict=True))
        side = 0 if value == "same" else None if isinstance(value, bool) else sides.get(value)
        if side is None:
            raise fields.bad("preferred", f"must be one of {', '.join(map(repr, sides))} and 'same'")
        return self._mildest(side, fields.place("preferred"), value), False

    def _item_label(self, value: object, at: str, pair: _Pair) -> tuple[int, bool]:
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < self._scale.num_levels:
                raise BadField(at, value, f"must be a whole number from 0 to {self._scale.num_levels - 1}")
            return value, True
        met = value
        if pair.special:
            met = [value.get(name) for name in pair.names] if isinstance(value, dict) else None
        if not isinstance(met, list) or len(met) != 2 or not all(isinstance(one, bool) for one in met):
            shape = '{"reference": true, "response": false}' if pair.special else "[true, false]"
            raise BadField(at, value, f"must be a level, or whether each of the two meets the item: {shape}")
        return self._mildest(int(met[1]) - int(met[0]), at, value), False

    def _mildest(self, side: int, at: str, value: object) -> int:
        """The level next to the middle on a side: more than the side is not known."""
        top = self._scale.num_levels - 1
        if side == 0:
            if top % 2:
                raise BadField(at, value, f"{self._scale.num_levels} levels have no 'same': use an odd number")
            return top // 2
        return top // 2 + 1 if side > 0 else (top + 1) // 2 - 1

    def _said(self, value: object, at: str) -> Said:
        fields = Fields(value, at, allowed=("role", "content"))
        role = fields.text("role")
        if role not in ("system", "user", "assistant"):
            raise fields.bad("role", "use one of system, user, assistant")
        parts = tuple(self._part(item, f"{at}.content[{i}]") for i, item in enumerate(fields.items("content")))
        texts = [part.text if isinstance(part, TextPart) else part.transcript or "" for part in parts]
        return Said(cast(Role, role), " ".join(texts).strip(), parts)

    def _part(self, value: object, at: str) -> Part:
        fields = Fields(value, at, allowed=("audio", "sha256", "sample_rate", "transcript", "text"))
        if "audio" not in fields:
            return TextPart(fields.text("text"))
        sha256, rate = fields.text("sha256"), fields.whole("sample_rate", low=1, high=10_000_000)
        if not _SHA256.fullmatch(sha256):
            raise fields.bad("sha256", "give 64 lower-case hex digits")
        part = AudioPart(fields.text("audio"), sha256, rate, fields.optional_text("transcript"))
        if part.transcript is None and not self._hears:
            raise fields.bad("transcript", "this judge does not hear: add it, or set judge.hears=sound")
        if self._hears and self._clips is not None and sha256 not in self._heard:
            try:
                self._clips.check(sha256)
            except AudioError as error:
                raise fields.bad("audio", str(error)) from error
            self._heard.add(sha256)
        return part


def _pair(fields: Fields) -> _Pair:
    if "responses" not in fields:
        return _Pair(fields.text("reference"), fields.text("response"), special=True)
    if "reference" in fields or "response" in fields:
        raise fields.bad("responses", "give either responses, or reference and response")
    replies = fields.texts("responses")
    if len(replies) != 2:
        raise fields.bad("responses", "give the two replies that were compared")
    return _Pair(*replies, special=False)


def _rubric_item(value: object, at: str) -> RubricItem:
    fields = Fields(value, at, allowed=("text", "weight", "critical"))
    weight, critical = fields.get("weight"), fields.get("critical")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf
    ):
        raise fields.bad("weight", "give a positive finite number")
    if critical is not None and not isinstance(critical, bool):
        raise fields.bad("critical", "give true or false")
    return RubricItem(fields.text("text"), weight=float(weight or 1.0), critical=bool(critical))


def _optional_list(fields: Fields, name: str) -> Sequence[Any]:
    return fields.items(name) if name in fields else ()


def _reasoning(value: object, at: str) -> tuple[str, str] | None:
    """(as given, swapped)."""
    if value is None:
        return None
    if isinstance(value, str):
        if not value.strip() or _LETTER.search(value):
            raise BadField(
                at, value, 'one text must serve both orders, and this is empty or names A or B: give {"as_given": ..., '
                '"swapped": ...}'
            )  # fmt: skip
        return value, value
    fields = Fields(value, at, allowed=("as_given", "swapped"))
    return fields.text("as_given"), fields.text("swapped")
