"""Which records to train on: pass@k by record, the range that is kept, and what is told of it. Pure.

A record that the policy always gets right teaches nothing, nor does one that it never does (arXiv:2511.15848, 4.2).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlaudio.config_stages import CurationSettings
from rlaudio.data.records import record_to_json
from rlaudio.errors import DataError
from rlaudio.evals.summary import DialogueResult, TurnResult
from rlaudio.types import PromptRecord

Fate = Literal["kept", "too hard", "too easy", "unjudged"]
FATES: tuple[Fate, ...] = ("kept", "too hard", "too easy", "unjudged")


@dataclass(frozen=True, slots=True)
class Rolled:
    """What became of one record: k dialogues, or why there are none that could be judged.

    Attributes:
        digest: of the whole record: another one under the same id is played again.
        passed: one per dialogue; empty where there is a problem.
        dialogues: what was said and what sources said of it, for whoever wants to read or learn from it.
        problem: why it could not be played or judged; such a record is tried again by the next attempt.
    """

    id: str
    task: str
    digest: str
    passed: tuple[bool, ...] = ()
    dialogues: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    problem: str = ""

    @property
    def num_passed(self) -> int:
        return sum(self.passed)

    def fate(self, keep: Sequence[int]) -> Fate:
        """What [lowest, highest] makes of it."""
        if self.problem:
            return "unjudged"
        low, high = keep
        return "too hard" if self.num_passed < low else "too easy" if self.num_passed > high else "kept"


def digest_of(record: PromptRecord) -> str:
    """Of all that a record says, sounds by their hash."""
    return hashlib.sha256(json.dumps(record_to_json(record), sort_keys=True).encode()).hexdigest()


def rolled(
    record: PromptRecord, dialogues: Sequence[DialogueResult], *, verified: Collection[int], pass_share: float
) -> Rolled:
    """Count a record's dialogues.

    Args:
        dialogues: its siblings, judged.
        verified: turns that say whether a dialogue is right; one that was not played is wrong.
        pass_share: of them that must be right.
    """
    made = Rolled(record.id, record.task, digest_of(record))
    if problems := [dialogue.problem for dialogue in dialogues if dialogue.problem]:
        return Rolled(made.id, made.task, made.digest, problem=problems[0])

    def passes(dialogue: DialogueResult) -> bool:
        right = sum(turn.correct and turn.parsable for turn in dialogue.turns if turn.turn in verified)
        return right >= pass_share * len(verified) - 1e-9

    said = tuple({"turns": [_said(turn) for turn in dialogue.turns]} for dialogue in dialogues)
    return Rolled(made.id, made.task, made.digest, tuple(passes(dialogue) for dialogue in dialogues), said)


_SAID = ("turn", "thinking", "reply", "correct", "parsable", "reward", "num_tokens")
"""Of a turn; the rest is in the record."""


def _said(turn: TurnResult) -> dict[str, Any]:
    judged = {part.source: {"value": part.value, "detail": part.detail} for part in turn.breakdown}
    return {**{name: getattr(turn, name) for name in _SAID}, "judged": judged}


# ---- what was rolled out, kept between attempts -------------------------------------------------------------------


class RolledFile:
    """One line of JSON per record, appended as they come: a killed attempt keeps what it did.

    Raises:
        DataError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            text = path.read_bytes() if path.exists() else b""
            self.found = _read_lines(text.decode("utf-8", errors="replace"))
            self._file = path.open("ab")
            if text and not text.endswith(b"\n"):
                self._file.write(b"\n")  # a kill cut the last line: do not join the next one to it
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}: check the run folder's owner and disk") from error

    def add(self, one: Rolled) -> None:
        """Remember one record, also after a kill. Raises DataError: the disk is full."""
        try:
            self._file.write(json.dumps(asdict(one)).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written ({error.strerror}): free disk space") from error
        self.found[one.id] = one

    def close(self) -> None:
        self._file.close()


def _read_lines(text: str) -> dict[str, Rolled]:
    """By record, the later line first believed; a line that was cut off is left out."""
    found: dict[str, Rolled] = {}
    for line in text.splitlines():
        try:
            raw = json.loads(line)
            one = Rolled(**{**raw, "passed": tuple(raw["passed"]), "dialogues": tuple(raw["dialogues"])})
        except (ValueError, TypeError, KeyError):
            continue
        found[one.id] = one
    return found


def still_to_roll(records: Sequence[PromptRecord], found: Mapping[str, Rolled], *, k: int) -> list[PromptRecord]:
    """Records of which no k dialogues are known: new, changed, or in trouble last time."""

    def known(record: PromptRecord) -> bool:
        one = found.get(record.id)
        return one is not None and not one.problem and len(one.passed) == k and one.digest == digest_of(record)

    return [record for record in records if not known(record)]


# ---- what is told of it -------------------------------------------------------------------------------------------


def summarise_curation(rolled: Sequence[Rolled], settings: CurationSettings) -> dict[str, Any]:
    """What `report.json` of a curation holds.

    Returns:
        `{"k", "keep", "all": counts, "tasks": {TASK: counts}, "problems": {SENTENCE: number}}` where counts is
        `{"records", "kept", "too_hard", "too_easy", "unjudged", "pass_rate", "pass_rate_kept", "histogram"}`: rates are
        means over dialogues of judged records (None without any), `histogram[n]` is how many records passed n times.
    """
    tasks = sorted({one.task for one in rolled})
    problems: dict[str, int] = {}
    for one in rolled:
        if one.problem:
            problems[one.problem] = problems.get(one.problem, 0) + 1
    return {
        "k": settings.k,
        "keep": list(settings.keep),
        "all": _counts(rolled, settings),
        "tasks": {task: _counts([one for one in rolled if one.task == task], settings) for task in tasks},
        "problems": problems,
    }


def _counts(rolled: Sequence[Rolled], settings: CurationSettings) -> dict[str, Any]:
    judged = [one for one in rolled if not one.problem]
    fates = [one.fate(settings.keep) for one in rolled]
    kept = [one for one in judged if one.fate(settings.keep) == "kept"]
    histogram = [sum(one.num_passed == number for one in judged) for number in range(settings.k + 1)]
    return {
        "records": len(rolled),
        **{fate.replace(" ", "_"): fates.count(fate) for fate in FATES},
        "pass_rate": _rate(judged),
        "pass_rate_kept": _rate(kept),
        "histogram": histogram,
    }


def _rate(rolled: Sequence[Rolled]) -> float | None:
    dialogues = [passed for one in rolled for passed in one.passed]
    return sum(dialogues) / len(dialogues) if dialogues else None


def require_kept(summary: Mapping[str, Any]) -> None:
    """Raises DataError: nothing is left to train on; says why, and which setting would keep how many."""
    counts = summary["all"]
    if counts["kept"]:
        return
    if counts["unjudged"] == counts["records"]:
        first = next(iter(summary["problems"]))
        raise DataError(f"none of {counts['records']} records could be played and judged: {first}")
    low, high = summary["keep"]
    k, histogram = summary["k"], counts["histogram"]
    found = ", ".join(f"{number} of {k}: {count}" for number, count in enumerate(histogram) if count)
    raise DataError(
        f"curation keeps nothing: no record passes {low} to {high} times of {k}; records by passes: {found}. "
        "Change curation.keep (a resumed curation plays nothing again), lower curation.pass_share, or give a policy "
        "that is better or worse at these records"
    )
