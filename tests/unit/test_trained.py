"""What a replay is given: the batches that stand, in their order, and the checkpoint that they follow."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaudio.errors import CheckpointError, LedgerError
from rlaudio.experience.ledger import Ledger
from rlaudio.experience.spool import Spooled
from rlaudio.experience.trained import TrainedBatch, TrainedGroup, trained_batches
from rlaudio.recipes.checkpoints import CheckpointStore, DriverState
from rlaudio.types import WeightVersion


def ready(ledger: Ledger, group: int, *, version: WeightVersion) -> TrainedGroup:
    file = Spooled(f"{group}@{version}", "0" * 64, 100)
    judged: Any = SimpleNamespace(versions=(version, version), spooled=file)
    ledger.ready(group, judged)
    return TrainedGroup(group, file)


def test_what_stands_is_given_in_the_order_of_the_learner(tmp_path: Path) -> None:
    """Steps 0 and 1, the latter taken back and trained anew; what is dropped or only ready is not there."""
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger.create(path, keep_files=True)
    for group in range(6):
        ledger.issued(group, prompt="r")
    first = [ready(ledger, group, version=WeightVersion(0, 0)) for group in (2, 0)]
    ledger.trained([one.group for one in first], step=0)
    ledger.durable(step=1, version=WeightVersion(0, 1))
    for group in (1, 3):
        ready(ledger, group, version=WeightVersion(0, 1))
    ledger.trained([1, 3], step=1)
    ledger.restore(step=1, origin=WeightVersion(0, 1), problem=lambda entry, num_before: "gone")
    again = [ready(ledger, group, version=WeightVersion(1, 1)) for group in (4, 1)]
    ledger.trained([4, 1], step=1)
    ledger.dropped(5, reason="no signal")
    ready(ledger, 3, version=WeightVersion(1, 1))
    ledger.flush()
    whole = [TrainedBatch(0, tuple(first)), TrainedBatch(1, tuple(again))]
    assert trained_batches(path) == whole, "read beside a run that goes on"
    assert trained_batches(path, first_step=1) == whole[1:]
    ledger.close()
    assert trained_batches(path) == whole


def test_files_that_a_run_let_go_of_are_not_named(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    ledger.issued(0, prompt="r")
    ready(ledger, 0, version=WeightVersion(0, 0))
    ledger.trained([0], step=0)
    ledger.durable(step=1, version=WeightVersion(0, 1))
    ledger.close()
    assert trained_batches(tmp_path / "ledger.sqlite") == [TrainedBatch(0, (TrainedGroup(0, None),))]


def test_a_run_without_a_ledger_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger at"):
        trained_batches(tmp_path / "ledger.sqlite")
    (tmp_path / "ledger.sqlite").write_text("no database")
    with pytest.raises(LedgerError, match="cannot be read"):
        trained_batches(tmp_path / "ledger.sqlite")


def test_a_checkpoint_is_examined_and_left_where_it_is(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.begin(4)
    (path / "weights").write_bytes(b"12")
    store.finish(path, DriverState(step=4, incarnation=0, number=4, prompts={}))
    assert store.examined(4) == tmp_path / "step-000004"
    with pytest.raises(CheckpointError, match="there are step-000004"):
        store.examined(2)
    (tmp_path / "step-000004" / "weights").write_bytes(b"13")
    with pytest.raises(CheckpointError, match=r"weights is not what was saved: step-000004 is damaged"):
        store.examined(4)
    assert (tmp_path / "step-000004").is_dir()
