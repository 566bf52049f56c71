"""Prompt records as JSON lines: read with every problem named at once, written so that they read back equal.

One object per line: `id`, `task`, `axis`?, `license`?, `sources`? `[reward source]`, `messages[]`. A message is `role`,
`content[]` of `{"audio": uri, "sha256", "sample_rate", "transcript"?}` or `{"text": ...}`, and on user messages
`answer`?, `choices`? `{letter: text}`, `constraints`? `[{kind, value, persists?}]`, `reference_response`?,
`rubric`? `[{text, weight?, critical?}]`; on assistant messages `thinking`?; on any `title`?, see `types.Message`. Sound
URIs are relative to the data root (the folder of the clip store).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import cast

from rlaudio.audio.store import ClipStore
from rlaudio.errors import AudioError, DataError
from rlaudio.types import AudioPart, Choice, Constraint, Message, Part, PromptRecord, Role, RubricItem, TextPart

MAX_PROBLEMS = 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROLES = ("system", "user", "assistant")


def read_records(path: str | Path, *, complete: bool = False, clips: ClipStore | None = None) -> list[PromptRecord]:
    """Read and check a file of records.

    Args:
        path: JSON lines, UTF-8; empty lines are skipped.
        complete: False reads prompts, whose last message is from the user and is to be played; True reads whole
            dialogues to learn from, whose last message is from the assistant.
        clips: where given, every sound's header is checked too.

    Raises:
        DataError: the file cannot be read, holds no record, or holds bad ones: names file:line, field, value and fix of
            up to `MAX_PROBLEMS` problems; of a bad sound file:line, place in the record, clip and reason.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path, or make the data first") from error
    reader = _Reader(str(path), complete=complete, sounds=None if clips is None else _Sounds(clips))
    for number, line in enumerate(lines, start=1):
        if line.strip():
            reader.add_line(number, line)
    return reader.finish()


def write_records(path: str | Path, records: Iterable[PromptRecord]) -> None:
    """Write records as JSON lines, atomically: readers see the old file or the new one. Raises DataError."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record_to_json(record), ensure_ascii=False) + "\n")
        os.replace(partial, target)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); check the folder and free space") from error


def record_to_json(record: PromptRecord) -> dict[str, object]:
    """The JSON object of one record, without the fields that hold nothing."""
    line: dict[str, object] = {"id": record.id, "task": record.task}
    if record.axis is not None:
        line["axis"] = record.axis
    if record.license is not None:
        line["license"] = record.license
    if record.sources:
        line["sources"] = list(record.sources)
    line["messages"] = [_message_to_json(message) for message in record.messages]
    return line


def _message_to_json(message: Message) -> dict[str, object]:
    line: dict[str, object] = {"role": message.role, "content": [_part_to_json(part) for part in message.parts]}
    if message.title is not None:
        line["title"] = message.title
    if message.thinking is not None:
        line["thinking"] = message.thinking
    if message.answer is not None:
        line["answer"] = message.answer
    if message.choices:
        line["choices"] = {choice.letter: choice.text for choice in message.choices}
    if message.constraints:
        line["constraints"] = [
            {"kind": item.kind, "value": item.value, **({"persists": True} if item.persists else {})}
            for item in message.constraints
        ]
    if message.reference_response is not None:
        line["reference_response"] = message.reference_response
    if message.rubric:
        line["rubric"] = [{"text": i.text, "weight": i.weight, "critical": i.critical} for i in message.rubric]
    return line


def _part_to_json(part: Part) -> dict[str, object]:
    if isinstance(part, TextPart):
        return {"text": part.text}
    line: dict[str, object] = {"audio": part.uri, "sha256": part.sha256, "sample_rate": part.sample_rate_hz}
    if part.transcript is not None:
        line["transcript"] = part.transcript
    return line


class _Sounds:
    """Looks every clip up once, however many records name it."""

    def __init__(self, store: ClipStore) -> None:
        self._store = store
        self._checked: set[str] = set()

    def problems(self, record: PromptRecord) -> Iterable[str]:
        """One line per bad clip that no earlier record named."""
        for index, message in enumerate(record.messages):
            for place, part in enumerate(message.parts):
                if not isinstance(part, AudioPart) or part.sha256 in self._checked:
                    continue
                self._checked.add(part.sha256)
                reason = self._problem(part)
                if reason:
                    yield f"record {record.id!r}, messages[{index}].content[{place}]: {reason}"

    def _problem(self, part: AudioPart) -> str | None:
        expected = self._store.uri(part.sha256)
        if part.uri != expected:
            return f"audio {part.uri!r} is not where the store keeps {part.sha256[:12]}...: {expected!r}"
        try:
            self._store.check(part.sha256)
        except AudioError as error:
            return str(error)
        return None


class _Problems:
    """Collects what is wrong, so that one run shows every mistake."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._num_more = 0

    def add(self, line: str) -> None:
        if len(self._lines) < MAX_PROBLEMS:
            self._lines.append(line)
        else:
            self._num_more += 1

    def raise_if_any(self, what: str) -> None:
        if self._lines:
            more = f"\n  ... and {self._num_more} more" if self._num_more else ""
            count = len(self._lines) + self._num_more
            raise DataError(f"{what}: {count} problem(s)\n  " + "\n  ".join(self._lines) + more)


class _Bad(Exception):
    """One field is wrong; carries where, what was found and what to write instead."""

    def __init__(self, field: str, value: object, fix: str) -> None:
        shown = repr(value)
        super().__init__(f"field {field} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {fix}")


class _Reader:
    def __init__(self, name: str, *, complete: bool, sounds: _Sounds | None) -> None:
        self._name, self._complete, self._sounds = name, complete, sounds
        self._problems = _Problems()
        self._records: list[PromptRecord] = []
        self._line_of_id: dict[str, int] = {}

    def add_line(self, number: int, line: bytes) -> None:
        place = f"{self._name}:{number}"
        named = ""
        try:
            fields = json.loads(line.decode("utf-8"))
            if isinstance(fields, dict) and isinstance(fields.get("id"), str):
                named = f"record {fields['id'][:80]!r}, "
            record = _record(fields, complete=self._complete)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            self._problems.add(f"{place}: not a line of JSON in UTF-8 ({error}); write one object per line")
            return
        except _Bad as problem:
            self._problems.add(f"{place}: {named}{problem}")
            return
        if record.id in self._line_of_id:
            first = self._line_of_id[record.id]
            self._problems.add(f"{place}: {_Bad('id', record.id, f'already used in line {first}; ids must be unique')}")
            return
        self._line_of_id[record.id] = number
        self._records.append(record)
        for reason in self._sounds.problems(record) if self._sounds else ():
            self._problems.add(f"{place}: {reason}")

    def finish(self) -> list[PromptRecord]:
        self._problems.raise_if_any(self._name)
        if not self._records:
            raise DataError(f"{self._name}: holds no record; make the data again")
        return self._records


def _record(line: object, *, complete: bool) -> PromptRecord:
    fields = _object(line, "record", allowed=("id", "task", "axis", "license", "sources", "messages"))
    messages = tuple(_message(item, f"messages[{i}]") for i, item in enumerate(_list(fields, "messages", "")))
    roles = [message.role for message in messages]
    if "user" not in roles:
        raise _Bad("messages", roles, "add at least one user message")
    if complete and roles[-1] != "assistant":
        raise _Bad("messages", roles, "a whole dialogue ends with the assistant's message; add it")
    if not complete and roles[-1] != "user":
        raise _Bad("messages", roles, "the last message is the one to be played: it must be from the user")
    return PromptRecord(
        id=_text(fields, "id", ""),
        task=_text(fields, "task", ""),
        messages=messages,
        axis=_optional_text(fields, "axis", ""),
        license=_optional_text(fields, "license", ""),
        sources=_sources(fields),
    )


def _sources(fields: Mapping[str, object]) -> tuple[str, ...]:
    """Which of the configured sources these are is checked against a run's settings (`config_objects`)."""
    names = [] if fields.get("sources") is None else _list(fields, "sources", "")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or name in names[:index]:
            raise _Bad(f"sources[{index}]", name, "give each reward source's name once, or leave the field out for all")
    return tuple(cast(list[str], names))


_CHECKS = ("answer", "choices", "constraints", "reference_response", "rubric")


def _message(value: object, at: str) -> Message:
    fields = _object(value, at, allowed=("role", "content", "title", "thinking", *_CHECKS))
    role = _text(fields, "role", at)
    if role not in _ROLES:
        raise _Bad(f"{at}.role", role, f"use one of {', '.join(_ROLES)}")
    misplaced = [name for name in (_CHECKS if role != "user" else ()) if name in fields]
    if misplaced:
        raise _Bad(
            f"{at}.{misplaced[0]}", fields[misplaced[0]], "checks belong to user messages; move it to the one before"
        )
    if "thinking" in fields and role != "assistant":
        raise _Bad(f"{at}.thinking", fields["thinking"], "only assistant messages reason; remove it")
    answer, choices = _optional_text(fields, "answer", at), _choices(fields, at)
    if choices and (answer or "").strip().casefold() not in (letter := [c.letter.casefold() for c in choices]):
        raise _Bad(f"{at}.answer", answer, f"with choices it is the letter of the right one: {', '.join(letter)}")
    return Message(
        role=cast(Role, role),
        parts=tuple(_part(item, f"{at}.content[{i}]") for i, item in enumerate(_list(fields, "content", at))),
        answer=answer,
        constraints=tuple(
            _constraint(item, f"{at}.constraints[{i}]")
            for i, item in enumerate(_list(fields, "constraints", at, optional=True))
        ),
        reference_response=_optional_text(fields, "reference_response", at),
        rubric=tuple(
            _rubric_item(item, f"{at}.rubric[{i}]")
            for i, item in enumerate([] if fields.get("rubric") is None else _list(fields, "rubric", at))
        ),
        thinking=_optional_text(fields, "thinking", at, allow_empty=True),
        choices=choices,
        title=_optional_text(fields, "title", at),
    )


def _part(value: object, at: str) -> Part:
    fields = _object(value, at, allowed=("audio", "sha256", "sample_rate", "transcript", "text"))
    if "text" in fields and len(fields) == 1:
        return TextPart(_text(fields, "text", at))
    if "text" in fields or "audio" not in fields:
        raise _Bad(at, sorted(fields), 'a part is either {"text"} or {"audio", "sha256", "sample_rate", "transcript"?}')
    uri, sha256, rate = _text(fields, "audio", at), _text(fields, "sha256", at), fields.get("sample_rate")
    if "://" in uri or "\\" in uri or PurePosixPath(uri).is_absolute() or ".." in PurePosixPath(uri).parts:
        raise _Bad(f"{at}.audio", uri, "give a path relative to the data root that does not leave it")
    if not _SHA256.fullmatch(sha256):
        raise _Bad(f"{at}.sha256", sha256, "give 64 lower-case hex digits")
    if isinstance(rate, bool) or not isinstance(rate, int) or rate <= 0:
        raise _Bad(f"{at}.sample_rate", rate, "give the rate in Hz as a positive whole number")
    return AudioPart(uri=uri, sha256=sha256, sample_rate_hz=rate, transcript=_optional_text(fields, "transcript", at))


def _choices(fields: Mapping[str, object], at: str) -> tuple[Choice, ...]:
    value, at = fields.get("choices"), f"{at}.choices"
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) < 2:
        raise _Bad(at, value, 'give at least two choices, as {"A": "a cat", "B": "a dog"}')
    choices = tuple(Choice(letter, _text(value, letter, at)) for letter in value)
    for letter in value:
        if len(letter) != 1 or not letter.isalnum():
            raise _Bad(at, letter, "name every choice by one letter or digit")
    for what in ({c.letter.casefold() for c in choices}, {" ".join(c.text.casefold().split()) for c in choices}):
        if len(what) < len(choices):
            raise _Bad(at, value, "two choices are the same; correct them")
    return choices


def _constraint(value: object, at: str) -> Constraint:
    fields = _object(value, at, allowed=("kind", "value", "persists"))
    persists = fields.get("persists", False)
    if not isinstance(persists, bool):
        raise _Bad(f"{at}.persists", persists, "give true or false")
    return Constraint(kind=_text(fields, "kind", at), value=_text(fields, "value", at), persists=persists)


def _rubric_item(value: object, at: str) -> RubricItem:
    fields = _object(value, at, allowed=("text", "weight", "critical"))
    weight, critical = fields.get("weight", 1.0), fields.get("critical", False)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise _Bad(f"{at}.weight", weight, "give a positive finite number")
    if not isinstance(critical, bool):
        raise _Bad(f"{at}.critical", critical, "give true or false")
    return RubricItem(text=_text(fields, "text", at), weight=float(weight), critical=critical)


def _object(value: object, at: str, *, allowed: tuple[str, ...]) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _Bad(at, value, "must be an object")
    for name in value:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            raise _Bad(
                f"{at}.{name}",
                value[name],
                f"unknown field; did you mean {near[0]!r}?" if near else "unknown field; remove it",
            )
    return value


def _list(fields: Mapping[str, object], name: str, at: str, *, optional: bool = False) -> list[object]:
    value = fields.get(name)
    if value is None and optional:
        return []
    if not isinstance(value, list) or (not value and not optional):
        raise _Bad(f"{at}.{name}".lstrip("."), value, "must be a non-empty list")
    return value


def _text(fields: Mapping[str, object], name: str, at: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise _Bad(f"{at}.{name}".lstrip("."), value, "must be a non-empty string")
    return value


def _optional_text(fields: Mapping[str, object], name: str, at: str, *, allow_empty: bool = False) -> str | None:
    if fields.get(name) is None:
        return None
    if allow_empty and fields[name] == "":
        return ""
    return _text(fields, name, at)
