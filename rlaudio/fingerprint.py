"""What a result depends on, as one hash: settings by value, files and folders by content.

So a result is known again after its inputs were moved, copied or touched, and is not known when one byte differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlaudio.errors import RunFolderError
from rlaudio.runs import write_json_atomic


class Contents:
    """Hashes of files and folders.

    Args:
        cache: JSON file that remembers hashes by path, size and time of change: a checkpoint is read once. None: no
            memory.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self._cache = cache
        self._known: dict[str, list[Any]] = {}
        if cache is not None and cache.is_file():
            try:
                self._known = dict(json.loads(cache.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                self._known = {}  # it is only a memory

    def digest(self, path: str | Path) -> str:
        """Of a file's bytes, or of all files below a folder with their names.

        Raises:
            RunFolderError: it is not there, or cannot be read.
        """
        root = Path(path)
        try:
            if not root.is_dir():
                return self._of_file(root)
            files = sorted(file for file in root.rglob("*") if file.is_file())
            whole = hashlib.sha256()
            for file in files:
                whole.update(f"{file.relative_to(root).as_posix()}\0{self._of_file(file)}\n".encode())
            return whole.hexdigest()
        except OSError as error:
            raise RunFolderError(
                f"{path} cannot be read ({error.strerror}): check the path, or make it first"
            ) from error

    def save(self) -> None:
        """Remember what was read."""
        if self._cache is not None:
            write_json_atomic(self._cache, self._known)

    def _of_file(self, file: Path) -> str:
        name, stat = os.path.abspath(file), file.stat()
        seen = [stat.st_size, stat.st_mtime_ns]
        known = self._known.get(name)
        if isinstance(known, list) and len(known) == 3 and known[:2] == seen:
            return str(known[2])
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        self._known[name] = [*seen, found]
        return found


def fingerprint(settings: object, *, contents: Contents, leave_out: Collection[str] = ()) -> str:
    """One hash of settings and of what they name.

    Args:
        settings: dataclasses, mappings, sequences and plain values. Fields marked as paths count by content, or not at
            all where they are marked as places (`rlaudio.config.PLACE`).
        leave_out: full names of settings that decide nothing, for example "run.name".

    Raises:
        RunFolderError: a path that is named is not there.
    """
    plain = _plain(settings, contents=contents, leave_out=leave_out, name="")
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def inputs(settings: object, *, name: str = "") -> Iterator[tuple[str, str]]:
    """(setting, path) of every file and folder whose content counts."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        for field in dataclasses.fields(settings):
            below, item = f"{name}.{field.name}".lstrip("."), getattr(settings, field.name)
            if field.metadata.get("content") is False:
                continue
            if field.metadata.get("path"):
                named = item.items() if isinstance(item, Mapping) else [("", item)]
                for key, path in named:
                    if path and "://" not in str(path):
                        yield f"{below}.{key}".rstrip("."), str(path)
            else:
                yield from inputs(item, name=below)
    elif isinstance(settings, list | tuple):
        for index, item in enumerate(settings):
            yield from inputs(item, name=f"{name}[{index}]")


def _plain(value: object, *, contents: Contents, leave_out: Collection[str], name: str) -> Any:
    def below(key: object, item: object) -> Any:
        return _plain(item, contents=contents, leave_out=leave_out, name=f"{name}.{key}".lstrip("."))

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if f"{name}.{field.name}".lstrip(".") in leave_out or field.metadata.get("content") is False:
                continue
            found[field.name] = (
                _named(item, contents=contents) if field.metadata.get("path") else below(field.name, item)
            )
        return found
    if isinstance(value, Mapping):
        return {str(key): below(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [below(index, item) for index, item in enumerate(value)]
    return value


def _named(value: object, *, contents: Contents) -> Any:
    """Paths by content; what is not set, and a URI, as it is written."""
    if isinstance(value, Mapping):
        return {str(key): _named(item, contents=contents) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item, contents=contents) for item in value]
    if value is None or str(value) == "" or "://" in str(value):
        return value
    return contents.digest(str(value))
