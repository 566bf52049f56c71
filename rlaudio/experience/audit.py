"""Whether a ledger adds up: every issued group ended once, with a step or a reason, or is known to be under way.

Read-only, from the database alone, of a run that lives or of one that is dead. Nothing here trusts what the writer of
the ledger checked: sums are formed anew, from rows of three kinds (issues, batches, lives) that must agree, and from
the copy that the newest checkpoint holds.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlaudio.errors import LedgerError

_MAX_NAMED = 10


@dataclass(frozen=True, slots=True)
class LedgerSums:
    """What an audit found. Groups, unless it says issues.

    Attributes:
        num_groups: numbers given out: 0 to here.
        num_issues: one per group, and one more each time it was issued again.
        durable, trained: trained on; under a checkpoint, or not yet.
        ready, issued: under way: judged and waiting, or before that.
        dropped, reissued: by reason, the latter in issues.
        num_lives: processes that ran the loop.
        num_undone: trainings that a restore took back, over all lives.
        num_steps: batches that were trained on and not taken back.
        problems: what does not add up, with the groups; none in a sound ledger.
    """

    num_groups: int
    num_issues: int
    durable: int
    trained: int
    ready: int
    issued: int
    dropped: dict[str, int]
    reissued: dict[str, int]
    num_lives: int
    num_undone: int
    num_steps: int
    problems: tuple[str, ...]


def audit(path: Path, *, covered: Path | None = None) -> LedgerSums:
    """Add up the ledger at `path`.

    Args:
        covered: the copy in the newest checkpoint: what it says was trained or dropped must be so still.

    Raises:
        LedgerError: it cannot be read.
    """
    try:
        with _reading(path) as connection:
            if covered is not None:
                connection.execute("ATTACH DATABASE ? AS saved", (f"file:{covered}?mode=ro",))
            connection.execute("BEGIN")  # one moment of a ledger that goes on
            return audit_connection(connection, compare=covered is not None)
    except (sqlite3.Error, OSError) as error:
        raise LedgerError(f"{path} cannot be audited ({error}): is it a run's ledger, and whole?") from error


def audit_connection(connection: sqlite3.Connection, *, compare: bool = False) -> LedgerSums:
    """Add up an open ledger; with `compare`, also against the database attached as `saved`."""
    (num_issues,) = connection.execute("SELECT count(*) FROM issues").fetchone()
    states = Counter(dict(connection.execute("SELECT state, count(*) FROM issues GROUP BY state")))
    reasons: dict[str, dict[str, int]] = {"dropped": {}, "reissued": {}}
    for state, reason, count in connection.execute(
        "SELECT state, reason, count(*) FROM issues WHERE reason <> '' GROUP BY state, reason ORDER BY count(*) DESC"
    ):
        reasons[state][reason] = count
    (num_groups,) = connection.execute("SELECT coalesce(max(grp), -1) + 1 FROM issues").fetchone()
    num_lives, num_undone = connection.execute("SELECT count(*), sum(undone) FROM lives").fetchone()
    (num_steps,) = connection.execute(f"SELECT count(*) FROM ({_STANDING})").fetchone()
    problems = [*_problems(connection, num_groups=num_groups, num_issues=num_issues, states=states)]
    if compare:
        problems += _against_saved(connection)
    return LedgerSums(
        num_groups=num_groups,
        num_issues=num_issues,
        durable=states["durable"],
        trained=states["trained"],
        ready=states["ready"],
        issued=states["issued"],
        dropped=reasons["dropped"],
        reissued=reasons["reissued"],
        num_lives=num_lives,
        num_undone=num_undone,
        num_steps=num_steps,
        problems=tuple(problems),
    )


_STANDING = """
    SELECT step, num_groups FROM batches AS b
    WHERE NOT EXISTS (SELECT 1 FROM lives AS l WHERE l.incarnation > b.incarnation AND l.step <= b.step)
"""
"""Batches that no later life took back by beginning with weights from before them."""


def _problems(
    connection: sqlite3.Connection, *, num_groups: int, num_issues: int, states: Counter[str]
) -> Iterator[str]:
    groups = connection.execute("SELECT count(DISTINCT grp) FROM issues").fetchone()[0]
    if groups != num_groups:
        missing = _numbers(
            connection,
            "SELECT i.grp + 1 FROM issues i WHERE i.attempt = 0 AND i.grp + 1 < ? "
            "AND NOT EXISTS (SELECT 1 FROM issues n WHERE n.grp = i.grp + 1)",
            num_groups,
        )
        yield f"{num_groups - groups} of {num_groups} groups were issued and have no row, from {missing} on"
    ends = sum(count for state, count in states.items() if state != "reissued")
    if ends != groups:
        yield f"{groups} groups have {ends} ends: each has exactly one issue that counts"
    if num_issues - groups != states["reissued"]:
        yield f"{num_issues - groups} issues are second ones, and {states['reissued']} were reissued"
    checks = {
        "have no end: every issue of them was reissued and none followed": (
            "SELECT grp FROM issues GROUP BY grp HAVING sum(state <> 'reissued') = 0"
        ),
        "ended twice": "SELECT grp FROM issues GROUP BY grp HAVING sum(state <> 'reissued') > 1",
        "were issued again without being reissued, or the other way round": (
            "SELECT grp FROM issues GROUP BY grp "
            "HAVING max(attempt) + 1 <> count(*) OR sum(state = 'reissued') <> max(attempt)"
        ),
        "changed their prompt when they were issued again": (
            "SELECT grp FROM issues GROUP BY grp HAVING count(DISTINCT prompt) > 1"
        ),
        "ended without a reason": "SELECT grp FROM issues WHERE state IN ('dropped', 'reissued') AND reason = ''",
        "were trained on without having been ready": (
            "SELECT grp FROM issues WHERE state IN ('ready', 'trained', 'durable') AND life IS NULL"
        ),
        "were trained on at a step that no batch stands for": (
            f"SELECT grp FROM issues WHERE step IS NOT NULL AND step NOT IN (SELECT step FROM ({_STANDING}))"
        ),
        "are durable and were trained on after groups that are not": (
            "SELECT grp FROM issues WHERE state = 'durable' "
            "AND step >= (SELECT min(step) FROM issues WHERE state = 'trained')"
        ),
    }
    for what, sql in checks.items():
        if connection.execute(f"SELECT 1 FROM ({sql})").fetchone():
            yield f"groups {_numbers(connection, sql)} {what}"
    for step, said, found in connection.execute(
        f"SELECT s.step, s.num_groups, count(i.grp) FROM ({_STANDING}) s LEFT JOIN issues i ON i.step = s.step "
        "GROUP BY s.step, s.num_groups HAVING s.num_groups <> count(i.grp) LIMIT 10"
    ):
        yield f"step {step} was trained on {said} groups, and {found} say so"
    for step, count in connection.execute(
        f"SELECT step, count(*) FROM ({_STANDING}) GROUP BY step HAVING count(*) > 1"
    ):
        yield f"step {step} was trained {count} times"
    first, last, count = connection.execute(f"SELECT min(step), max(step), count(*) FROM ({_STANDING})").fetchone()
    if count and (first != 0 or last + 1 != count):
        yield f"{count} batches stand, from step {first} to {last}: some are missing"


def _against_saved(connection: sqlite3.Connection) -> Iterator[str]:
    """What a whole checkpoint vouches for."""
    lost = (
        "SELECT s.grp FROM saved.issues s LEFT JOIN main.issues i ON i.grp = s.grp AND i.attempt = s.attempt "
        "WHERE i.grp IS NULL OR i.prompt <> s.prompt OR (s.state = 'dropped' AND i.state <> 'dropped') "
        "OR (s.step IS NOT NULL AND (i.step IS NULL OR i.step <> s.step OR i.place <> s.place))"
    )
    if connection.execute(f"SELECT 1 FROM ({lost})").fetchone():
        yield f"groups {_numbers(connection, lost)} are not what the newest checkpoint's copy says of them"


def _numbers(connection: sqlite3.Connection, sql: str, *values: int) -> str:
    found = [row[0] for row in connection.execute(f"{sql} LIMIT {_MAX_NAMED + 1}", values)]
    more = ", ..." if len(found) > _MAX_NAMED else ""
    return ", ".join(str(group) for group in found[:_MAX_NAMED]) + more


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()
