"""The ledger under random histories and crashes: it adds up, nothing is trained twice or lost without a reason."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaudio.errors import LedgerError
from rlaudio.experience import ledger as ledger_module
from rlaudio.experience.audit import audit
from rlaudio.experience.commits import DirectCommits
from rlaudio.experience.ledger import Entry, Ledger
from rlaudio.experience.lineage import Lineage
from rlaudio.experience.spool import Spooled
from rlaudio.types import WeightVersion


@dataclass(frozen=True)
class Played:
    versions: tuple[WeightVersion, WeightVersion]
    spooled: Spooled | None = None


def played(number: int = 0, *, incarnation: int = 0, file: str = "") -> Played:
    version = WeightVersion(incarnation, number)
    return Played((version, version), Spooled(file, "0" * 64, 100) if file else None)


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits at once and without waiting for the disk: only a power cut would leave something else behind."""
    connect = ledger_module._connect

    def without_sync(path: Path | None) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    monkeypatch.setattr(ledger_module, "_connect", without_sync)
    monkeypatch.setattr(ledger_module, "CommitThread", lambda connection, *, name: DirectCommits(connection))


# ---- histories ----------------------------------------------------------------------------------------------------


@dataclass
class History:
    """A run as the ledger sees it, and what its weights have truly seen.

    Every operation is committed by itself, and the files are copied after each: a crash may leave any of the copies
    since the last checkpoint, as group commits would.
    """

    folder: Path
    ledger: Ledger
    copies: list[Path] = field(default_factory=list)
    seen: list[list[int]] = field(default_factory=list)  # batches of the present weights
    saved: list[list[int]] = field(default_factory=list)
    dropped: set[int] = field(default_factory=set)
    num_copies: int = 0

    @property
    def version(self) -> WeightVersion:
        return WeightVersion(self.ledger.incarnation, len(self.seen))

    def groups(self, state: str) -> list[int]:
        return sorted(entry.group for entry in self.ledger._open.values() if entry.state == state)

    def copy(self) -> None:
        self.ledger.flush()
        self.num_copies += 1
        into = self.folder / str(self.num_copies)
        into.mkdir()
        for file in self.folder.glob("ledger.sqlite*"):
            shutil.copyfile(file, into / file.name)
        self.copies.append(into / "ledger.sqlite")

    def play(self, what: str, pick: int) -> None:
        ledger = self.ledger
        if what == "issue":
            ledger.issued(ledger.num_groups, prompt=f"p{ledger.num_groups}")
        elif what == "ready" and (groups := self.groups("issued")):
            ledger.ready(groups[pick % len(groups)], Played((self.version, self.version)))
        elif what == "drop" and (groups := self.groups("issued") + self.groups("ready")):
            ledger.dropped(groups[pick % len(groups)], reason="no signal")
        elif what == "lose" and (groups := self.groups("issued") + self.groups("ready")):
            ledger.reissued(groups[pick % len(groups)], reason="lost")
        elif what == "train" and (groups := self.groups("ready")):
            batch = groups[: 1 + pick % 3]
            ledger.trained(batch, step=len(self.seen))
            self.seen.append(batch)
        elif what == "checkpoint":
            self.checkpoint(unfinished=pick % 5 == 0)
        elif what == "crash":
            self.crash(pick)
        self.copy()

    def checkpoint(self, *, unfinished: bool) -> None:
        """The copy inside holds all that was said; a save that is cut off counts for nothing."""
        inside = self.folder / "inside.sqlite"
        inside.unlink(missing_ok=True)
        self.ledger.snapshot(inside)
        assert not audit(inside).problems
        if unfinished:
            return
        self.copies.clear()
        self.copy()  # a crash before the ledger hears of the checkpoint
        self.ledger.durable(step=len(self.seen), version=self.version)
        self.saved = list(self.seen)

    def crash(self, pick: int) -> None:
        """Some commits are lost, the process is; the next one begins with the last checkpoint's weights."""
        self.ledger.close()
        if self.copies:
            left = self.copies[pick % len(self.copies)]
            assert not audit(left).problems, "whatever a crash leaves adds up"
            for file in self.folder.glob("ledger.sqlite*"):
                file.unlink()
            for file in left.parent.iterdir():
                shutil.copyfile(file, self.folder / file.name)
        self.ledger = Ledger.open(self.folder / "ledger.sqlite")
        origin = WeightVersion(self.ledger.incarnation, len(self.saved))

        def problem(entry: Entry, place: int) -> str:
            return "abandoned" if entry.group % 2 else ""

        self.ledger.restore(step=len(self.saved), origin=origin, problem=problem)
        self.seen = list(self.saved)
        self.copies.clear()

    def check(self) -> None:
        self.ledger.flush()
        path = self.folder / "ledger.sqlite"
        sums = audit(path)
        assert sums.problems == ()
        assert sums.issued + sums.ready + sums.trained + sums.durable + sum(sums.dropped.values()) == sums.num_groups
        assert sums.num_issues == sums.num_groups + sum(sums.reissued.values())
        with closing(sqlite3.connect(path)) as connection:
            trained = dict(connection.execute("SELECT grp, step FROM issues WHERE step IS NOT NULL"))
        told = {group: step for step, batch in enumerate(self.seen) for group in batch}
        assert len(told) == sum(map(len, self.seen)), "trained twice"
        assert trained == told, "the ledger says of the weights what they have seen"


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["issue", "issue", "issue", "ready", "ready", "drop", "lose", "train", "train", "checkpoint", "crash"]
        ),
        st.integers(0, 20),
    ),
    max_size=35,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=STEPS)
@pytest.mark.usefixtures("quick_disk")
def test_any_history_with_crashes_anywhere_adds_up(steps: list[tuple[str, int]], tmp_path: Path) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    history = History(folder, Ledger.create(folder / "ledger.sqlite"))
    try:
        for what, pick in [("issue", 0), ("ready", 0), *steps, ("crash", 3)]:
            history.play(what, pick)
            if what in ("crash", "checkpoint"):
                history.check()
    finally:
        history.ledger.close()
        shutil.rmtree(folder)


def test_a_process_that_is_killed_while_it_writes_leaves_a_ledger_that_adds_up(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from tests.unit.test_ledger import Ledger, Path, played
        ledger = Ledger.create(Path(sys.argv[1]))
        step = 0
        while True:
            for group in range(4 * step, 4 * step + 4):
                ledger.issued(group, prompt="p")
                ledger.ready(group, played())
            if step == 20:
                print("under way", flush=True)
            ledger.dropped(4 * step, reason="no signal")
            ledger.trained(range(4 * step + 1, 4 * step + 4), step=step)
            step += 1
    """)
    path = tmp_path / "ledger.sqlite"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "under way\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    process.stdout.close()
    assert audit(path).problems == ()
    with closing(Ledger.open(path)) as ledger:
        returned = ledger.restore(step=0, origin=WeightVersion(0, 0), problem=lambda entry, place: "")
        sums = ledger.sums()
        assert sums.problems == () and sums.num_lives == 2 and sums.trained == sums.durable == 0
        assert len(returned) == sums.ready + sums.issued == sums.num_groups - sum(sums.dropped.values())


# ---- what cannot have happened ------------------------------------------------------------------------------------


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    """Group 0 issued, 1 ready, 2 trained, 3 durable, 4 dropped, 5 reissued and so issued."""
    with closing(Ledger.in_memory()) as ledger:
        for group in range(6):
            ledger.issued(group, prompt=f"p{group}")
            if group in (1, 2, 3):
                ledger.ready(group, played(file=f"{group}.arrow"))
        ledger.trained([3], step=0)
        ledger.durable(step=1, version=WeightVersion(0, 1))
        ledger.trained([2], step=1)
        ledger.dropped(4, reason="no signal")
        ledger.reissued(5, reason="lost")
        yield ledger


LEGAL = {"ready": {0, 5}, "trained": {1}, "dropped": {0, 1, 5}, "reissued": {0, 1, 5}}


@pytest.mark.parametrize("group", range(7))
@pytest.mark.parametrize("what", LEGAL)
def test_a_group_goes_only_where_it_can(ledger: Ledger, what: str, group: int) -> None:
    calls: dict[str, Any] = {
        "ready": lambda: ledger.ready(group, played()),
        "trained": lambda: ledger.trained([group], step=2),
        "dropped": lambda: ledger.dropped(group, reason="why"),
        "reissued": lambda: ledger.reissued(group, reason="why"),
    }
    if group in LEGAL[what]:
        calls[what]()
    else:
        with pytest.raises(LedgerError, match=f"group {group} cannot be {what}"):
            calls[what]()
    assert not ledger.sums().problems


def test_numbers_are_dealt_one_after_another(ledger: Ledger) -> None:
    for group in (5, 7):
        with pytest.raises(LedgerError, match="where 6 is next"):
            ledger.issued(group, prompt="p")


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE issues SET state = 'trained', step = 9 WHERE grp = 4",
        "UPDATE issues SET state = 'ready', reason = '' WHERE grp = 4",
        "UPDATE issues SET state = 'durable', step = 9 WHERE grp = 0",
        "UPDATE issues SET state = 'dropped' WHERE grp = 0",
        "UPDATE issues SET step = 9 WHERE grp = 0",
        "UPDATE issues SET step = 1, place = 0 WHERE grp = 3",
        "INSERT INTO issues (grp, attempt, prompt, incarnation, state) VALUES (0, 1, 'p0', 0, 'issued')",
        "DELETE FROM issues WHERE grp = 0",
    ],
)
def test_the_database_refuses_it_too(ledger: Ledger, sql: str) -> None:
    with pytest.raises(LedgerError, match="refuses"):
        ledger._commits.put((sql, ()))


# ---- an audit that can fail ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("DELETE FROM issues WHERE grp = 4", "1 of 6 groups were issued and have no row, from 4 on"),
        ("UPDATE issues SET state = 'reissued', reason = 'x' WHERE grp = 0", "groups 0 have no end"),
        ("UPDATE issues SET state = 'issued', reason = '' WHERE grp = 5 AND attempt = 0", "groups 5 ended twice"),
        ("DELETE FROM issues WHERE grp = 5 AND attempt = 0", "groups 5 were issued again without being reissued"),
        ("UPDATE issues SET prompt = 'other' WHERE grp = 5 AND attempt = 1", "groups 5 changed their prompt"),
        ("UPDATE issues SET reason = '' WHERE grp = 4", "groups 4 ended without a reason"),
        ("UPDATE issues SET life = NULL WHERE grp = 2", "groups 2 were trained on without having been ready"),
        ("UPDATE issues SET step = 7 WHERE grp = 2", "groups 2 were trained on at a step that no batch stands for"),
        ("UPDATE issues SET step = 0, place = 1 WHERE grp = 2", "step 0 was trained on 1 groups, and 2 say so"),
        ("UPDATE issues SET state = 'ready', step = NULL WHERE grp = 3", "step 0 was trained on 1 groups, and 0 say"),
        ("UPDATE issues SET state = 'durable' WHERE grp = 2; UPDATE issues SET state = 'trained' WHERE grp = 3",
         "groups 2 are durable and were trained on after groups that are not"),
        ("DELETE FROM batches WHERE step = 0", "1 batches stand, from step 1 to 1: some are missing"),
        ("INSERT INTO lives VALUES (1, 0, 1, 2, 0, 0, 0); INSERT INTO batches VALUES (1, 1, 1)",
         "step 1 was trained 2 times"),
        ("UPDATE issues SET state = 'issued', reason = '' WHERE grp = 4", "not what the newest checkpoint's copy"),
        ("UPDATE issues SET prompt = 'other' WHERE grp = 3", "groups 3 are not what the newest checkpoint's copy"),
    ],
)  # fmt: skip
def test_an_audit_names_what_does_not_add_up(ledger: Ledger, tmp_path: Path, sql: str, says: str) -> None:
    copy, damaged = tmp_path / "copy.sqlite", tmp_path / "damaged.sqlite"
    ledger.snapshot(copy)
    assert audit(copy, covered=copy).problems == ()
    shutil.copyfile(copy, damaged)
    with closing(sqlite3.connect(damaged)) as connection:
        free = "PRAGMA ignore_check_constraints = 1; DROP TRIGGER legal; DROP TRIGGER kept;"
        connection.executescript(f"{free} DROP INDEX one_issue_counts; {sql};")
        connection.commit()
    problems = audit(damaged, covered=copy).problems
    assert any(says in problem for problem in problems), problems


def test_an_audit_of_something_else_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("not a database, though it is long enough to be looked at" * 20)
    for name in ("other", "missing"):
        with pytest.raises(LedgerError, match="cannot be audited"):
            audit(tmp_path / name)


# ---- opening ------------------------------------------------------------------------------------------------------


def test_a_damaged_or_foreign_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(LedgerError, match="no ledger at"):
        Ledger.open(path)
    Ledger.create(path).close()
    with pytest.raises(LedgerError, match="exists already"):
        Ledger.create(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE facts SET value = '0' WHERE name = 'schema'")
        connection.commit()
    with pytest.raises(LedgerError, match="schema 0, this rlaudio reads 1"):
        Ledger.open(path)
    path.write_bytes(b"SQLite format 3\0" + b"\1" * 5000)
    with pytest.raises(LedgerError, match="not a ledger, or damaged|cannot be opened"):
        Ledger.open(path)


def test_a_disk_that_fails_ends_the_run_at_its_next_word(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    ledger._commits.put(("UPDATE issues SET missing = 0", ()))
    with pytest.raises(LedgerError, match=r"cannot record in the ledger .*no such column"):
        ledger.flush()
    with pytest.raises(LedgerError, match="cannot record"):
        ledger.issued(0, prompt="p")
    with pytest.raises(LedgerError, match="cannot record"):
        ledger.close()


# ---- files --------------------------------------------------------------------------------------------------------


def files_left(*, keep_files: bool, max_file_bytes: int = 0) -> tuple[set[str], Ledger]:
    """Of five groups with a file each: one open, one dropped, one durable, one trained fresh, one trained since."""
    gone: set[str] = set()
    ledger = Ledger(
        ledger_module._begun(ledger_module._connect(None)),
        name="test",
        discard=gone.add,
        keep_files=keep_files,
        max_file_bytes=max_file_bytes,
    )
    for group, number in enumerate((0, 0, 0, 1, 2)):
        ledger.issued(group, prompt="p")
        ledger.ready(group, played(number, file="open dropped durable fresh since".split()[group]))
    ledger.dropped(1, reason="no signal")
    ledger.trained([2], step=0)
    ledger.durable(step=1, version=WeightVersion(0, 1))
    ledger.trained([3, 4], step=1)
    return gone, ledger


def test_files_go_when_no_restore_could_use_them() -> None:
    gone, ledger = files_left(keep_files=False)
    assert gone == {"dropped", "durable", "since"}
    assert ledger._file_bytes == 200
    assert files_left(keep_files=True)[0] == set()


def test_files_beyond_the_bound_are_not_kept() -> None:
    gone, ledger = files_left(keep_files=False, max_file_bytes=250)
    assert gone >= {"durable", "fresh", "since"} and ledger._file_bytes <= 250
    assert not ledger.sums().problems


# ---- lineage ------------------------------------------------------------------------------------------------------


def test_abandoned_weights_are_no_ancestors_whatever_their_number() -> None:
    """Life 1 went on from (0, 50), life 2 from (1, 60), life 3 from (0, 50) again."""
    v = WeightVersion
    lineage = Lineage({0: v(0, 0), 1: v(0, 50), 2: v(1, 60), 3: v(0, 50)})
    now = v(2, 70)
    assert all(lineage.is_ancestor(one, of=now) for one in (v(0, 0), v(0, 50), v(1, 50), v(1, 60), v(2, 60), now))
    assert not any(lineage.is_ancestor(one, of=now) for one in (v(0, 51), v(1, 61), v(2, 71), v(3, 51), v(3, 60)))
    assert lineage.is_ancestor(v(3, 50), of=v(1, 50)), "the same weights under two names"
