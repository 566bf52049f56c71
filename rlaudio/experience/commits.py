"""One thread that writes to a SQLite database, many statements to a commit: whoever records something never waits.

Statements are committed in the order in which they were put. A commit is one write to disk however many came meanwhile
(`synchronous=FULL`), so what is recorded survives the process at once after it and a power cut too.
"""

import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlaudio.errors import LedgerError

Statement = tuple[str, tuple[Any, ...]]
After = Callable[[sqlite3.Connection], None]

_MAX_IN_COMMIT = 5_000
_MAX_QUEUED = 50_000
"""Beyond it the disk is slower than the run by minutes: whoever records waits, and fails at the deadline."""


@dataclass(frozen=True, slots=True)
class _Work:
    """Attributes:
    statements: committed together or not at all; each must change exactly one row.
    after: called in the thread once they are committed.
    done: resolved after that.
    """

    statements: Sequence[Statement] = ()
    after: After | None = None
    done: "Future[None]" = field(default_factory=Future)
    last: bool = False


class Commits(Protocol):
    """The only writer of a database."""

    def put(self, *statements: Statement, after: After | None = None) -> "Future[None]":
        """Commit these together, in order, soon; then call `after` with the connection."""
        ...

    def wait(self, done: "Future[None]") -> None: ...

    def close(self) -> None: ...


class DirectCommits:
    """For a database in memory: everything is done when it is put."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def put(self, *statements: Statement, after: After | None = None) -> "Future[None]":
        self._connection.execute("BEGIN")
        try:
            _apply(self._connection, statements)
        except sqlite3.Error as error:
            self._connection.execute("ROLLBACK")
            raise LedgerError(f"the ledger in memory refuses it: {error}") from error
        self._connection.execute("COMMIT")
        if after is not None:
            after(self._connection)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def wait(self, done: "Future[None]") -> None:
        done.result()

    def close(self) -> None:
        self._connection.close()


class CommitThread:
    """Commits from a thread of its own.

    Args:
        connection: made with `check_same_thread=False` and `isolation_level=None`; the thread's own from now on.
        name: of the database, for errors.
        deadline_s: for room in the queue, and for whoever waits for a commit.
    """

    def __init__(self, connection: sqlite3.Connection, *, name: str, deadline_s: float = 60.0) -> None:
        self._connection = connection
        self._name = name
        self.deadline_s = deadline_s
        self._queue: queue.Queue[_Work] = queue.Queue(_MAX_QUEUED)
        self._error: BaseException | None = None
        self._closed = False
        self.num_commits = 0
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def put(self, *statements: Statement, after: After | None = None) -> "Future[None]":
        """Commit these together, soon. Returns at once.

        Args:
            after: called in the thread when they are on disk.

        Raises:
            LedgerError: an earlier commit failed, the thread was closed, or the disk has been behind for `deadline_s`.
        """
        if self._error is not None:
            raise LedgerError(_cannot(self._name, self._error)) from self._error
        if self._closed:
            raise LedgerError(f"the ledger {self._name} was closed before: nothing more can be recorded")
        work = _Work(statements, after)
        self._enqueue(work)
        return work.done

    def wait(self, done: "Future[None]") -> None:
        """Block until it is on disk. Raises LedgerError: a commit failed, or the deadline passed."""
        try:
            done.result(self.deadline_s)
        except FutureTimeout as error:
            raise LedgerError(f"{self._name} was not written within {self.deadline_s:g} s: look at its disk") from error

    def close(self) -> None:
        """Commit what was put, then end the thread and the connection; safe to call twice.

        Raises:
            LedgerError: something could not be committed.
        """
        if not self._closed:
            self._closed = True
            work = _Work(last=True)
            self._enqueue(work)
            self.wait(work.done)
            self._thread.join(self.deadline_s)
        if self._error is not None:
            raise LedgerError(_cannot(self._name, self._error)) from self._error

    def _enqueue(self, work: _Work) -> None:
        try:
            self._queue.put(work, timeout=self.deadline_s)
        except queue.Full as error:
            raise LedgerError(
                f"{self._name} is {_MAX_QUEUED} records behind for {self.deadline_s:g} s: look at its disk, or put it "
                "on a faster one with run.ledger"
            ) from error

    def _run(self) -> None:
        ended = False
        while not ended:
            batch = [self._queue.get()]
            while len(batch) < _MAX_IN_COMMIT and not self._queue.empty():
                batch.append(self._queue.get())
            ended = any(work.last for work in batch)
            if self._error is None:
                self._commit(batch)
            error = self._error
            for work in batch:
                if error is not None and not work.last:
                    work.done.set_exception(LedgerError(_cannot(self._name, error)))
                else:
                    work.done.set_result(None)
        self._connection.close()

    def _commit(self, batch: Sequence[_Work]) -> None:
        try:
            if any(work.statements for work in batch):
                self._connection.execute("BEGIN IMMEDIATE")
                for work in batch:
                    _apply(self._connection, work.statements)
                self._connection.execute("COMMIT")
                self.num_commits += 1
            for work in batch:
                if work.after is not None:
                    work.after(self._connection)
        except Exception as error:  # told to everybody who waits, and to whoever comes next
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            self._error = error


def _apply(connection: sqlite3.Connection, statements: Sequence[Statement]) -> None:
    for sql, values in statements:
        if connection.execute(sql, values).rowcount != 1:
            raise LedgerError(f"{sql!r} with {values} did not change exactly one row")


def _cannot(name: str, error: BaseException) -> str:
    return (
        f"cannot record in the ledger {name} ({type(error).__name__}: {error}): free disk space or check the file, "
        "then resume the run from its last checkpoint"
    )
