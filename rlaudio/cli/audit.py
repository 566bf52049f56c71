"""`rlaudio audit RUN`: whether the run's ledger adds up. Reads only, of a run that lives or is dead."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from rlaudio.experience.audit import LedgerSums, audit
from rlaudio.recipes.checkpoints import LEDGER_COPY, CheckpointStore
from rlaudio.runs import RunFolder, find_run

FAILED = 1
"""Exit code where something does not add up."""


def audit_command(run: str) -> int:
    """Print the sums and what is wrong with them. 0 where nothing is, else 1.

    Raises:
        RunFolderError: not a run. LedgerError: its ledger is gone, or cannot be read.
    """
    folder = find_run(run)
    # First the checkpoint, then the ledger: one that goes on meanwhile knows more than the copy, not less.
    newest = CheckpointStore(folder.checkpoints).newest()
    sums = audit(_ledger_of(folder), covered=None if newest is None else newest / LEDGER_COPY)
    Console(width=None if sys.stdout.isatty() else 110).print(_table(sums))
    for problem in sums.problems:
        print(f"WRONG: {problem}")
    print(f"{folder.path}: " + (f"{len(sums.problems)} things do not add up" if sums.problems else "it adds up"))
    return FAILED if sums.problems else 0


def _ledger_of(folder: RunFolder) -> Path:
    config = OmegaConf.load(folder.config_yaml) if folder.config_yaml.is_file() else None
    elsewhere = OmegaConf.select(config, "run.ledger") if config is not None else None
    return Path(elsewhere) / f"{folder.path.name}.sqlite" if elsewhere else folder.path / "ledger.sqlite"


def _table(sums: LedgerSums) -> Table:
    table = Table(title=f"{sums.num_groups} groups in {sums.num_issues} issues, {sums.num_lives} lives of the run")
    table.add_column("groups", justify="right")
    table.add_column("what became of them")
    rows = [
        (sums.durable, f"trained, under a checkpoint ({sums.num_steps} batches with the next line)"),
        (sums.trained, "trained since, provisionally"),
        *((count, f"dropped: {reason}") for reason, count in sums.dropped.items()),
        (sums.ready, "ready: judged, waiting to be trained on"),
        (sums.issued, "issued: to be played, playing or being judged; or left so by the end of the run"),
    ]
    for count, what in rows:
        table.add_row(str(count), what)
    table.add_section()
    table.add_row(str(sum(count for count, _ in rows)), f"of {sums.num_groups} issued")
    for reason, count in sums.reissued.items():
        table.add_row(f"+{count}", f"issues that were lost and issued again: {reason}")
    if sums.num_undone:
        table.add_row(f"{sums.num_undone}", "trainings that were undone with the weights that saw them")
    return table
