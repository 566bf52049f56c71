"""AudioMCQ: JSON lines of `id, audio_path, question, choices, answer` (the right choice's text), sounds beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlaudio.data.importers.base import Item, SkipError, Sounds, asked, field, json_items, lettered, the_file
from rlaudio.types import Message, PromptRecord, TextPart


class AudioMcq:
    license: str | None = "Apache-2.0"

    def items(self, source: Path) -> Iterator[Item]:
        the_file(source, "*.jsonl", "datasets/*.jsonl")
        for listing in sorted({*source.glob("*.jsonl"), *source.glob("datasets/*.jsonl")}):
            for place, fields in json_items(listing):
                yield Item(place, partial(_record, fields, source))


def _record(fields: Mapping[str, Any], source: Path, sounds: Sounds) -> PromptRecord:
    texts, answer = field(fields, "choices", list), field(fields, "answer", str)
    if answer not in texts:
        raise SkipError(f"its answer {answer!r} is none of its choices {texts}")
    choices, letter = lettered(texts, right=texts.index(answer))
    path = source / field(fields, "audio_path", str)
    if not path.resolve().is_relative_to(source.resolve()):
        raise SkipError(f"its sound {fields['audio_path']!r} lies outside the copy")
    text = TextPart(asked(field(fields, "question", str), choices))
    message = Message("user", (sounds.take(path), text), answer=letter, choices=choices)
    origin, name = str(fields.get("source_dataset") or "audiomcq"), fields.get("id")
    if not isinstance(name, str | int):
        raise SkipError(f"its field 'id' is {name!r}")
    return PromptRecord(f"audiomcq-{origin}-{name}", str(fields.get("question_type") or "audio question"), (message,))
