"""`rlaudio scale` and what answers it: what may be asked for, what is said of it, where a run is found."""

import asyncio
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaudio.actors.supervisor import PoolSize
from rlaudio.cli import main as command
from rlaudio.cli.scale import describe, read_sizes
from rlaudio.config import AutoscaleSettings, RunConfig
from rlaudio.config_checks import run_problems
from rlaudio.errors import ConfigError, ResourceError
from rlaudio.recipes.control import Answer, Command, Desk
from rlaudio.recipes.scaling import Scaling
from rlaudio.runs import create_run


class Asked:
    """A supervisor of so many that writes down what it was asked for."""

    def __init__(self, serving: int, *, coming: int = 0) -> None:
        self.size = PoolSize(wanted=serving + coming, serving=serving, coming=coming, leaving=0, given_up=0)
        self.asked: list[int] = []

    def resize(self, size: int) -> None:
        self.asked.append(size)


def scaling(free: Mapping[str, float], *, new_nodes: bool = False) -> tuple[Scaling, Asked, Asked]:
    rollout, reward = Asked(2, coming=1), Asked(4)
    supervisors: Any = {"rollout": rollout, "reward": reward}
    needs = {"rollout": (2.0, 1.0), "reward": (1.0, 0.0)}
    return Scaling(supervisors, needs, new_nodes=new_nodes, free=lambda: free), rollout, reward


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["rolout=4"], "'rolout' is no pool of a run: did you mean rollout"),
        (["learner=2"], "there are rollout and reward"),
        (["rollout=0"], "'0' is no number of actors, set 1 or more"),
        (["rollout=-3"], "'-3' is no number"),
        (["rollout=two"], "'two' is no number"),
        (["rollout=²"], "is no number"),
        (["rollout"], "'' is no number"),
        (["reward=1", "reward=2"], "reward is asked for twice"),
    ],
)
def test_what_is_no_size_is_named(given: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_sizes(given)


def test_sizes_are_read() -> None:
    assert read_sizes(["rollout=4", "reward=12"]) == {"rollout": 4, "reward": 12}
    assert read_sizes([]) == {}


def test_a_size_that_there_is_no_room_for_is_refused_with_what_is_missing_and_nothing_is_asked_for() -> None:
    asks, rollout, reward = scaling({"CPU": 3.0, "GPU": 8.0})
    with pytest.raises(ResourceError, match=r"rollout=5 \(2 each\): 1 CPUs are missing, the cluster has 3 free"):
        asks.ask({"rollout": 5})  # 3 are there or on their way
    with pytest.raises(ResourceError, match="2 GPUs are missing"):
        scaling({"CPU": 99.0})[0].ask({"rollout": 5, "reward": 1})
    assert not rollout.asked and not reward.asked


def test_room_that_one_pool_gives_up_is_the_others() -> None:
    asks, rollout, reward = scaling({"CPU": 0.0, "GPU": 2.0})
    asks.ask({"rollout": 4, "reward": 2})
    assert (rollout.asked, reward.asked) == ([4], [2])


def test_shrinking_needs_no_room_and_an_autoscaling_cluster_finds_it() -> None:
    asks, rollout, _ = scaling({})
    asks.ask({"rollout": 1})
    assert rollout.asked == [1]
    asks, rollout, _ = scaling({}, new_nodes=True)
    asks.ask({"rollout": 64})
    assert rollout.asked == [64]


@pytest.mark.parametrize("wanted", [{"rollout": 3, "reward": 0}, {"rollout": 3, "judges": 1}])
def test_all_sizes_are_asked_for_or_none(wanted: dict[str, int]) -> None:
    asks, rollout, reward = scaling({"CPU": 99.0, "GPU": 99.0})
    with pytest.raises(ConfigError, match="pools rollout, reward of 1 actor or more"):
        asks.ask(wanted)
    assert not rollout.asked and not reward.asked


def test_a_pool_is_described_in_a_line() -> None:
    assert describe("rollout", PoolSize(4, 4, 0, 0, 0)) == "rollout: 4 of 4 work"
    busy = PoolSize(wanted=4, serving=2, coming=1, leaving=2, given_up=1, problem="rollout-3: out of memory")
    assert describe("rollout", busy) == (
        "rollout: 2 of 4 work, 1 coming, 2 leaving, 1 given up (last problem: rollout-3: out of memory)"
    )


# ---- the desk -----------------------------------------------------------------------------------------------------


async def test_answers_go_to_whoever_asked_whatever_order_they_come_in() -> None:
    desk = Desk()
    asking = [asyncio.create_task(desk.ask(Command({"rollout": size}))) for size in (1, 2, 3)]
    fetched = [await desk.fetch(None, wait_s=5) for _ in asking]
    for number, asked in [one for one in reversed(fetched) if one is not None]:
        assert await desk.fetch((number, Answer({}, refused=str(asked.sizes["rollout"]))), wait_s=0) is None
    assert [answer.refused for answer in await asyncio.gather(*asking)] == ["1", "2", "3"]


async def test_whoever_has_given_up_is_not_answered_and_costs_nothing() -> None:
    desk = Desk()
    asking = asyncio.create_task(desk.ask(Command()))
    fetched = await desk.fetch(None, wait_s=5)
    assert fetched is not None
    asking.cancel()
    await asyncio.wait([asking])
    assert await desk.fetch((fetched[0], Answer({})), wait_s=0) is None


# ---- where a run is found -----------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command.main(["scale", *arguments]) == 2
    return capsys.readouterr().err


def test_an_unknown_run_and_one_that_ended_are_told_without_ray(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "is not a run folder" in said(capsys, str(tmp_path / "nothing"), "rollout=2")
    with create_run(tmp_path, name="live", seed=0) as folder:
        assert "still starting" in said(capsys, str(folder.path), "rollout=2")
    assert "is not alive: no process runs it" in said(capsys, str(folder.path), "rollout=2")
    assert "--resume" in said(capsys, str(folder.path), "rollout=2")


def test_asking_whether_a_run_is_alive_does_not_keep_it_from_starting(tmp_path: Path) -> None:
    with create_run(tmp_path, name="live", seed=0) as folder:
        pass
    command.main(["scale", str(folder.path)])
    with open(folder.path / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_run_of_another_machine_is_not_called_dead_by_its_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with create_run(tmp_path, name="live", seed=0) as folder:
        pass
    (folder.path / "lock").write_text(f"process {os.getpid()} on another-machine\n")
    assert "still starting" in said(capsys, str(folder.path), "rollout=2")


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ([4], r"autoscale.rollout is \[4\]: set the least and the most actors"),
        ([0, 4], r"autoscale.rollout is \[0, 4\]"),
        ([5, 4], r"autoscale.rollout is \[5, 4\]"),
        ([2, 4], r"rollout.actors is 1 and autoscale.rollout \[2, 4\]: begin with a number between"),
    ],
)
def test_limits_at_odds_are_refused(limits: list[int], says: str) -> None:
    import re

    config = RunConfig(autoscale=AutoscaleSettings(rollout=limits))
    assert any(re.search(says, problem) for problem in run_problems(config))
    config.autoscale.rollout = [1, 16]
    assert not any("autoscale" in problem for problem in run_problems(config))


def test_the_command_line_hands_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlaudio.cli import scale

    seen = SimpleNamespace()

    def scale_command(run: str, settings: list[str], **options: Any) -> int:
        seen.run, seen.settings, seen.options = run, settings, options
        return 3

    monkeypatch.setattr(scale, "scale_command", scale_command)
    assert command.main(["scale", "runs/a", "rollout=4", "--no-wait", "reward=2"]) == 3
    assert (seen.run, seen.settings) == ("runs/a", ["rollout=4", "reward=2"])
    assert seen.options == {"wait": False, "deadline_s": 600.0}
