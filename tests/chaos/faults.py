"""What is killed, and when: faults that strike a run's processes with kill -9 in a chosen phase of it.

A fault strikes from within the driver, so that the phase is the one that is meant and not the one after. What struck is
on disk before anybody dies: the run's next life goes on with the fault after it.
"""

import asyncio
import json
import os
import random
import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

ROLES = ("driver", "rollout", "reward", "learner", "store", "node")
"""`store` is the raylet that keeps the published weights, killed alone: its workers follow. `node` is the one with the
engines and judges: the raylet, all its processes and its directory at once."""
PHASES = ("generation", "judging", "window", "learning", "publish", "checkpoint")
_NODE_OF = {"store": "learner", "node": "pool"}
_PIDS = "CHAOS_PIDS"
LOST = "lost node "
"""Begins the line that asks for another node of that name."""


@dataclass(frozen=True, slots=True)
class Fault:
    """`delay_s` into the first phase of that name after `step` batches, as soon as there is somebody to kill."""

    role: str
    phase: str
    step: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster: the process to kill, and what goes with it."""

    raylet: int
    directory: str


def announce(role: str) -> None:
    """Called by an actor when it comes up: it can be killed from now on."""
    (Path(os.environ[_PIDS]) / f"{role}-{os.getpid()}").touch()


def announcing(folder: Path) -> dict[str, str]:
    """The variable that makes actors announce themselves in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    return {_PIDS: str(folder)}


class Saboteur:
    """Strikes one fault after another.

    Args:
        faults: of the whole run, in order.
        struck: file of those that struck already, a line each.
        pids: where this life's actors announce themselves.
        nodes: file of the cluster's nodes by name; read anew each time.
    """

    def __init__(self, faults: Sequence[Fault], *, struck: Path, pids: Path, nodes: Path, seed: int) -> None:
        self._struck, self._pids, self._nodes = struck, pids, nodes
        done = len(struck.read_text().splitlines()) if struck.exists() else 0
        self._left = list(faults[done:])
        self._rng = random.Random(f"{seed}/{done}")
        self._strikes: set[asyncio.Task[None]] = set()
        self.steps_done = 0

    def at(self, phase: str) -> None:
        """A phase begins."""
        if not self._left or self._strikes or self._left[0].phase != phase or self.steps_done < self._left[0].step:
            return
        if not self._victims(self._left[0].role):
            return
        strike = asyncio.create_task(self._strike(self._left[0]))
        self._strikes.add(strike)
        strike.add_done_callback(self._strikes.discard)

    async def _strike(self, fault: Fault) -> None:
        await asyncio.sleep(fault.delay_s)
        victims = self._victims(fault.role)
        if not victims:  # it died by itself, of the fault before
            return
        self._left.pop(0)
        with self._struck.open("a") as log:
            log.write(json.dumps(asdict(fault) | {"at_step": self.steps_done, "pids": victims}) + "\n")
            log.flush()
            os.fsync(log.fileno())
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        if fault.role in _NODE_OF:
            name = _NODE_OF[fault.role]
            shutil.rmtree(self._node(name).directory, ignore_errors=True)
            print(f"{LOST}{name}", flush=True)

    def _victims(self, role: str) -> list[int]:
        if role == "driver":
            return [os.getpid()]
        if role in _NODE_OF:
            raylet = self._node(_NODE_OF[role]).raylet
            if not alive(raylet):
                return []
            return [raylet, *(family(raylet) if role == "node" else [])]
        pids = [int(path.name.split("-")[1]) for path in self._pids.glob(f"{role}-*")]
        living = sorted(pid for pid in pids if alive(pid))
        return [self._rng.choice(living)] if living else []

    def _node(self, name: str) -> Node:
        return Node(**json.loads(self._nodes.read_text())[name])


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def family(pid: int) -> list[int]:
    """Everybody that a process has started."""
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True) if alive(child.pid)]
    except psutil.NoSuchProcess:
        return []
