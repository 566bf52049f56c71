"""What is wrong with data, as something that both a run and `rlaudio data check` can say, and in the same words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlaudio.errors import DataError

MAX_PROBLEMS = 20
Kind = Literal["file", "json", "field", "id", "sound", "license", "leak", "same words", "rewards"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: what was looked at when it was found.
        file: the data file as it was named.
        line: counted from 1; None where the whole file is meant.
        record: the record's id, where it has one that can be read.
        what: what was found, with its place in the record.
        fix: what to do about it.
        fatal: False is worth a look and stops no run.
    """

    kind: Kind
    file: str
    line: int | None
    record: str | None
    what: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        named = "" if self.record is None or self.kind == "id" else f"record {self.record[:80]!r}, "
        link = ": " if self.kind in ("field", "id") else "; "
        return f"{place}: {named}{self.what}{link}{self.fix}"


def explained(error: str) -> tuple[str, str]:
    """What an error found and what to do, apart: rlaudio's errors end in their next step, after a semicolon."""
    found, separator, fix = error.rpartition("; ")
    return (found, fix) if separator else (error, "look at what made the file")


def raise_fatal(problems: Iterable[Problem], *, name: str) -> None:
    """Raise DataError with the first `MAX_PROBLEMS` fatal problems and how many more there are; return without any."""
    fatal: Sequence[Problem] = [problem for problem in problems if problem.fatal]
    if fatal:
        lines = [f"{name}: {len(fatal)} problem(s)", *map(str, fatal[:MAX_PROBLEMS])]
        if len(fatal) > MAX_PROBLEMS:
            lines.append(f"... and {len(fatal) - MAX_PROBLEMS} more: `rlaudio data check` lists them all")
        raise DataError("\n  ".join(lines))
