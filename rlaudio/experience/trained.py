"""What a run was trained on, batch by batch, as its ledger has it: for feeding it to a learner again."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rlaudio.errors import LedgerError
from rlaudio.experience.spool import Spooled


@dataclass(frozen=True, slots=True)
class TrainedGroup:
    """A group of a batch; `spooled` is None where the ledger let its file go."""

    group: int
    spooled: Spooled | None


@dataclass(frozen=True, slots=True)
class TrainedBatch:
    """What one step was trained on and no restore took back, in the order in which the learner was given it."""

    step: int
    groups: tuple[TrainedGroup, ...]


def trained_batches(ledger: Path, *, first_step: int = 0) -> list[TrainedBatch]:
    """The batches of `first_step` and later. Reads only, of a run that lives or is dead.

    Raises:
        LedgerError: there is no ledger, or it cannot be read.
    """
    if not ledger.is_file():
        raise LedgerError(f"there is no ledger at {ledger}: give a run that was trained by this version of rlaudio")
    sql = "SELECT step, grp, file, sha256, num_bytes FROM issues WHERE step >= ? ORDER BY step, place"
    try:
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
            rows = connection.execute(sql, (first_step,)).fetchall()
    except sqlite3.Error as error:
        raise LedgerError(f"{ledger} cannot be read ({error}): is it a run's ledger, and whole?") from error
    return [
        TrainedBatch(
            step, tuple(TrainedGroup(group, Spooled(*file) if file[0] else None) for _, group, *file in members)
        )
        for step, members in groupby(rows, key=lambda row: row[0])
    ]
