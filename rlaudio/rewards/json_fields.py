"""Files of labelled comparisons, one object per line: read whole, with every problem named at once.

What `data/records.py` does for prompt records, for sets that have other fields: preference files and public judge sets.
"""

import difflib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from rlaudio.errors import DataError

T = TypeVar("T")

MAX_PROBLEMS = 20


class BadField(Exception):
    """One field is wrong: which, what stands there, and what to write instead."""

    def __init__(self, field: str, value: object, fix: str) -> None:
        shown = repr(value)
        super().__init__(f"field {field} = {shown if len(shown) <= 80 else shown[:77] + '...'}: {fix}")


class Fields:
    """The fields of one object, `at` its place in the line.

    Args:
        allowed: fields there may be; None allows any, for files of others that may grow columns.

    Raises:
        BadField: not an object, or a field that is not allowed.
    """

    def __init__(self, value: object, at: str = "", *, allowed: Collection[str] | None = None) -> None:
        if not isinstance(value, Mapping):
            raise BadField(at or "record", value, "must be an object")
        self._values: Mapping[str, Any] = value
        self._at = at
        if allowed is None:
            return
        for name in value:
            if name not in allowed:
                near = difflib.get_close_matches(str(name), sorted(allowed), n=1)
                fix = f"unknown field; did you mean {near[0]!r}?" if near else "unknown field; remove it"
                raise self.bad(str(name), fix)

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def place(self, name: str) -> str:
        return f"{self._at}.{name}" if self._at else name

    def bad(self, name: str, fix: str) -> BadField:
        return BadField(self.place(name), self._values.get(name), fix)

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.bad(name, "must be a non-empty string")
        return value

    def optional_text(self, name: str) -> str | None:
        return self.text(name) if name in self else None

    def items(self, name: str) -> list[Any]:
        value = self._values.get(name)
        if not isinstance(value, list) or not value:
            raise self.bad(name, "must be a non-empty list")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.items(name)
        for index, value in enumerate(values):
            if not isinstance(value, str) or not value.strip():
                raise BadField(f"{self.place(name)}[{index}]", value, "must be a non-empty string")
        return tuple(values)

    def whole(self, name: str, *, low: int, high: int) -> int:
        value = self._values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.bad(name, f"must be a whole number from {low} to {high}")
        return value


def read_objects(
    path: str | Path, parse: Callable[[object], T], *, id_of: Callable[[T], str], id_field: str = "id"
) -> list[T]:
    """Read every line of a JSONL file, or every row of a Parquet file (`.parquet`), by `parse`.

    Args:
        parse: one object to what it means. Raises BadField.
        id_of: a name that only one line may have.
        id_field: the field that holds it, for messages.

    Raises:
        DataError: the file cannot be read, holds nothing, or holds bad lines: names file:line, id, field, value and fix
            of up to `MAX_PROBLEMS` of them.
    """
    problems: list[str] = []
    found: list[T] = []
    first: dict[str, int] = {}
    for number, value in _numbered(path, problems):
        place = f"{path}:{number}"
        given = value.get(id_field) if isinstance(value, Mapping) else None
        named = f"record {str(given)[:80]!r}, " if given is not None else ""
        try:
            one = parse(value)
        except BadField as problem:
            problems.append(f"{place}: {named}{problem}")
            continue
        if (name := id_of(one)) in first:
            twice = BadField(id_field, name, f"already used in line {first[name]}; ids must be unique")
            problems.append(f"{place}: {twice}")
            continue
        first[name] = number
        found.append(one)
    if problems:
        more = f"\n  ... and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise DataError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems[:MAX_PROBLEMS]) + more)
    if not found:
        raise DataError(f"{path}: holds no record; make the data again")
    return found


def _numbered(path: str | Path, problems: list[str]) -> Iterator[tuple[int, object]]:
    """(line or row from 1, object); what is no JSON goes to `problems`."""
    try:
        if str(path).endswith(".parquet"):
            yield from enumerate(pq.read_table(path).to_pylist(), start=1)
            return
        lines = Path(path).read_bytes().split(b"\n")
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error}); copy it again") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be read ({reason}); check the path, or make the data first") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            problems.append(f"{path}:{number}: not a line of JSON in UTF-8 ({error}); write one object per line")
