"""One line of a data file: from JSON to a record, or everything that is wrong with it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import cast

from rlaudio.types import (
    AudioPart,
    Choice,
    Constraint,
    Message,
    Part,
    Persona,
    PromptRecord,
    Role,
    RubricItem,
    TextPart,
)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ROLES = ("system", "user", "assistant")
_CHECKS = ("answer", "choices", "constraints", "reference_response", "rubric")
KEEPS = ("rate", "pitch", "timbre", "loudness", "noise")
"""What of a sound a record may forbid augmentation to change; see `rlaudio/audio/augment.py`."""


@dataclass(frozen=True, slots=True)
class BadField:
    """One field that cannot be used: where, what was found, and what to write instead."""

    field: str
    value: object
    fix: str

    @property
    def found(self) -> str:
        shown = repr(self.value)
        return f"field {self.field} = {shown if len(shown) <= 80 else shown[:77] + '...'}"


def parse_record(line: object, *, complete: bool | None) -> PromptRecord | list[BadField]:
    """The record that a line's JSON describes, or all that is wrong with it, in the order of the line.

    Args:
        complete: True wants a whole dialogue that ends with the assistant, False one to be played, None either.
    """
    bad: list[BadField] = []
    allowed = ("id", "task", "axis", "license", "sources", "keep", "user", "messages")
    fields = _Fields(line, "record", bad, allowed=allowed, top=True)
    record = PromptRecord(
        id=fields.text("id"),
        task=fields.text("task"),
        messages=tuple(_message(item, f"messages[{i}]", bad) for i, item in enumerate(fields.items("messages"))),
        axis=fields.optional_text("axis"),
        license=fields.optional_text("license"),
        sources=_sources(fields),
        keep=_keep(fields),
        user=_persona(fields),
    )
    _check_improvised(record, bad)
    roles = [message.role for message in record.messages]
    if roles and all(role in _ROLES for role in roles):
        if "user" not in roles:
            bad.append(BadField("messages", roles, "add at least one user message"))
        elif complete is None and roles[-1] == "system":
            bad.append(BadField("messages", roles, "the last message is from the user or the assistant; add it"))
        elif complete and roles[-1] != "assistant":
            fix = "a whole dialogue ends with the assistant's message; add it"
            bad.append(BadField("messages", roles, fix))
        elif complete is False and roles[-1] != "user":
            fix = "the last message is the one to be played: it must be from the user"
            bad.append(BadField("messages", roles, fix))
    return bad or record


class _Fields:
    """The fields of one object. What is wrong goes to `bad`, and a value of the right type stands in for it."""

    def __init__(
        self, value: object, at: str, bad: list[BadField], *, allowed: Sequence[str], top: bool = False
    ) -> None:
        self.at = "" if top else at
        self.bad = bad
        self.is_object = isinstance(value, dict)
        self.values: Mapping[str, object] = cast(Mapping[str, object], value) if isinstance(value, dict) else {}
        if not self.is_object:
            bad.append(BadField(at, value, "must be an object"))
        for name, item in self.values.items():
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, n=1)
                fix = f"unknown field; did you mean {near[0]!r}?" if near else "unknown field; remove it"
                bad.append(BadField(f"{at}.{name}", item, fix))

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def place(self, name: str) -> str:
        return f"{self.at}.{name}".lstrip(".")

    def get(self, name: str) -> object:
        return self.values.get(name)

    def refuse(self, name: str, fix: str) -> None:
        if self.is_object:
            self.bad.append(BadField(self.place(name), self.get(name), fix))

    def text(self, name: str) -> str:
        value = self.get(name)
        if isinstance(value, str) and value.strip():
            return value
        self.refuse(name, "must be a non-empty string")
        return ""

    def optional_text(self, name: str, *, allow_empty: bool = False) -> str | None:
        value = self.get(name)
        if value is None:
            return None
        if allow_empty and value == "":
            return ""
        return self.text(name)

    def items(self, name: str, *, optional: bool = False, or_empty: bool = False) -> list[object]:
        """A list: `optional` may be absent, `or_empty` may be empty or absent."""
        value = self.get(name)
        if value is None and (optional or or_empty):
            return []
        if isinstance(value, list) and (value or or_empty):
            return value
        self.refuse(name, "must be a non-empty list")
        return []

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if isinstance(value, bool):
            return value
        self.refuse(name, "give true or false")
        return False


def _sources(fields: _Fields) -> tuple[str, ...]:
    """Which of the configured sources these are is checked against a run's settings (`config_objects`)."""
    names = fields.items("sources", optional=True)
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or name in names[:index]:
            fix = "give each reward source's name once, or leave the field out for all"
            fields.bad.append(BadField(f"sources[{index}]", name, fix))
    return tuple(cast(list[str], names))


def _keep(fields: _Fields) -> tuple[str, ...]:
    names = fields.items("keep", optional=True)
    for index, name in enumerate(names):
        if name not in KEEPS or name in names[:index]:
            near = difflib.get_close_matches(str(name), KEEPS, n=1)
            meant = (
                f"did you mean {near[0]!r}?" if near and name != near[0] else f"give each of {', '.join(KEEPS)} once"
            )
            fields.bad.append(BadField(f"keep[{index}]", name, meant))
    return tuple(cast(list[str], names))


def _persona(fields: _Fields) -> Persona | None:
    if fields.get("user") is None:
        return None
    found = _Fields(fields.get("user"), "user", fields.bad, allowed=("persona", "goal"))
    return Persona(found.text("persona"), found.text("goal"))


def _check_improvised(record: PromptRecord, bad: list[BadField]) -> None:
    improvised = [index for index, message in enumerate(record.messages) if message.improvise]
    for index in improvised:
        at, message = f"messages[{index}]", record.messages[index]
        if message.role != "user":
            bad.append(BadField(f"{at}.improvise", True, "only users improvise; remove it"))
            continue
        if any(isinstance(part, AudioPart) for part in message.parts):
            bad.append(BadField(f"{at}.content", "audio", "give as text what to bring up, or remove improvise"))
        if message.reference_response is not None:
            fix = "nobody knows the words yet that it would answer; remove it"
            bad.append(BadField(f"{at}.reference_response", message.reference_response, fix))
        following = record.messages[index + 1 : index + 2]
        if following and following[0].role == "assistant":
            fix = "a given reply cannot answer words that nobody knows yet; remove the reply, or improvise"
            bad.append(BadField(f"{at}.improvise", True, fix))
    if improvised and record.user is None:
        fix = 'say who improvises: {"persona": ..., "goal": ...}'
        bad.append(BadField("user", None, fix))
    if record.user is not None and not improvised:
        bad.append(BadField("user", record.user.goal, "no message is to be improvised; mark some, or remove it"))


def _message(value: object, at: str, bad: list[BadField]) -> Message:
    fields = _Fields(value, at, bad, allowed=("role", "content", "title", "thinking", "improvise", *_CHECKS))
    role = fields.text("role")
    if role and role not in _ROLES:
        fields.refuse("role", f"use one of {', '.join(_ROLES)}")
    elif role and role != "user":
        for name in _CHECKS:
            if name in fields:
                fields.refuse(name, "checks belong to user messages; move it to the one before")
    if "thinking" in fields and role in ("user", "system"):
        fields.refuse("thinking", "only assistant messages reason; remove it")
    answer, choices = fields.optional_text("answer"), _choices(fields)
    letters = [choice.letter.casefold() for choice in choices]
    if choices and (answer or "").strip().casefold() not in letters:
        fields.refuse("answer", f"with choices it is the letter of the right one: {', '.join(letters)}")
    rules = enumerate(fields.items("constraints", or_empty=True))
    rubric = enumerate(fields.items("rubric", optional=True))
    return Message(
        role=cast(Role, role),
        parts=tuple(_part(item, f"{at}.content[{i}]", bad) for i, item in enumerate(fields.items("content"))),
        answer=answer,
        constraints=tuple(_constraint(item, f"{at}.constraints[{i}]", bad) for i, item in rules),
        reference_response=fields.optional_text("reference_response"),
        rubric=tuple(_rubric_item(item, f"{at}.rubric[{i}]", bad) for i, item in rubric),
        thinking=fields.optional_text("thinking", allow_empty=True),
        title=fields.optional_text("title"),
        choices=choices,
        improvise=fields.flag("improvise"),
    )


def _part(value: object, at: str, bad: list[BadField]) -> Part:
    allowed = ("audio", "sha256", "sample_rate", "transcript", "voice", "language", "text")
    fields = _Fields(value, at, bad, allowed=allowed)
    if "text" in fields and "audio" not in fields and len(fields.values) == 1:
        return TextPart(fields.text("text"))
    if fields.is_object and ("text" in fields or "audio" not in fields):
        fix = 'a part is either {"text"} or {"audio", "sha256", "sample_rate", "transcript"?, "voice"?, "language"?}'
        bad.append(BadField(at, sorted(fields.values), fix))
        return TextPart("")
    uri, sha256, rate = fields.text("audio"), fields.text("sha256"), fields.get("sample_rate")
    if "://" in uri or "\\" in uri or PurePosixPath(uri).is_absolute() or ".." in PurePosixPath(uri).parts:
        fields.refuse("audio", "give a path relative to the data root that does not leave it")
    if sha256 and not _SHA256.fullmatch(sha256):
        fields.refuse("sha256", "give 64 lower-case hex digits")
    if isinstance(rate, bool) or not isinstance(rate, int) or rate <= 0:
        fields.refuse("sample_rate", "give the rate in Hz as a positive whole number")
        rate = 0
    return AudioPart(
        uri=uri,
        sha256=sha256,
        sample_rate_hz=rate,
        transcript=fields.optional_text("transcript"),
        voice=fields.optional_text("voice"),
        language=fields.optional_text("language"),
    )


def _choices(fields: _Fields) -> tuple[Choice, ...]:
    value, at = fields.get("choices"), fields.place("choices")
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) < 2:
        fields.refuse("choices", 'give at least two choices, as {"A": "a cat", "B": "a dog"}')
        return ()
    texts = _Fields(value, at, fields.bad, allowed=tuple(value))
    choices = tuple(Choice(letter, texts.text(letter)) for letter in value)
    for letter in value:
        if len(letter) != 1 or not letter.isalnum():
            fields.bad.append(BadField(at, letter, "name every choice by one letter or digit"))
    said = {" ".join(choice.text.casefold().split()) for choice in choices}
    if any(len(what) < len(choices) for what in ({choice.letter.casefold() for choice in choices}, said)):
        fields.refuse("choices", "two choices are the same; correct them")
    return choices


def _constraint(value: object, at: str, bad: list[BadField]) -> Constraint:
    fields = _Fields(value, at, bad, allowed=("kind", "value", "persists"))
    return Constraint(kind=fields.text("kind"), value=fields.text("value"), persists=fields.flag("persists"))


def _rubric_item(value: object, at: str, bad: list[BadField]) -> RubricItem:
    fields = _Fields(value, at, bad, allowed=("text", "weight", "critical"))
    weight = fields.values.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        fields.refuse("weight", "give a positive finite number")
        weight = 1.0
    return RubricItem(text=fields.text("text"), weight=float(weight), critical=fields.flag("critical"))
