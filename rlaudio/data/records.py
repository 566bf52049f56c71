"""Prompt records as JSON lines: read with every problem named at once, written so that they read back equal.

One object per line: `id`, `task`, `axis`?, `license`?, `sources`? `[reward source]`, `keep`? `[what augmentation must
not change]`, `user`? `{persona, goal}` of a simulated user, `messages[]`. A message is `role`, `content[]` of
`{"audio": uri, "sha256", "sample_rate", "transcript"?, "voice"?, "language"?}` or `{"text": ...}`, and on user messages
`answer`?, `choices`? `{letter: text}`, `constraints`? `[{kind, value, persists?}]`, `reference_response`?, `rubric`?
`[{text, weight?, critical?}]`, `improvise`? (its text says what to bring up, the words are the simulated user's); on
assistant messages `thinking`?; on any `title`?, see `types.Message`. Sound URIs are relative to the data root (the
folder of the clip store).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlaudio.audio.store import ClipStore
from rlaudio.data.lines import BadField, parse_record
from rlaudio.data.problems import Kind, Problem, explained, raise_fatal
from rlaudio.errors import AudioError, DataError
from rlaudio.types import AudioPart, Message, Part, PromptRecord, TextPart


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
    scanned = scan_records(path, complete=complete, sounds=None if clips is None else SoundCheck(clips))
    raise_fatal(scanned.problems, name=scanned.path)
    return scanned.records


@dataclass(frozen=True, slots=True)
class RecordFile:
    """A file as it was read.

    Attributes:
        path: as it was named.
        records: the good ones.
        line_of: id -> the line of the record, counted from 1.
        problems: everything that is wrong, in the order of the file.
    """

    path: str
    records: list[PromptRecord]
    line_of: dict[str, int]
    problems: list[Problem]

    def problem(self, kind: Kind, record: PromptRecord, what: str, fix: str, *, fatal: bool = True) -> Problem:
        """Something wrong with one of the good records, found by looking at more than its line."""
        return Problem(kind, self.path, self.line_of[record.id], record.id, what, fix, fatal=fatal)


def scan_records(path: str | Path, *, complete: bool | None = False, sounds: SoundCheck | None = None) -> RecordFile:
    """Read a file and everything that is wrong with it. Raises nothing for what a file may hold.

    Args:
        complete: as in `read_records`; None takes both kinds.
        sounds: where given, every sound is checked too; shared between files, each clip is looked at once.
    """
    scanned = RecordFile(str(path), [], {}, [])
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        what, fix = f"cannot be read ({error.strerror})", "check the path, or make the data first"
        scanned.problems.append(Problem("file", scanned.path, None, None, what, fix))
        return scanned
    for number, line in enumerate(lines, start=1):
        if line.strip():
            _scan_line(scanned, number, line, complete=complete, sounds=sounds)
    if not scanned.records and not scanned.problems:
        scanned.problems.append(Problem("file", scanned.path, None, None, "holds no record", "make the data again"))
    return scanned


def _scan_line(
    scanned: RecordFile, number: int, line: bytes, *, complete: bool | None, sounds: SoundCheck | None
) -> None:
    def add(kind: Kind, record: str | None, what: str, fix: str) -> None:
        scanned.problems.append(Problem(kind, scanned.path, number, record, what, fix))

    try:
        fields = json.loads(line.decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        add("json", None, f"not a line of JSON in UTF-8 ({error})", "write one object per line")
        return
    named = fields["id"] if isinstance(fields, dict) and isinstance(fields.get("id"), str) else None
    record = parse_record(fields, complete=complete)
    if not isinstance(record, PromptRecord):
        for bad in record:
            add("field", named, bad.found, bad.fix)
        return
    if record.id in scanned.line_of:
        found = BadField("id", record.id, "").found
        add("id", record.id, found, f"already used in line {scanned.line_of[record.id]}; ids must be unique")
        return
    scanned.line_of[record.id] = number
    scanned.records.append(record)
    for place, reason in sounds.problems(record) if sounds else ():
        what, fix = explained(reason)
        add("sound", record.id, f"{place}: {what}", fix)


class SoundCheck:
    """Looks every clip up once, however many records and files name it.

    Args:
        max_duration_s: longest clip that is taken; 0 leaves it at the store's hour.

    Attributes:
        durations_s: seconds of every clip that was found good.
    """

    def __init__(self, store: ClipStore, *, max_duration_s: float = 0.0) -> None:
        self._store = store
        self._max_duration_s = max_duration_s
        self._checked: set[tuple[str, str]] = set()
        self.durations_s: dict[str, float] = {}

    def problems(self, record: PromptRecord) -> Iterable[tuple[str, str]]:
        """(place in the record, what an error says) of each bad clip that no earlier record named."""
        for place, part in record_sounds(record):
            if (part.sha256, part.uri) in self._checked:
                continue
            self._checked.add((part.sha256, part.uri))
            reason = self._problem(part)
            if reason:
                yield place, reason

    def _problem(self, part: AudioPart) -> str | None:
        expected = self._store.uri(part.sha256)
        if part.uri != expected:
            found = f"audio {part.uri!r} is not where the store keeps {part.sha256[:12]}...: {expected!r}"
            return f"{found}; put the clip there, or name the file that is meant"
        try:
            duration_s = self._store.check(part.sha256)
        except AudioError as error:
            return str(error)
        if 0 < self._max_duration_s < duration_s:
            limit = f"longer than data.max_clip_s={self._max_duration_s:g}"
            return f"{expected}: {duration_s:.1f} s, {limit}; cut it into pieces, or raise the limit"
        self.durations_s[part.sha256] = duration_s
        return None


def record_sounds(record: PromptRecord) -> Iterable[tuple[str, AudioPart]]:
    """(place, sound) of every sound in a record, in order."""
    for index, message in enumerate(record.messages):
        for place, part in enumerate(message.parts):
            if isinstance(part, AudioPart):
                yield f"messages[{index}].content[{place}]", part


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
    if record.keep:
        line["keep"] = list(record.keep)
    if record.user is not None:
        line["user"] = {"persona": record.user.persona, "goal": record.user.goal}
    line["messages"] = [_message_to_json(message) for message in record.messages]
    return line


def _message_to_json(message: Message) -> dict[str, object]:
    line: dict[str, object] = {"role": message.role, "content": [_part_to_json(part) for part in message.parts]}
    if message.title is not None:
        line["title"] = message.title
    if message.thinking is not None:
        line["thinking"] = message.thinking
    if message.improvise:
        line["improvise"] = True
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
    if part.voice is not None:
        line["voice"] = part.voice
    if part.language is not None:
        line["language"] = part.language
    return line
