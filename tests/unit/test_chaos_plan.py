"""What `make chaos` promises to kill, without killing anybody."""

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from rlaudio.actors.reward import RewardWorker
from rlaudio.actors.rollout import RolloutWorker
from rlaudio.learner.rank_actor import RankActor
from tests.chaos.cells import NUM_SOAKS, matrix, short, soak
from tests.chaos.faults import PHASES, ROLES, Fault, Saboteur, alive
from tests.chaos.real import real


def test_every_role_is_killed_in_every_phase() -> None:
    cells = matrix()
    assert {(cell.faults[0].role, cell.faults[0].phase) for cell in cells} == {
        (role, phase) for role in ROLES for phase in PHASES
    }
    assert len({cell.name for cell in cells}) == len(cells) == 36
    assert all(len(cell.faults) == 1 and cell.faults[0].step < cell.steps for cell in cells)


def test_the_soak_has_a_hundred_faults_of_all_kinds_and_the_same_ones_again() -> None:
    cells = [soak(seed) for seed in range(NUM_SOAKS)]
    faults = [fault for cell in cells for fault in cell.faults]
    assert len(faults) >= 100 and cells == [soak(seed) for seed in range(NUM_SOAKS)]
    assert {fault.role for fault in faults} == set(ROLES)
    assert {fault.phase for fault in faults} == set(PHASES)
    assert len({cell.faults for cell in cells}) == len({cell.name for cell in cells}) == NUM_SOAKS
    for cell in cells:
        assert [fault.step for fault in cell.faults] == sorted(fault.step for fault in cell.faults)
        assert cell.faults[-1].step < cell.steps, "each comes before the end"


def test_the_short_form_kills_each_role_once() -> None:
    assert Counter(fault.role for fault in short().faults) == Counter(ROLES)


def test_the_real_parts_lose_each_role_once_in_the_middle_of_something_that_they_do() -> None:
    assert Counter(cell.role for cell in real()) == Counter(ROLES)
    assert len({cell.name for cell in [*real(), *matrix()]}) == len(ROLES) + 36
    for cell in real():
        actor, method = cell.doing.split(".")
        (kind,) = (kind for kind in (RolloutWorker, RewardWorker, RankActor) if kind.__name__ == actor)
        assert callable(getattr(kind, method)), "nobody would ever be seen at it"


def sleeper() -> "subprocess.Popen[bytes]":
    """A process that waits until its input is closed."""
    return subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)


async def test_a_fault_strikes_once_in_its_phase_and_the_next_life_goes_on_behind_it(tmp_path: Path) -> None:
    victims = [sleeper(), sleeper()]
    faults = [Fault("rollout", "learning", step=1, delay_s=0.0), Fault("reward", "publish", step=0, delay_s=0.0)]
    pids = tmp_path / "pids"
    pids.mkdir()
    (pids / f"rollout-{victims[0].pid}").touch()

    def saboteur() -> Saboteur:
        return Saboteur(faults, struck=tmp_path / "struck", pids=pids, nodes=tmp_path / "nodes.json", seed=0)

    async def ended(process: "subprocess.Popen[bytes]") -> int:
        return await asyncio.wait_for(asyncio.to_thread(process.wait), 60)

    try:
        first = saboteur()
        first.at("learning")  # too early
        first.steps_done = 1
        first.at("publish")  # another phase
        await asyncio.sleep(0.05)
        assert alive(victims[0].pid) and not (tmp_path / "struck").exists()
        first.at("learning")
        assert await ended(victims[0]) == -9 and not alive(victims[0].pid)
        (line,) = (tmp_path / "struck").read_text().splitlines()
        assert json.loads(line)["pids"] == [victims[0].pid]

        second = saboteur()
        second.at("publish")  # there is nobody of that role yet
        (pids / f"reward-{victims[1].pid}").touch()
        second.at("publish")
        assert await ended(victims[1]) == -9
        third = saboteur()
        third.steps_done = 9
        for phase in PHASES:
            third.at(phase)
        await asyncio.sleep(0.05)
        assert len((tmp_path / "struck").read_text().splitlines()) == 2, "none is left"
        assert alive(os.getpid())
    finally:
        for victim in victims:
            victim.kill()
            victim.communicate()
