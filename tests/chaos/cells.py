"""A cell of `make chaos`: one run, its faults, as many lives as it takes, an audit after each; what is kept of it."""

import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGKILL

from rlaudio.cli.audit import audit_command
from rlaudio.experience.audit import LedgerSums, audit
from tests.chaos.faults import LOST, PHASES, ROLES, Fault
from tests.chaos.nodes import Nodes
from tests.chaos.world import DONE, PER_STEP, Life

ROOT = Path(__file__).resolve().parents[2]
LIFE_DEADLINE_S = 400.0
SOAK_LIFE_DEADLINE_S = 1500.0
DELAY_S = 0.03
"""Faults strike within so long of their phase's beginning; every phase takes longer."""
SOAK_SHARES = {"driver": 2, "rollout": 4, "reward": 3, "learner": 3, "store": 1, "node": 1}
NUM_SOAKS, FAULTS_PER_SOAK = 5, 21
"""In runs of their own, so that a soak that was cut off goes on behind the last whole one."""


class ChaosError(Exception):
    """A run did not end, or something does not add up."""


@dataclass(frozen=True, slots=True)
class Cell:
    name: str
    steps: int
    seed: int
    faults: tuple[Fault, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is kept of a cell that passed.

    Attributes:
        lives: of the driver's process.
        incarnations: of the run: one more each time that weights went back to a checkpoint.
        reissued: issues by reason.
        wall_s: with the nodes that were added meanwhile.
    """

    cell: str
    faults: int
    lives: int
    incarnations: int
    groups: int
    trained: int
    undone: int
    dropped: dict[str, int]
    reissued: dict[str, int]
    audits: int
    wall_s: float


def matrix() -> list[Cell]:
    """One cell per role and phase."""
    return [
        single(role, phase, seed=1000 + index)
        for index, (role, phase) in enumerate((role, phase) for phase in PHASES for role in ROLES)
    ]


def single(role: str, phase: str, *, seed: int) -> Cell:
    """One fault behind the first checkpoint, somewhere between two."""
    rng = random.Random(seed)
    return Cell(
        f"{role}-{phase}", 7, seed, (Fault(role, phase, step=rng.choice([2, 3]), delay_s=rng.uniform(0.0, DELAY_S)),)
    )


def short() -> Cell:
    """One fault per role, at the phase that matters most to it, in one run."""
    plan = [
        ("rollout", "generation"),
        ("learner", "learning"),
        ("reward", "judging"),
        ("driver", "checkpoint"),
        ("store", "publish"),
        ("node", "window"),
    ]
    faults = tuple(Fault(role, phase, step=2 + 2 * index, delay_s=0.01) for index, (role, phase) in enumerate(plan))
    return Cell("short", 16, 7, faults)


def soak(seed: int) -> Cell:
    """Seeded faults of every kind, the first one before the run has a checkpoint."""
    rng = random.Random(f"soak/{seed}")
    roles = rng.choices(list(SOAK_SHARES), weights=list(SOAK_SHARES.values()), k=FAULTS_PER_SOAK)
    faults = tuple(
        Fault(role, rng.choice(PHASES), step=index, delay_s=rng.uniform(0.0, DELAY_S))
        for index, role in enumerate(roles)
    )
    return Cell(f"soak-{seed}", FAULTS_PER_SOAK + 10, seed, faults)


def run_cell(cell: Cell, nodes: Nodes, *, folder: Path) -> Outcome:
    """Run it to its end in an empty folder.

    Raises:
        ChaosError: with the end of the driver's output.
    """
    folder.mkdir(parents=True)
    began_s = time.monotonic()
    run, lives = "", 0
    while True:
        life = Life(nodes.address, str(folder), run, str(nodes.file), cell.steps, cell.seed, list(cell.faults))
        code, said = _live(life, nodes, log=folder / "driver.log")
        lives += 1
        runs = list(folder.glob("chaos-*"))
        run = str(runs[0]) if runs else ""
        struck = [json.loads(line) for line in life.struck.read_text().splitlines()] if life.struck.exists() else []
        killed = Counter(fault["role"] for fault in struck)["driver"]
        if run:
            audited(Path(run), log=folder / "audits.log")
        if code == 0 and said:
            break
        if code != -SIGKILL or killed != lives:
            tail = tail_of(folder / "driver.log")
            raise ChaosError(f"{cell.name}: life {lives} ended with {code}, {killed} drivers were killed\n{tail}")
    if len(struck) != len(cell.faults):
        raise ChaosError(f"{cell.name}: {len(struck)} of {len(cell.faults)} faults struck before the run ended")
    sums = audited(Path(run), log=folder / "audits.log")
    _require_whole(cell, Path(run), sums)
    return outcome_of(cell.name, sums, faults=len(struck), lives=lives, began_s=began_s)


def _live(life: Life, nodes: Nodes, *, log: Path) -> tuple[int, bool]:
    """One life of the driver; its exit code, and whether it said that the run is at its end."""
    told = Path(life.root) / "life.json"
    told.write_text(json.dumps(asdict(life)))
    deadline_s = SOAK_LIFE_DEADLINE_S if len(life.faults) > len(ROLES) else LIFE_DEADLINE_S
    said = False
    with log.open("a") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.world", str(told)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        late = threading.Timer(deadline_s, process.terminate)
        late.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                said = said or line.strip() == DONE
                if line.startswith(LOST):
                    nodes.replace(line.removeprefix(LOST).strip())
            process.stdout.close()
            return process.wait(60), said
        finally:
            late.cancel()
            if process.poll() is None:
                process.kill()


def tail_of(log: Path) -> str:
    """Its last lines."""
    return "\n".join(log.read_text().splitlines()[-25:])


def outcome_of(name: str, sums: LedgerSums, *, faults: int, lives: int, began_s: float) -> Outcome:
    """What is kept of a cell that ended well; it was audited after every life and at its end."""
    return Outcome(
        cell=name,
        faults=faults,
        lives=lives,
        incarnations=sums.num_lives,
        groups=sums.num_groups,
        trained=sums.durable,
        undone=sums.num_undone,
        dropped=sums.dropped,
        reissued=sums.reissued,
        audits=lives + 1,
        wall_s=round(time.monotonic() - began_s, 1),
    )


def audited(run: Path, *, log: Path) -> LedgerSums:
    """`rlaudio audit RUN` must find nothing, and so must the same sums here."""
    out = io.StringIO()
    with redirect_stdout(out):
        code = audit_command(str(run))
    with log.open("a") as file:
        file.write(out.getvalue())
    if code:
        raise ChaosError(f"`rlaudio audit` of {run} ended with {code}:\n{out.getvalue()}")
    return audit(run / "ledger.sqlite")


def _require_whole(cell: Cell, run: Path, sums: LedgerSums) -> None:
    """The weights have seen what the ledger says, each group once; every other one has an end or a reason."""
    seen = [json.loads((run / "model" / f"seen-{rank}.json").read_text()) for rank in range(2)]
    saved = json.loads((run / f"checkpoints/step-{cell.steps:06d}/seen-0.json").read_text())
    groups = [group for batch in seen[0] for group in batch]
    problems = {
        "the ranks have seen different batches": seen[0] != seen[1],
        "the last checkpoint is not of the weights that were exported": seen[0] != saved,
        f"groups were trained twice: {[g for g, n in Counter(groups).items() if n > 1]}": len(groups)
        != len(set(groups)),
        f"{len(groups)} groups are in the weights, the ledger says {sums.durable}": not (
            len(groups) == sums.durable == cell.steps * PER_STEP
        ),
        f"{sums.trained} groups are not under a checkpoint, {sums.num_steps} steps stand": sums.trained
        or sums.num_steps != cell.steps,
        "groups are lost without a reason": sums.durable + sums.ready + sums.issued + sum(sums.dropped.values())
        != sums.num_groups,
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ChaosError(f"{cell.name}: " + "; ".join(found))
