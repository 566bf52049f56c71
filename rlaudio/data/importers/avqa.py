"""AVQA, as R1-AQA trains on it: questions about the sound of a video, four choices.

Either the published list `train_qa.json` with the videos' sounds as files named after them, or R1-AQA's JSON lines with
an `audio_path`. A sound's file may be named `ID_000030` as in the list or `ID_30` as in VGGSound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlaudio.data.importers.base import (
    SOUND_SUFFIXES,
    Item,
    SkipError,
    Sounds,
    asked,
    field,
    json_items,
    lettered,
    the_file,
)
from rlaudio.types import Choice, Message, PromptRecord, TextPart


class Avqa:
    """Questions with lettered choices below them."""

    license: str | None = None

    def items(self, source: Path) -> Iterator[Item]:
        listing = the_file(source, "*_qa.json", "*.jsonl", "*.json")
        files = {path.stem: path for path in sorted(source.rglob("*")) if path.suffix.lower() in SOUND_SUFFIXES}
        for place, fields in json_items(listing):
            yield Item(place, partial(_record, fields, source, files, self.ask))

    def ask(self, question: str, choices: Sequence[Choice]) -> str:
        """What the policy reads beside the sound."""
        return asked(question, choices)


class AvqaTagged(Avqa):
    """The same in the words of R1-AQA's published code, which NeMo-RL took over: an answer between tags.

    For `rlaudio.rewards.tagged:TaggedAnswer`.
    """

    def ask(self, question: str, choices: Sequence[Choice]) -> str:
        texts = [choice.text for choice in choices]
        return (
            f"{question.replace('video', 'audio')} Please choose the answer from the following options: {texts}. "
            "Output the final answer in <answer> </answer>."
        )


def _record(
    fields: Mapping[str, Any],
    source: Path,
    files: Mapping[str, Path],
    ask: Callable[[str, Sequence[Choice]], str],
    sounds: Sounds,
) -> PromptRecord:
    choices, answer = lettered(field(fields, "multi_choice", list), right=field(fields, "answer", int))
    part = sounds.take(_sound(fields, source, files))
    text = TextPart(ask(field(fields, "question_text", str), choices))
    message = Message("user", (part, text), answer=answer, choices=choices)
    task = str(fields.get("question_type") or "audio question").lower()
    return PromptRecord(f"avqa-{field(fields, 'id', int)}", task, (message,), axis=fields.get("question_relation"))


def _sound(fields: Mapping[str, Any], source: Path, files: Mapping[str, Path]) -> Path:
    if path := fields.get("audio_path"):
        for place in (source / str(path), files.get(Path(str(path)).stem)):
            if place is not None and place.is_file() and place.resolve().is_relative_to(source.resolve()):
                return place
        raise SkipError(f"its sound {path!r} is not in the copy")
    name = field(fields, "video_name", str)
    head, _, start_s = name.rpartition("_")
    short = f"{head}_{int(start_s)}" if start_s.isdigit() else name
    if found := files.get(name) or files.get(short):
        return found
    raise SkipError(f"its sound {name!r} (or {short!r}) is not in the copy")
