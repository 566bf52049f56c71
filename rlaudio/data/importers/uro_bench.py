"""URO-Bench: folders with JSON lines `{id, dialogue: [{round, source_wav, source_text, target_text}]}`, or one round.

Every round is played; its `target_text` is the reference, where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlaudio.data.importers.base import Item, SkipError, Sounds, field, json_items, the_file
from rlaudio.types import Message, PromptRecord


class UroBench:
    license: str | None = "MIT"

    def items(self, source: Path) -> Iterator[Item]:
        the_file(source, "*.jsonl", "*/*.jsonl", "*/*/*.jsonl")
        for listing in sorted(source.rglob("*.jsonl")):
            name = listing.parent.relative_to(source).as_posix().replace("/", "-")
            task = listing.parent.name if name != "." else listing.stem
            for place, fields in json_items(listing):
                yield Item(f"{name}/{place}", partial(_record, fields, listing.parent, task))


def _record(fields: Mapping[str, Any], folder: Path, task: str, sounds: Sounds) -> PromptRecord:
    rounds = fields.get("dialogue") or [fields]
    if not isinstance(rounds, list) or not all(isinstance(one, dict) for one in rounds):
        raise SkipError("its dialogue is no list of rounds")
    language = next((tag for tag in ("zh", "en") if task.lower().endswith(tag)), None)
    messages = []
    for one in sorted(rounds, key=lambda one: int(one.get("round") or 0)):
        path = folder / field(one, "source_wav", str)
        if not path.resolve().is_relative_to(folder.resolve().parent):
            raise SkipError(f"its sound {one['source_wav']!r} lies outside the copy")
        target = one.get("target_text") or None  # a list where several answers are right: none is the reference
        part = sounds.take(path, said=one.get("source_text"), language=language)
        reference = target if isinstance(target, str) else None
        messages.append(Message("user", (part,), reference_response=reference))
    name = fields.get("id")
    if not isinstance(name, str | int):
        raise SkipError(f"its field 'id' is {name!r}")
    return PromptRecord(f"uro-{task}-{name}", task, tuple(messages))
