"""A few comparisons for training a tiny judge: the first ones of a file that is there, else made ones."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlaudio.audio.store import ClipStore
from rlaudio.data.tiny import LICENSE, NUMBERS, hum
from rlaudio.errors import DataError
from rlaudio.types import SAMPLE_RATE_HZ

NUM_PAIRS = 12
_MAX_CHARACTERS = 2000


def write_pairs(old: Path, new: Path, *, split: str, levels: int, clips: ClipStore, store: ClipStore) -> str:
    """Write `new`; returns what it is.

    Raises:
        DataError: `old` holds no line of JSON that is short enough.
        AudioError: one of its sounds cannot be read.
    """
    if old.is_file():
        lines = [_copied(line, clips=clips, store=store) for line in _short_lines(old)]
        said = f"the first {len(lines)} comparisons of {old} that are short enough"
    else:
        lines = [_made(index, split=split, levels=levels, store=store) for index in range(NUM_PAIRS)]
        said = f"{len(lines)} comparisons made here" + (f", for {old} is not there" if str(old) != "." else "")
    new.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
    return said


def _short_lines(path: Path) -> list[dict[str, Any]]:
    found = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip() and len(line) <= _MAX_CHARACTERS:
                    found.append(json.loads(line))
                if len(found) == NUM_PAIRS:
                    break
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON lines ({error}); make it again") from error
    if not found:
        raise DataError(f"{path}: no line is shorter than {_MAX_CHARACTERS} characters; name another file")
    return found


def _copied(line: dict[str, Any], *, clips: ClipStore, store: ClipStore) -> dict[str, Any]:
    for part in _sounds(line):
        store.put(clips.get(part["sha256"]).samples)
    return line


def _sounds(line: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for message in line.get("messages") or ():
        for part in message.get("content") or ():
            if isinstance(part, dict) and "sha256" in part:
                yield part


def _made(index: int, *, split: str, levels: int, store: ClipStore) -> dict[str, Any]:
    number, other = NUMBERS[index % len(NUMBERS)], NUMBERS[(index + 3) % len(NUMBERS)]
    clip = store.put(hum(f"pair/{split}/{index}"))
    said = f"in {split} {index} my code is {number} what is it"
    sound = {
        "audio": store.uri(clip.sha256),
        "sha256": clip.sha256,
        "sample_rate": SAMPLE_RATE_HZ,
        "transcript": said,
    }
    return {
        "id": f"{split}-{index}",
        "license": LICENSE,
        "messages": [{"role": "user", "content": [sound]}],
        "reference": f"your code is {number}",
        "response": f"okay {number}" if index % 2 else f"your code is {other}",
        "level": index % levels,
    }
