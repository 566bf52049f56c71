"""MultiChallenge: spoken (AudioMultiChallenge, parquet) or written (JSON lines); given replies, one turn to be played.

The spoken set has columns `id, axis, user_turn_{k}_audio, user_turn_{k}_transcript, assistant_turn_{k}_transcript,
rubric`; the written one `QUESTION_ID, AXIS, CONVERSATION, TARGET_QUESTION, PASS_CRITERIA`. What is written is spoken by
`rlaudio data speak`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rlaudio.data.importers.base import Item, SkipError, Sounds, field, json_items, the_file
from rlaudio.errors import DataError
from rlaudio.types import Message, PromptRecord, RubricItem, TextPart

_MAX_TURNS = 8
_ROWS = 8
"""Rows hold their sounds: few are held at once."""


class MultiChallenge:
    license: str | None = "MIT"

    def items(self, source: Path) -> Iterator[Item]:
        listing = the_file(source, "*.parquet", "*/*.parquet", "*.jsonl", "*/*.jsonl")
        if listing.suffix != ".parquet":
            for place, fields in json_items(listing):
                yield Item(place, partial(_written, fields))
            return
        try:
            for number, batch in enumerate(pq.ParquetFile(listing).iter_batches(_ROWS)):
                for row, fields in enumerate(batch.to_pylist()):
                    yield Item(f"{listing.name}:{number * _ROWS + row}", partial(_spoken, fields))
        except pa.ArrowInvalid as error:
            raise DataError(f"{listing}: is no parquet file ({error}); fetch it again") from error


def _spoken(fields: Mapping[str, Any], sounds: Sounds) -> PromptRecord:
    turns = [k for k in range(1, _MAX_TURNS + 1) if fields.get(f"user_turn_{k}_audio")]
    if not turns:
        raise SkipError("it has no user turn with sound")
    messages: list[Message] = []
    for k in turns:
        data = field(fields[f"user_turn_{k}_audio"], "bytes", bytes)
        part = sounds.take(data, said=fields.get(f"user_turn_{k}_transcript"), language="en")
        last = k == turns[-1]
        messages.append(Message("user", (part,), rubric=_rubric(fields) if last else ()))
        if not last:
            messages.append(Message("assistant", (TextPart(field(fields, f"assistant_turn_{k}_transcript", str)),)))
    name, axis = str(fields.get("id")), str(fields.get("axis"))
    return PromptRecord(f"audiomc-{name}", "multi-turn dialogue", tuple(messages), axis=axis.lower())


def _rubric(fields: Mapping[str, Any]) -> tuple[RubricItem, ...]:
    try:
        items = json.loads(field(fields, "rubric", str))
    except ValueError as error:
        raise SkipError(f"its rubric is no JSON ({error})") from error
    texts = [item if isinstance(item, str) else item.get("criterion") or item.get("text") for item in items]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise SkipError(f"its rubric is no list of criteria: {str(items)[:80]}")
    return tuple(RubricItem(text) for text in texts)


def _written(fields: Mapping[str, Any], sounds: Sounds) -> PromptRecord:
    said = field(fields, "CONVERSATION", list)
    criterion = f"{field(fields, 'TARGET_QUESTION', str)} The right answer is {field(fields, 'PASS_CRITERIA', str)}."
    messages = [Message(field(one, "role", str), (TextPart(field(one, "content", str)),)) for one in said]  # type: ignore[arg-type]
    if messages[-1].role != "user":
        raise SkipError("its conversation does not end with the user")
    messages[-1] = Message("user", messages[-1].parts, rubric=(RubricItem(criterion),))
    axis = str(fields.get("AXIS") or "").lower().replace(" ", "_") or None
    name = field(fields, "QUESTION_ID", str)
    return PromptRecord(f"multichallenge-{name}", "multi-turn dialogue", tuple(messages), axis=axis)
