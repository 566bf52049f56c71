"""From a local copy of a public set to records and clips: one small class per layout, everything else is here.

Nothing is downloaded, and nothing of a set lies in this package. What cannot be used is written down with its reason.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import soundfile

from rlaudio.audio.decode import DecodeLimits, decode, resample
from rlaudio.audio.store import ClipStore
from rlaudio.data.lines import parse_record
from rlaudio.data.records import record_to_json, write_records
from rlaudio.errors import AudioError, DataError, RlaudioError
from rlaudio.types import AudioPart, Choice, PromptRecord

T = TypeVar("T")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SOUND_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
_LIMITS = DecodeLimits(max_duration_s=600.0, max_num_bytes=256 << 20)


class SkipError(RlaudioError):
    """One item of a set cannot become a record; says why. Data for the report, never a crash."""


class Sounds:
    """Puts sounds of a set into the clip store of the new data root."""

    def __init__(self, store: ClipStore) -> None:
        self._store = store

    def take(
        self, source: Path | bytes, *, said: str | None = None, voice: str | None = None, language: str | None = None
    ) -> AudioPart:
        """A whole sound. Raises AudioError: it is missing or cannot be decoded."""
        name = None if isinstance(source, Path) else "the sound inside the table"
        clip = self._store.put(decode(source, limits=_LIMITS, name=name))
        return AudioPart(self._store.uri(clip.sha256), clip.sha256, 16_000, said or None, voice, language)

    def cut(
        self, path: Path, *, start_s: float, end_s: float, channel: int, said: str | None, language: str | None = None
    ) -> AudioPart:
        """One channel of a piece of a recording. Raises AudioError: there is no such piece or channel."""
        try:
            with soundfile.SoundFile(path) as sound:
                rate_hz = sound.samplerate
                first, last = max(0, int(start_s * rate_hz)), min(sound.frames, int(end_s * rate_hz))
                if not 0 <= channel < sound.channels or first >= last:
                    raise AudioError(
                        f"{path}: no sound from {start_s:.2f} to {end_s:.2f} s in channel {channel} of "
                        f"{sound.channels}; the recording is not the one that was annotated"
                    )
                sound.seek(first)
                samples = sound.read(last - first, dtype="float32", always_2d=True)[:, channel]
        except (soundfile.LibsndfileError, OSError) as error:
            raise AudioError(f"{path}: cannot be read ({error}); fetch the file again") from error
        clip = self._store.put(resample(samples, rate_hz=rate_hz))
        return AudioPart(self._store.uri(clip.sha256), clip.sha256, 16_000, said or None, None, language)


@dataclass(frozen=True, slots=True)
class Item:
    """One thing of a set that may become a record.

    Attributes:
        place: where it is, for the report: file and line or key.
        make: builds the record. Raises SkipError or AudioError: it cannot be one.
    """

    place: str
    make: Callable[[Sounds], PromptRecord]


class Importer(Protocol):
    """One layout.

    Attributes:
        license: of the set as published; None where that is not known, or not one for all.
    """

    license: str | None

    def items(self, source: Path) -> Iterator[Item]:
        """Everything in the local copy at `source`. Raises DataError: it does not look like this layout."""
        ...


@dataclass(frozen=True, slots=True)
class Imported:
    """What came of it: `skipped` is (place, reason)."""

    records: list[PromptRecord]
    skipped: list[tuple[str, str]]


def import_set(
    importer: Importer, source: Path, out: Path, *, license: str | None, progressed: Callable[[int], None]
) -> Imported:
    """Write `out/records.jsonl`, `out/skipped.jsonl` and the clips that the records name.

    Args:
        license: in place of the importer's.
        progressed: hears how many items were looked at.

    Raises:
        DataError: the copy has another layout, or nothing in it can be used.
    """
    sounds = Sounds(ClipStore(str(out)))
    imported = Imported([], [])
    taken: set[str] = set()
    for number, item in enumerate(importer.items(source), start=1):
        try:
            record = replace(item.make(sounds), license=license or importer.license)
            _require_valid(record, taken)
        except RlaudioError as error:
            imported.skipped.append((item.place, str(error)))
        else:
            taken.add(record.id)
            imported.records.append(record)
        progressed(number)
    if not imported.records:
        first = f", first {imported.skipped[0][0]}: {imported.skipped[0][1]}" if imported.skipped else ""
        raise DataError(f"{source}: none of {len(imported.skipped)} items could be used{first}")
    out.mkdir(parents=True, exist_ok=True)
    write_records(out / "records.jsonl", imported.records)
    lines = [json.dumps({"place": place, "reason": reason}, ensure_ascii=False) for place, reason in imported.skipped]
    (out / "skipped.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return imported


def _require_valid(record: PromptRecord, taken: set[str]) -> None:
    """The same check as of any file of records, before anything is written."""
    if record.id in taken:
        raise SkipError(f"its id {record.id!r} was used before")
    checked = parse_record(record_to_json(record), complete=False)
    if not isinstance(checked, PromptRecord):
        raise SkipError("; ".join(f"{bad.found}: {bad.fix}" for bad in checked))


# ---- what layouts have in common ----------------------------------------------------------------------------------


def field(fields: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """A field of an item. Raises SkipError: it is not there, empty, or of another type."""
    value = fields.get(name)
    if not isinstance(value, kind) or value in ("", [], {}):
        raise SkipError(f"its field {name!r} is {value!r}, which should be a {kind.__name__}")
    return value


def json_items(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of a JSON list, or of JSON lines. Raises DataError: the file is neither."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            objects = list(enumerate(json.loads(text)))
        else:
            lines = enumerate(text.splitlines(), start=1)
            objects = [(number, json.loads(line)) for number, line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is no JSON list and no JSON lines ({error}); fetch it again") from error
    for number, value in objects:
        if not isinstance(value, dict):
            raise DataError(f"{path}: entry {number} is no object; this file is not of the layout")
        yield f"{path.name}:{number}", value


def the_file(source: Path, *patterns: str) -> Path:
    """The first file under `source` that one of the patterns finds. Raises DataError: there is none."""
    for pattern in patterns:
        if found := sorted(source.glob(pattern)):
            return found[0]
    raise DataError(f"{source}: has no {' or '.join(patterns)}; give the folder that holds the copy")


def lettered(texts: Sequence[str], *, right: int) -> tuple[tuple[Choice, ...], str]:
    """Choices A, B, ... and the letter of the right one. Raises SkipError: there is no such choice."""
    if not 2 <= len(texts) <= len(LETTERS) or not 0 <= right < len(texts):
        raise SkipError(f"choice {right} of {len(texts)} is no question of multiple choice")
    return tuple(map(Choice, LETTERS, texts)), LETTERS[right]


def asked(question: str, choices: Sequence[Choice]) -> str:
    """A question with its choices below it, as text."""
    return "\n".join([question, *(f"{choice.letter}. {choice.text}" for choice in choices)])
