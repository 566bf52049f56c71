"""The ledger: what became of every prompt group, written down where no crash of the run can lose it.

```
 issued ──▶ ready ──▶ trained@step ──▶ durable      once a checkpoint holds what was learned from it
    │         │            │              │
    ├─────────┴──▶ dropped(reason)        │         for good
    │         ▲            │              │
    │         └────────────┴──────────────┤         a restore of weights from before that step: ready again,
    └──▶ reissued(reason) ◀───────────────┘         or a new issue under the old number (also where a file was lost)
```

A group keeps its number for life: it names prompt and seeds, so a group that is issued again under the same weights
is played alike, and long dialogues come back as often as short ones. Numbers are those of the prompts' stream.

What the loop says is checked at once and committed soon, by one thread (`commits.py`). Nothing needs to be awaited:
what a crash takes from the ledger it takes from the run too. Only a checkpoint waits (`snapshot`), for it vouches for
all before it. SQLite in WAL mode, for which network file systems lack the locks: `run.ledger` is on this machine.
"""

import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from rlaudio.errors import LedgerError
from rlaudio.experience.audit import LedgerSums, audit_connection
from rlaudio.experience.commits import Commits, CommitThread, DirectCommits, Statement
from rlaudio.experience.ledger_schema import SCHEMA, SCHEMA_VERSION
from rlaudio.experience.lineage import Lineage
from rlaudio.experience.spool import Spooled
from rlaudio.types import WeightVersion

State = Literal["issued", "ready", "trained", "durable", "dropped", "reissued"]


class Judged(Protocol):
    """What is recorded of a group that was played and judged."""

    @property
    def versions(self) -> tuple[WeightVersion, WeightVersion]:
        """Oldest and newest weights that sampled a token of it."""
        ...

    @property
    def spooled(self) -> Spooled | None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """The present issue of a group.

    Attributes:
        group: its number.
        attempt: issues before this one.
        prompt: id of its record.
        step, place: that it was trained at, and in its batch, when it was.
        versions: see `Judged`; None before it is ready.
        spooled: its file, while there is one.
    """

    group: int
    attempt: int
    prompt: str
    state: State
    step: int | None = None
    place: int | None = None
    versions: tuple[WeightVersion, WeightVersion] | None = None
    spooled: Spooled | None = None


class Ledger:
    """The open ledger of a run: made by `create`, `open` or `in_memory`, used from one thread.

    Args:
        connection: the database.
        name: for errors.
        discard: told in the writer's thread, after the commit, of files that nobody will ask for again.
        keep_files: never discard (for `rlaudio replay`).
        max_file_bytes: of all files that are kept; beyond it groups are recorded without one, and are reissued after a
            crash. 0: no bound.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        name: str,
        discard: Callable[[str], None] = lambda name: None,
        keep_files: bool = False,
        max_file_bytes: int = 0,
    ) -> None:
        self._discard, self._keep_files, self._max_file_bytes = discard, keep_files, max_file_bytes
        origins = connection.execute("SELECT incarnation, parent, number FROM lives").fetchall()
        self.lineage = Lineage({life: WeightVersion(parent, number) for life, parent, number in origins})
        self.incarnation = max(self.lineage.origins)
        self.num_groups: int = connection.execute("SELECT coalesce(max(grp), -1) + 1 FROM issues").fetchone()[0]
        # What may still change. The rest is on disk alone, so memory does not grow with the run.
        self._open = {entry.group: entry for entry in map(_entry, connection.execute(_UNFINISHED))}
        self._saved = self.lineage.origins[self.incarnation]
        self._file_bytes = sum(entry.spooled.num_bytes for entry in self._open.values() if entry.spooled)
        in_memory = not connection.execute("PRAGMA database_list").fetchone()[2]
        self._commits: Commits = DirectCommits(connection) if in_memory else CommitThread(connection, name=name)

    @classmethod
    def create(cls, path: Path, **options: Any) -> Self:
        """A new ledger; options as of the class. Raises LedgerError: there is one already, or it cannot be written."""
        if path.exists():
            raise LedgerError(f"{path} exists already: resume its run, or start a new one")
        return cls(_begun(_connect(path)), name=str(path), **options)

    @classmethod
    def in_memory(cls) -> Self:
        """One that nobody will need after this process: for measurements and tests."""
        return cls(_begun(_connect(None)), name="in memory")

    @classmethod
    def open(cls, path: Path, **options: Any) -> Self:
        """Go on with a ledger, as its last commit left it, however the process ended.

        Raises:
            LedgerError: not a ledger, damaged, or of another version.
        """
        if not path.is_file():
            raise LedgerError(f"there is no ledger at {path}")
        connection = _connect(path)
        try:
            problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            version = connection.execute("SELECT value FROM facts WHERE name = 'schema'").fetchone()[0]
        except (sqlite3.Error, TypeError) as error:
            connection.close()
            raise LedgerError(f"{path} is not a ledger, or damaged ({error})") from error
        if problem != "ok" or version != SCHEMA_VERSION:
            connection.close()
            told = problem if problem != "ok" else f"schema {version}, this rlaudio reads {SCHEMA_VERSION}"
            raise LedgerError(f"{path} cannot be used: {told}")
        return cls(connection, name=str(path), **options)

    # ---- what happens to a group ---------------------------------------------------------------------------------

    def issued(self, group: int, *, prompt: str) -> None:
        """A prompt leaves the stream, as the group of its number.

        Raises:
            LedgerError: as of every method here: it cannot have happened (a bug), or it cannot be written.
        """
        if group != self.num_groups:
            raise LedgerError(f"group {group} is issued where {self.num_groups} is next: a prompt was lost or doubled")
        self.num_groups += 1
        self._open[group] = entry = Entry(group, 0, prompt, "issued")
        self._commits.put(self._insert(entry))

    def ready(self, group: int, judged: Judged) -> None:
        """It was played and judged, and can be trained on."""
        entry = self._leaving(group, "ready", of=("issued",))
        spooled = judged.spooled
        self._file_bytes += spooled.num_bytes if spooled else 0
        if spooled and self._max_file_bytes and self._file_bytes > self._max_file_bytes:
            self._commits.put(after=self._discarding([replace(entry, spooled=spooled)]))
            spooled = None
        self._open[group] = replace(entry, state="ready", versions=judged.versions, spooled=spooled)
        self._commits.put(_update(self._open[group]))

    def trained(self, groups: Sequence[int], *, step: int) -> None:
        """A batch was trained on, whole: provisional until `durable`."""
        entries = [self._leaving(group, "trained", of=("ready",)) for group in groups]
        statements: list[Statement] = [("INSERT INTO batches VALUES (?, ?, ?)", (step, self.incarnation, len(groups)))]
        useless = []
        for place, entry in enumerate(entries):
            newest = entry.versions[1] if entry.versions else self._saved
            trained = replace(entry, state="trained", step=step, place=place)
            # What has seen weights that no checkpoint holds would not be fresh after a restore.
            if not self._keep_files and not self.lineage.is_ancestor(newest, of=self._saved):
                useless.append(trained)
                trained = replace(trained, spooled=None)
            self._open[entry.group] = trained
            statements.append(_update(trained))
        self._commits.put(*statements, after=self._discarding(useless))

    def dropped(self, group: int, *, reason: str) -> None:
        """It will not be trained on, for good."""
        entry = self._leaving(group, "dropped", of=("issued", "ready"))
        del self._open[group]
        self._commits.put(_update(_ended(entry, "dropped"), reason=reason), after=self._discarding([entry]))

    def reissued(self, group: int, *, reason: str) -> None:
        """What was made of it is lost: it is played again, as a new issue of the same number."""
        entry = self._leaving(group, "reissued", of=("issued", "ready"))
        self._open[group] = again = _again(entry)
        self._commits.put(
            _update(_ended(entry, "reissued"), reason=reason),
            self._insert(again),
            after=self._discarding([entry]),
        )

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def snapshot(self, path: Path) -> None:
        """Copy the ledger with everything that was recorded before. Blocks until the copy is on disk."""

        def copy(connection: sqlite3.Connection) -> None:
            target = sqlite3.connect(path, isolation_level=None)
            try:
                connection.backup(target)
                target.execute("PRAGMA journal_mode = DELETE")  # one file, which a checksum can stand for
            finally:
                target.close()

        self._commits.wait(self._commits.put(after=copy))

    def durable(self, *, step: int, version: WeightVersion) -> None:
        """A whole checkpoint of these weights, after `step` batches, is on disk: it covers all batches before."""
        covered = [entry for entry in self._open.values() if entry.step is not None and entry.step < step]
        self._saved = version
        for entry in covered:
            del self._open[entry.group]
        kept = covered if self._keep_files else [replace(entry, spooled=None) for entry in covered]
        self._commits.put(
            *(_update(replace(entry, state="durable")) for entry in kept),
            after=self._discarding([] if self._keep_files else covered),
        )

    def restore(self, *, step: int, origin: WeightVersion, problem: Callable[[Entry, int], str]) -> list[Entry]:
        """Begin a new life of the run with the weights that `step` batches made. On disk when this returns.

        What was trained at a later step was not trained: it is ready again or reissued, like what was under way.

        Args:
            origin: those weights, as they were called when they were made.
            problem: why a group that was ready once cannot be trained on now, or nothing. It is given the group and how
                many come back before it.

        Returns:
            The groups that come back, by number.
        """
        life = self.incarnation + 1
        uncovered = [_entry(row) for row in self._read(_TRAINED_SINCE, step)]
        found = {entry.group: entry for entry in [*self._open.values(), *uncovered]}
        statements: list[Statement] = []
        returned: list[Entry] = []
        undone = 0
        for _, entry in sorted(found.items()):
            if entry.step is not None and entry.step < step:
                statements.append(_update(replace(entry, state="durable")))
                continue
            undone += entry.step is not None
            why = "under way when its run ended" if entry.versions is None else problem(entry, len(returned))
            if why:
                returned.append(_again(entry))
                statements.append(_update(_ended(entry, "reissued"), reason=why))
                statements.append(self._insert(returned[-1], incarnation=life))
            else:
                returned.append(replace(entry, state="ready", step=None, place=None))
                statements.append(_update(returned[-1]))
        began = (life, origin.incarnation, origin.number, step, time.time(), len(returned), undone)
        self._commits.wait(self._commits.put(("INSERT INTO lives VALUES (?, ?, ?, ?, ?, ?, ?)", began), *statements))
        self.incarnation, self._saved = life, origin
        self.lineage = Lineage({**self.lineage.origins, life: origin})
        self._open = {entry.group: entry for entry in returned}
        self._file_bytes = sum(entry.spooled.num_bytes for entry in returned if entry.spooled)
        return returned

    def prompts_since(self, group: int) -> list[str]:
        """Ids of the records that were issued from this group on, by number."""
        sql = "SELECT prompt FROM issues WHERE grp >= ? AND state <> 'reissued' ORDER BY grp"
        return [prompt for (prompt,) in self._read(sql, group)]

    def sums(self) -> LedgerSums:
        """An audit of everything that was recorded so far; see `audit.py`. Blocks."""
        found: list[LedgerSums] = []
        self._commits.wait(self._commits.put(after=lambda connection: found.append(audit_connection(connection))))
        return found[0]

    def flush(self) -> None:
        """Block until everything recorded so far is on disk."""
        self._commits.wait(self._commits.put())

    def close(self) -> None:
        """Record what is left, end the writer; safe to call twice."""
        self._commits.close()

    # ---- details -------------------------------------------------------------------------------------------------

    def _leaving(self, group: int, state: State, *, of: tuple[State, ...]) -> Entry:
        entry = self._open.get(group)
        if entry is None or entry.state not in of:
            was = "was never issued, or ended before" if entry is None else f"is {entry.state}"
            raise LedgerError(f"group {group} cannot be {state}: it {was}; this is a bug in rlaudio, report this line")
        return entry

    def _insert(self, entry: Entry, *, incarnation: int | None = None) -> Statement:
        life = self.incarnation if incarnation is None else incarnation
        sql = "INSERT INTO issues (grp, attempt, prompt, incarnation, state) VALUES (?, ?, ?, ?, 'issued')"
        return sql, (entry.group, entry.attempt, entry.prompt, life)

    def _discarding(self, entries: Sequence[Entry]) -> Callable[[sqlite3.Connection], None] | None:
        """What deletes their files once the commit that makes them useless is on disk."""
        files = [entry.spooled for entry in entries if entry.spooled]
        if not files or self._keep_files:
            return None
        self._file_bytes -= sum(file.num_bytes for file in files)

        def discard(_: sqlite3.Connection) -> None:
            for file in files:
                self._discard(file.name)

        return discard

    def _read(self, sql: str, *values: Any) -> list[Any]:
        """Rows of a query, after everything that was recorded before it. Blocks."""
        rows: list[Any] = []

        def read(connection: sqlite3.Connection) -> None:
            rows.extend(connection.execute(sql, values).fetchall())

        self._commits.wait(self._commits.put(after=read))
        return rows


_COLUMNS = "grp, attempt, prompt, state, step, place, life, oldest, newest, file, sha256, num_bytes"
_UNFINISHED = f"SELECT {_COLUMNS} FROM issues WHERE state IN ('issued', 'ready', 'trained')"
_TRAINED_SINCE = f"SELECT {_COLUMNS} FROM issues WHERE state = 'durable' AND step >= ?"


def _entry(row: tuple[Any, ...]) -> Entry:
    group, attempt, prompt, state, step, place, life, oldest, newest, file, sha256, num_bytes = row
    return Entry(
        group=group,
        attempt=attempt,
        prompt=prompt,
        state=state,
        step=step,
        place=place,
        versions=None if life is None else (WeightVersion(life, oldest), WeightVersion(life, newest)),
        spooled=None if file is None else Spooled(file, sha256, num_bytes),
    )


def _ended(entry: Entry, state: State) -> Entry:
    return replace(entry, state=state, step=None, place=None, spooled=None)


def _again(entry: Entry) -> Entry:
    return Entry(entry.group, entry.attempt + 1, entry.prompt, "issued")


def _update(entry: Entry, *, reason: str = "") -> Statement:
    """The row of an issue as it is now."""
    oldest, newest = entry.versions or (None, None)
    file = entry.spooled
    return _UPDATE, (
        entry.state,
        reason,
        entry.step,
        entry.place,
        oldest and oldest.incarnation,
        oldest and oldest.number,
        newest and newest.number,
        file and file.name,
        file and file.sha256,
        file and file.num_bytes,
        entry.group,
        entry.attempt,
    )


_UPDATE = (
    "UPDATE issues SET state = ?, reason = ?, step = ?, place = ?, life = ?, oldest = ?, newest = ?, "
    "file = ?, sha256 = ?, num_bytes = ? WHERE grp = ? AND attempt = ?"
)


def reach(path: Path) -> tuple[int, int]:
    """How far a ledger had come: its last life, and groups that were dealt. Changes nothing, not even a checksum.

    Raises:
        LedgerError: it cannot be read.
    """
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            sql = "SELECT (SELECT max(incarnation) FROM lives), (SELECT coalesce(max(grp), -1) + 1 FROM issues)"
            life, num_groups = connection.execute(sql).fetchone()
            return life, num_groups
    except sqlite3.Error as error:
        raise LedgerError(f"{path} cannot be read ({error})") from error


def _connect(path: Path | None) -> sqlite3.Connection:
    name = ":memory:" if path is None else str(path)
    try:
        connection = sqlite3.connect(name, isolation_level=None, check_same_thread=False)
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        connection.execute("PRAGMA synchronous = FULL")
    except sqlite3.Error as error:
        raise LedgerError(
            f"the ledger {name} cannot be opened ({error}): check the folder, or set run.ledger"
        ) from error
    if path is not None and mode != "wal":
        connection.close()
        raise LedgerError(
            f"the disk of {name} has no write-ahead log (SQLite says {mode!r}), as network file systems: set "
            "run.ledger to a folder on this machine's own disk"
        )
    return connection


def _begun(connection: sqlite3.Connection) -> sqlite3.Connection:
    connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
    return connection
