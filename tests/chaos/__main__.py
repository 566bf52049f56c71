"""`make chaos`: every role killed in every phase, then a random soak. Cells that passed are kept and not made again."""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path

from tests.chaos.cells import NUM_SOAKS, ROOT, Cell, ChaosError, Outcome, matrix, run_cell, short, soak
from tests.chaos.nodes import cluster_of_nodes
from tests.chaos.real import RealCell, real, run_real

KEPT = ROOT / "runs" / "chaos"
BUDGET_S = 33 * 60.0
"""Cells that would begin after it are named as not run; the next `make chaos` goes on with them."""

SECTION, REAL_SECTION = "Any plug pulled (`make chaos`)", "Any plug pulled, with vLLM and DeepSpeed (`make chaos`)"
ABOUT = (
    "kill -9 of a role in a phase, on a cluster of a head and two nodes on one machine. Real Ray, pools, "
    "judge, ledger, spool, transport, checkpoints; fake engines, ranks without a model. In every row "
    "`rlaudio audit` added up after each life of the driver, and the weights have seen each group that the ledger "
    "calls trained exactly once."
)
REAL_ABOUT = (
    "One kill -9 per role in `rlaudio train` itself, on a head and two nodes on one machine: the quickstart's policy, "
    "sounds and rewards at 6 steps, vLLM in the engine's process, two DeepSpeed ranks. In every row `rlaudio audit` "
    "added up, and `rlaudio replay` of what the ledger calls trained made the run's weights again."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cell", default="", help="only cells whose name has this in it")
    parser.add_argument("--short", action="store_true", help="one run with a fault per role, and nothing is kept")
    arguments = parser.parse_args()
    cells: list[Cell | RealCell] = (
        [short()]
        if arguments.short
        else [cell for cell in [*matrix(), *real(), *map(soak, range(NUM_SOAKS))] if arguments.cell in cell.name]
    )
    todo = [cell for cell in cells if arguments.short or not _kept(cell).is_file()]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} passed before and are kept in {KEPT}", flush=True)
    failed = _run(todo, keep=not arguments.short) if todo else []
    for line in failed:
        print(line, file=sys.stderr)
    print(f"{len(cells) - len(failed)} of {len(cells)} cells passed", flush=True)
    return 1 if failed else 0


def _run(cells: list[Cell | RealCell], *, keep: bool) -> list[str]:
    """Run them in one cluster; a line for each that failed or did not run."""
    failed, began_s = [], time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        with cluster_of_nodes(work / "nodes") as nodes:
            for cell in cells:
                if time.monotonic() - began_s > BUDGET_S:
                    failed.append(f"NOT RUN: {cell.name}, after {BUDGET_S / 60:.0f} minutes")
                    continue
                folder = work / cell.name
                try:
                    if isinstance(cell, RealCell):
                        outcome = run_real(cell, nodes, folder=folder)
                    else:
                        outcome = run_cell(cell, nodes, folder=folder)
                except ChaosError as error:
                    failed.append(f"FAILED: {error}")
                    print(f"{cell.name} FAILED", flush=True)
                    _put_aside(folder, KEPT / f"failed-{cell.name}")
                    continue
                print(_line(outcome), flush=True)
                if keep:
                    _keep(cell, outcome)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return failed


def _line(one: Outcome) -> str:
    return (
        f"{one.cell}: {one.faults} faults, {one.lives} drivers, {one.incarnations} incarnations, {one.groups} groups: "
        f"{one.trained} trained, {sum(one.dropped.values())} dropped, {sum(one.reissued.values())} reissued, "
        f"{one.undone} undone; {one.audits} audits add up; {one.wall_s:.0f} s"
    )


def _kept(cell: Cell | RealCell) -> Path:
    return KEPT / f"{cell.name}.json"


def _keep(cell: Cell | RealCell, outcome: Outcome) -> None:
    from tests.soak.learning import add_row

    KEPT.mkdir(parents=True, exist_ok=True)
    _kept(cell).write_text(json.dumps(asdict(outcome), indent=1))
    columns = ["date", "cell", "faults", "drivers", "incarnations", "groups", "trained", "dropped", "reissued"]
    add_row(
        ROOT / "bench" / "RESULTS.md",
        section=REAL_SECTION if isinstance(cell, RealCell) else SECTION,
        about=REAL_ABOUT if isinstance(cell, RealCell) else ABOUT,
        columns=[*columns, "undone", "audits", "s"],
        row=[
            f"{date.today().isoformat()}, {os.cpu_count()} cores",
            outcome.cell,
            outcome.faults,
            outcome.lives,
            outcome.incarnations,
            outcome.groups,
            outcome.trained,
            _counts(outcome.dropped),
            _counts(outcome.reissued),
            outcome.undone,
            outcome.audits,
            f"{outcome.wall_s:.0f}",
        ],
    )


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "0"


def _put_aside(folder: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("spool"))


if __name__ == "__main__":
    sys.exit(main())
