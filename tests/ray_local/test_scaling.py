"""Pools of real processes that grow, shrink and lose members while a run goes on: no restart, no lost group."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from rlaudio.config import AlgorithmSettings, RunConfig
from rlaudio.errors import EngineError
from rlaudio.recipes.control import DESK, Command
from rlaudio.runs import create_run
from tests.conftest import ROOT
from tests.fake_workers import LiveRun

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]

PER_STEP, STALENESS = 3, 1


def config(**sections: dict[str, Any]) -> RunConfig:
    made = RunConfig(algorithm=AlgorithmSettings(groups_per_step=PER_STEP, max_staleness=STALENESS))
    made.supervision.first_pause_s = 0.1
    for section, values in sections.items():
        for name, value in values.items():
            setattr(getattr(made, section), name, value)
    return made


def require_whole(run: LiveRun) -> None:
    """Nothing was restarted, lost, trained twice or too old."""
    groups = [group for group, _ in run.trained]
    assert len(set(groups)) == len(groups) and not run.drops
    assert run.num_open() <= (STALENESS + 1) * PER_STEP, "open groups hold slots"
    assert max(run.ages) <= STALENESS
    assert not [line for line in run.told if "left out" in line or "given up" in line]


async def command(run: str | Path, *arguments: str) -> str:
    """What `rlaudio scale` prints, in a process of its own that has joined this Ray."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "rlaudio.cli.main", "scale", str(run), *arguments, cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_one_three_one_rollout_actors_by_command(tmp_path: Path) -> None:
    with create_run(tmp_path, name="live", seed=0) as folder:
        run = LiveRun(config(), folder.path)
        async with run.running():
            before = await run.until_trained(9)
            first = len(run.trained)
            said = await command(folder.path, "rollout=3")
            assert "asked for rollout=3" in said and "rollout: 3 of 3 work" in said
            three = len(run.trained)
            during = await run.until_trained(30)
            assert "rollout: 1 of 1 work" in await command(folder.path, "rollout=1")
            one = len(run.trained)
            after = await run.until_trained(12)
            assert "rollout: 1 of 1 work" in await command(folder.path.name), "by its name, and only shown"
    require_whole(run)
    assert [len({actor for _, actor in part}) for part in (before, during)] == [1, 3]
    assert len({actor for _, actor in after[-6:]}) == 1
    rates = [run.groups_per_s(*part) for part in ((0, first - 1), (three, three + 29), (one + 3, one + 11))]
    print("groups/s with 1, 3, 1 rollout actors: " + ", ".join(f"{rate:.1f}" for rate in rates))


async def test_one_three_one_rollout_actors_by_the_queue(tmp_path: Path) -> None:
    run = LiveRun(config(autoscale={"rollout": [1, 3], "look_s": 0.5, "cooldown_s": 1.0}), tmp_path)
    async with run.running() as scaling:
        size = scaling.supervisors["rollout"]
        before = len(await run.until_trained(6))
        await run.until(lambda: size.size.serving == 3)  # the learner has nothing to do: it waits for groups
        three = len(run.trained)
        await run.until_trained(18)
        run.learner_s = 2.0  # now the window fills
        slow = len(run.trained)
        await run.until(lambda: size.size.wanted == 1 and size.size.settled)
    require_whole(run)
    asked = [line for line in run.told if line.startswith("autoscale: rollout=")]
    assert [line.split(",")[0][-1] for line in asked] == ["2", "3", "2", "1"]
    rates = [run.groups_per_s(*part) for part in ((0, before - 1), (three, three + 17), (slow, len(run.trained) - 1))]
    print("groups/s with 1, 3, then a slow learner: " + ", ".join(f"{rate:.1f}" for rate in rates))


async def test_actors_that_are_killed_come_back_even_the_only_one(tmp_path: Path) -> None:
    run = LiveRun(config(rollout={"attempts": 3}), tmp_path)
    async with run.running() as scaling:
        await run.until_trained(6)
        for pools, name in ((run.rollouts, "rollout"), (run.rewards, "reward")):
            (handle,) = pools.pool.handles.values()
            os.kill(await handle.pid.remote(), signal.SIGKILL)
            await run.until(lambda name=name: any(f"{name}-0.2 has joined" in line for line in run.told))
            assert scaling.sizes()[name].serving == 1
            await run.until_trained(9)
    assert max(run.ages) <= STALENESS and not run.drops
    assert len({actor for _, actor in run.trained}) == 2


async def test_two_runs_of_one_name_share_a_cluster(tmp_path: Path) -> None:
    """Each has its own desk and its own actors; a command reaches the one it was meant for."""
    folders = [tmp_path / where / "same-name" for where in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
    one, two = (LiveRun(config(), folder) for folder in folders)
    async with one.running() as scaling_one, two.running() as scaling_two:
        await asyncio.gather(one.until_trained(6), two.until_trained(6))
        spaces = [json.loads((run.folder / "control.json").read_text())["namespace"] for run in (one, two)]
        assert spaces[0] != spaces[1]
        desk = ray.get_actor(DESK, namespace=spaces[0])
        answer = await desk.ask.remote(Command({"reward": 2}))
        assert not answer.refused and answer.sizes["reward"].wanted == 2
        await one.until(lambda: scaling_one.sizes()["reward"].serving == 2)
        assert scaling_two.sizes()["reward"].wanted == 1
        answer = await desk.ask.remote(Command({"reward": 0}))
        assert "1 actor or more" in answer.refused and answer.sizes["reward"].wanted == 2
        await asyncio.gather(one.until_trained(6), two.until_trained(6))
    require_whole(one)
    require_whole(two)


async def test_a_run_whose_only_place_is_given_up_ends_with_its_last_error(tmp_path: Path) -> None:
    run = LiveRun(config(supervision={"max_restarts": 0}), tmp_path)

    async def lose_the_only_one() -> None:
        async with run.running():
            await run.until_trained(3)
            (handle,) = run.rollouts.pool.handles.values()
            ray.kill(handle)
            await run.until(lambda: False)

    with pytest.raises(ExceptionGroup) as caught:
        await lose_the_only_one()
    assert caught.value.subgroup(EngineError) is not None
    assert any(line.startswith("rollout-0 is given up after 1 losses") for line in run.told)
