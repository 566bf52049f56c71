"""Kills with the real parts: `rlaudio train` as a user types it, with vLLM and DeepSpeed, one role killed once.

Nobody in the run knows of the fault. Who does what is read from the titles that Ray gives its processes
(`ray::RankActor.forward_backward`), so each one is killed in the middle of its own work. What the weights have seen is
found without the ledger: `rlaudio replay` gives what the ledger calls trained, each group once, to a learner that
starts anew, and its weights must be those of the run.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from rlaudio.experience.audit import LedgerSums
from tests.chaos.cells import ROOT, ChaosError, Outcome, audited, outcome_of, tail_of
from tests.chaos.faults import Node, family
from tests.chaos.nodes import Nodes

QUICKSTART = ROOT / "examples" / "quickstart"
STEPS, EVERY, PER_STEP = 6, 2, 2
LIFE_DEADLINE_S, PATIENCE_S = 3000.0, 1200.0
"""Of a process, and of every wait in it: far above what they take; one that nobody ends is a failure."""
LOOK_S, FAR_LOOK_S = 0.001, 0.2
"""Between two looks at what the processes do: when one is about to be killed, and before."""
FAR_OFF = 0.01
"""Of the way from the first weights to the last. Two steps more or less were half of it when it was first measured, and
sounds that were encoded in other company 7.5e-6; encoded alone, as on a CPU, they make no difference."""


@dataclass(frozen=True, slots=True)
class RealCell:
    """Who is killed, as soon as a process of the run is seen at `doing` behind the step after the first checkpoint.

    Attributes:
        role: as in `faults.ROLES`.
        doing: an actor's class and method.
        judged: a served model judges too: a second vLLM, which takes its time to start.
    """

    role: str
    doing: str
    judged: bool = False

    @property
    def name(self) -> str:
        return f"real-{self.role}"


def real() -> list[RealCell]:
    """One cell per role."""
    return [
        RealCell("rollout", "RolloutWorker.play"),
        RealCell("reward", "RewardWorker.judge", judged=True),
        RealCell("learner", "RankActor.forward_backward"),
        RealCell("driver", "RankActor.save"),
        RealCell("store", "RolloutWorker.sync"),
        RealCell("node", "RewardWorker.judge", judged=True),
    ]


def run_real(cell: RealCell, nodes: Nodes, *, folder: Path) -> Outcome:
    """Run it to its end in an empty folder; the world is made beside it, where it is not yet.

    Raises:
        ChaosError: with the end of the driver's output.
    """
    began_s = time.monotonic()
    folder.mkdir(parents=True)
    config = _configured(cell, world=_world(folder.parent / "world"), folder=folder)
    log, killer = folder / "driver.log", Killer(cell, nodes, folder=folder)
    code, lives, resume = _live(["train", str(config)], nodes, log=log, killer=killer), 1, list[str]()
    run = killer.run
    if run is None or not killer.struck:
        raise ChaosError(f"{cell.name}: it ended with {code} before anybody was seen at {cell.doing}\n{tail_of(log)}")
    audited(run, log=folder / "audits.log")
    if cell.role == "driver":
        if code != -SIGKILL:
            raise ChaosError(f"{cell.name}: the driver was killed and ended with {code}\n{tail_of(log)}")
        resume = ["train", str(run / "config.yaml"), "--resume", str(run)]
        code, lives = _live(resume, nodes, log=log, killer=None), 2
    if code:
        raise ChaosError(f"{cell.name}: life {lives} ended with {code}\n{tail_of(log)}")
    sums = audited(run, log=folder / "audits.log")
    _require_whole(cell, run, sums)
    off = _far_from_replay(run, nodes, log=folder / "replay.log", root=folder / "replayed")
    print(f"{cell.name}: killed {killer.struck}; {off:.2g} of the way off what a replay makes of it", flush=True)
    if off > FAR_OFF:
        raise ChaosError(
            f"{cell.name}: the weights have not seen what the ledger says: they are {off:.3g} of the way off"
        )
    return outcome_of(cell.name, sums, faults=1, lives=lives, began_s=began_s)


class Killer:
    """Looks at a run from outside, and strikes once.

    Attributes:
        run: its folder, once there is one.
        struck: what was killed at what step; empty before.
    """

    def __init__(self, cell: RealCell, nodes: Nodes, *, folder: Path) -> None:
        self._cell, self._nodes, self._folder = cell, nodes, folder
        self.run: Path | None = None
        self.struck = ""

    def look(self, driver: int) -> float:
        """Strike if it is time. Seconds until the next look."""
        if self.run is None:
            self.run = next(iter(self._folder.glob("real-*")), None)
        if self.struck or self.run is None or (step := steps_done(self.run)) <= EVERY:
            return FAR_LOOK_S
        actors = {name: self._nodes.node(name) for name in ("pool", "learner")}
        watched = [pid for node in actors.values() for pid in family(node.raylet)]
        at_it = self._first_at_it(watched)
        if at_it:
            self._strike(at_it, actors, driver=driver, step=step)
        return 0.0

    def _first_at_it(self, watched: list[int]) -> int:
        """The first process that is seen at it within a moment; 0: none."""
        class_title = f"ray::{self._cell.doing.split('.')[0]}"
        mine = [pid for pid in watched if title(pid).startswith(class_title)]
        until_s = time.monotonic() + FAR_LOOK_S
        while mine and time.monotonic() < until_s:
            for pid in mine:
                if title(pid) == f"ray::{self._cell.doing}":
                    return pid
            time.sleep(LOOK_S)
        return 0

    def _strike(self, at_it: int, actors: Mapping[str, Node], *, driver: int, step: int) -> None:
        lost = {"store": "learner", "node": "pool"}.get(self._cell.role, "")
        victims = [at_it] if not lost else [actors[lost].raylet]
        if self._cell.role == "driver":
            victims = [driver]
        if self._cell.role == "node":
            victims += family(actors[lost].raylet)
        for pid in victims:
            os.kill(pid, SIGKILL)
        self.struck = f"{self._cell.role} ({len(victims)} processes) at step {step} during {self._cell.doing}"
        if lost:
            shutil.rmtree(actors[lost].directory, ignore_errors=True)
            self._nodes.replace(lost)


def title(pid: int) -> str:
    """What Ray says that a process does; nothing of one that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def steps_done(run: Path) -> int:
    """As the ledger says, of a run that goes on."""
    ledger = run / "ledger.sqlite"
    if not ledger.is_file():
        return 0
    try:
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as connection:
            (last,) = connection.execute("SELECT coalesce(max(step), -1) FROM batches").fetchone()
            return int(last) + 1
    except sqlite3.OperationalError:  # it is being made
        return 0


def _live(arguments: list[str], nodes: Nodes, *, log: Path, killer: Killer | None) -> int:
    """One process of `rlaudio`, in the cluster; its exit code."""
    with log.open("a") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlaudio.cli.main", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_ADDRESS": nodes.address},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        until_s = time.monotonic() + LIFE_DEADLINE_S
        try:
            while process.poll() is None:
                if time.monotonic() > until_s:
                    raise ChaosError(f"it did not end within {LIFE_DEADLINE_S:g} s: {arguments}\n{tail_of(log)}")
                time.sleep(killer.look(process.pid) if killer else FAR_LOOK_S)
            return process.returncode
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(60)


def _world(folder: Path) -> Path:
    """The quickstart's world, a few dialogues of it."""
    if not folder.is_dir():
        made = [sys.executable, "-m", "spoken_world.make", "--out", str(folder), "--train", "24"]
        counts = ["--heldout", "6", "--heldout-voices", "6"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([*made, *counts], cwd=QUICKSTART, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder


def _configured(cell: RealCell, *, world: Path, folder: Path) -> Path:
    """The quickstart's configuration, made small, with places for its actors that tell the nodes apart."""
    config: dict[str, Any] = yaml.safe_load((QUICKSTART / "config.yaml").read_text())
    config["run"] = {"name": "real", "root": str(folder), "steps": STEPS, "checkpoint_every": EVERY}
    config["run"] |= {"shared_root": True, "keep_spool": True}
    config["model"]["path"] = str(QUICKSTART / config["model"]["path"])
    config["data"] = {"train": str(world / "train.jsonl"), "clips": str(world)}
    config["algorithm"] |= {"group_size": 4, "groups_per_step": PER_STEP}
    # Of four and one CPU: ranks fit on one node alone, and fill it; engine and judge fill the other.
    config["learner"] |= {"ranks": 2, "num_cpus": 2.0, "start_deadline_s": PATIENCE_S, "step_deadline_s": PATIENCE_S}
    for role in ("rollout", "rewards"):
        config[role] |= {"num_cpus": 0.5, "start_deadline_s": PATIENCE_S, "group_deadline_s": PATIENCE_S}
    config["sync"] = {"deadline_s": PATIENCE_S}
    judge = config["rewards"]["judge_model"]
    judge["path"] = str(QUICKSTART / judge["path"])
    if not cell.judged:
        del config["rewards"]["judge_model"], config["rewards"]["sources"][1:]
    del config["evaluation"]
    config["doctor"], config["tracking"] = {"before_train": False}, {"mlflow": False}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _require_whole(cell: RealCell, run: Path, sums: LedgerSums) -> None:
    """All steps are there, under a checkpoint, and every group has an end or a reason."""
    newest = run / f"checkpoints/step-{STEPS:06d}"
    number = json.loads((newest / "driver.json").read_text())["number"] if newest.is_dir() else -1
    problems = {
        f"the last checkpoint is of {number} optimizer steps": number != STEPS,
        f"{sums.durable} groups are trained": sums.durable != STEPS * PER_STEP,
        f"{sums.trained} groups are not under a checkpoint, {sums.num_steps} steps stand": sums.trained
        or sums.num_steps != STEPS,
        "groups are lost without a reason": sums.durable + sums.ready + sums.issued + sum(sums.dropped.values())
        != sums.num_groups,
        "its ranks are lost and nothing went back": cell.role in ("learner", "store", "driver") and sums.num_lives < 2,
    }
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ChaosError(f"{cell.name}: " + "; ".join(found))


def _far_from_replay(run: Path, nodes: Nodes, *, log: Path, root: Path) -> float:
    """How far the run's weights are from those of a replay, in parts of the way that they went."""
    root.mkdir()
    if code := _live(["replay", str(run), f"run.root={root}"], nodes, log=log, killer=None):
        raise ChaosError(f"`rlaudio replay` of {run} ended with {code}\n{tail_of(log)}")
    (replayed,) = root.glob("*/model")
    policy = QUICKSTART / "checkpoints" / "policy"
    start, ours, theirs = (load_file(folder / "model.safetensors") for folder in (policy, run / "model", replayed))

    def distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        return float(np.sqrt(sum(np.square(one[name] - other[name], dtype=np.float64).sum() for name in one)))

    return distance(ours, theirs) / distance(ours, start)
