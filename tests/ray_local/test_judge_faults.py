"""Real reward actors with the quickstart's judge on vLLM, in the real loop: killed, hung, talking garbage, all dead.

And two runs whose replies change in earnest: one that becomes right and cold, which the trap monitor must tell of
wherever a person looks, and a steady one. The tests share three actors and use them up, so they run in this order.
"""

import asyncio
import contextlib
import io
import json
import os
import signal
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from rlaudio.actors.pool import RewardPool
from rlaudio.aio import first_error
from rlaudio.config import RunConfig, SourceSettings
from rlaudio.errors import EngineError
from rlaudio.observe.observer import Observer
from rlaudio.observe.progress import Progress
from rlaudio.observe.report import write_report
from rlaudio.observe.tracker import JsonlTracker, MlflowTracker, Trackers, read_curves
from rlaudio.recipes.cluster import actor_environment
from tests.judged_run import QUICKSTART, JudgedRun, Manners

pytestmark = [pytest.mark.timeout(900), pytest.mark.asyncio(loop_scope="module")]

STEPS = 12
FAULT_STEP = 3
WATCHED_STEPS = 60


@dataclass
class Stage:
    """Actors that all tests of this file share.

    Attributes:
        pids: name -> process.
        garbage: the file that holds the share of spoilt answers.
        told: of actors that were left out.
    """

    rewards: RewardPool
    pids: dict[str, int]
    garbage: Path
    told: list[str]

    def config(self, *, steps: int = STEPS) -> RunConfig:
        return make_config(self.garbage, steps=steps)

    def watched_config(self) -> RunConfig:
        """Long enough for the trap monitor; groups whose siblings agree count, or none would be left of cold ones."""
        config = self.config(steps=WATCHED_STEPS)
        config.algorithm.dynamic_sampling = False
        return config

    async def run(self, folder: Path, *, config: RunConfig | None = None, **changes: Any) -> "Ended":
        config = config or self.config()
        run = JudgedRun(
            config,
            RewardPool(config, environment={}, pool=self.rewards.pool),
            tracker=JsonlTracker(folder / "metrics.jsonl"),
            progress=Progress(stream=io.StringIO()),
            **changes,
        )
        return Ended(run, await run.run(), folder)


@dataclass
class Ended:
    """A run that came to its end, and what it left."""

    run: JudgedRun
    observer: Observer
    folder: Path

    def total(self, curve: str) -> float:
        return sum(value for _, value in read_curves(self.folder / "metrics.jsonl").get(curve, []))

    def assert_every_group_is_accounted_for(self) -> None:
        """Issued = trained + dropped, each with a reason, + the few still in the making when the last step was done."""
        sums, totals, settings = self.run.ledger.sums(), self.observer.totals, self.run.config.algorithm
        assert self.observer.steps_done == self.run.config.run.steps
        assert sums.problems == () and sums.num_groups == self.run.prompts.num_issued
        open_at_end = sums.issued + sums.ready
        assert sums.num_groups == sums.trained + sum(sums.dropped.values()) + open_at_end
        assert open_at_end <= (settings.max_staleness + 1) * settings.groups_per_step
        assert (sums.trained, sums.dropped) == (totals.num_groups, totals.drops)
        assert totals.num_groups == self.run.config.run.steps * settings.groups_per_step
        assert all(totals.drops)
        window = self.run.windows[-1]
        assert window.admitted == window.taken + sum(window.dropped.values()) + window.waiting + window.ready
        plotted = {name.removeprefix("drops/"): self.total(name) for name in self._reasons()}
        assert plotted == {reason: float(count) for reason, count in window.dropped.items()}

    def _reasons(self) -> set[str]:
        names = read_curves(self.folder / "metrics.jsonl", prefix="drops/")
        return set(names) - {"drops/all", "drops/share", "drops/filtered_share"}


def make_config(garbage: Path, *, steps: int, group_deadline_s: float = 60.0) -> RunConfig:
    config = RunConfig()
    config.run.steps = steps
    config.data.clips = str(garbage.parent)
    algorithm, rewards = config.algorithm, config.rewards
    algorithm.group_size, algorithm.groups_per_step, algorithm.max_dropped_in_a_row = 4, 2, 50
    rewards.actors, rewards.num_cpus, rewards.start_deadline_s = 3, 0.3, 600.0
    rewards.group_deadline_s, rewards.alive_deadline_s = group_deadline_s, 10.0
    rewards.sources = [
        SourceSettings("verified", "rlaudio.rewards.verified:VerifiedReward"),
        SourceSettings(
            "judge",
            "tests.spoilt_judge:SpoiltJudge",
            weight=0.2,
            options={"rubric": "items", "switch": str(garbage)},
        ),
    ]
    rewards.judge_model.path = str(QUICKSTART / "checkpoints" / "judge")
    rewards.judge_model.engine.max_model_len = 320
    return config


@pytest.fixture(scope="module")
def stage(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    garbage = tmp_path_factory.mktemp("judges") / "garbage"
    told: list[str] = []
    rewards = RewardPool(make_config(garbage, steps=1), environment=actor_environment(), told=told.append)
    pids: dict[str, int] = {}
    try:
        asyncio.run(rewards.start())
        handles = rewards.pool.handles
        pids.update(
            (name, ray.get(handle.__ray_call__.remote(lambda _: os.getpid()), timeout=60))
            for name, handle in handles.items()
        )
        yield Stage(rewards, pids, garbage, told)
    finally:
        rewards.pool.stop()
        for pid in pids.values():  # what was stopped cannot end by itself
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def fault(stage: Stage, name: str, number: signal.Signals) -> dict[int, Callable[[], Awaitable[None]]]:
    async def strike() -> None:
        os.kill(stage.pids[name], number)

    return {FAULT_STEP: strike}


async def test_garbage_three_times_in_ten_is_asked_again_and_then_dropped_with_its_reason(
    stage: Stage, tmp_path: Path
) -> None:
    stage.garbage.write_text("0.3")
    try:
        ended = await stage.run(tmp_path)
    finally:
        stage.garbage.unlink()
    ended.assert_every_group_is_accounted_for()
    assert stage.told == []
    kinds = {kind: ended.total(f"judge/{kind}") for kind in ("unreadable", "truncated", "contradictory")}
    assert kinds["unreadable"] > kinds["truncated"] + kinds["contradictory"] > 0 and min(kinds.values()) > 0, kinds
    assert 0.15 < kinds["unreadable"] / ended.total("judge/asked") < 0.45
    # Some were garbage as often as they were asked: their siblings left, and none of them is a number.
    assert ended.total("failures/judge") > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # SQLAlchemy 2.1 deprecates a loader that MLflow 3.17 uses
async def test_a_run_that_becomes_right_and_cold_is_told_of_everywhere(stage: Stage, tmp_path: Path) -> None:
    def colder(step: int) -> Manners:
        """Half right and warm for as long as the start is measured; then ever more right and ever colder."""
        gone = min(1.0, max(0, step - 20) / 20)
        return Manners(right=0.5 + 0.5 * gone, warm=0.9 - 0.9 * gone)

    folder = tmp_path / "run-1"
    folder.mkdir()
    mlflow = MlflowTracker(run_root=tmp_path, run_folder=folder, experiment="trap")
    shown = io.StringIO()
    run = JudgedRun(
        stage.watched_config(),
        stage.rewards,
        tracker=Trackers(JsonlTracker(folder / "metrics.jsonl"), mlflow),
        progress=Progress(stream=shown),
        manners=colder,
    )
    observer = await run.run()
    await asyncio.to_thread(mlflow.finish, "FINISHED", deadline_s=120)

    alert = run.trap.alert
    assert alert is not None and alert.step in (39, 59)
    assert shown.getvalue().count("reward trap? By step") == 1 and alert.in_words() in shown.getvalue()
    curves = read_curves(folder / "metrics.jsonl")
    fired = [step for step, value in curves["trap/alert"] if value == 1.0]
    assert fired == list(range(alert.step, WATCHED_STEPS))
    assert {"trap/verified", "trap/preference", "reward/verified", "reward/judge", "share/judge"} <= set(curves)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        rows = database.execute("select step from metrics where key='trap/alert' and value=1 order by step").fetchall()
        keys = {key for (key,) in database.execute("select distinct key from metrics").fetchall()}
    assert [step for (step,) in rows] == fired
    assert {"reward/verified", "reward/judge", "share/verified", "share/judge", "correct", "style/warm"} <= keys

    totals = observer.totals
    report = {
        "seed": 0,
        "throughput": {},
        "timings_s": {},
        "groups": {"trained": totals.num_groups, "dropped": dict(totals.drops)},
        "trap": {"training": run.trap.report(), "held_out": {}},
    }
    json.dumps(report)
    page = folder / "report.html"
    clips: Any = None  # no dialogue, no sound
    write_report(page, report=report, before=[], after=[], curves=folder / "metrics.jsonl", clips=clips, voice=None)
    text = page.read_text()
    assert alert.in_words() in text and f"Groups since the last start: {totals.num_groups} trained on" in text


async def test_a_steady_run_raises_no_alert(stage: Stage, tmp_path: Path) -> None:
    ended = await stage.run(tmp_path, config=stage.watched_config(), manners=lambda step: Manners(right=0.7, warm=0.5))
    assert ended.run.trap.watches and ended.run.trap.alert is None
    assert "reward trap?" not in ended.run.progress._stream.getvalue()  # type: ignore[attr-defined]
    assert ended.total("trap/alert") == 0.0


async def test_a_judge_that_is_killed_is_left_out_and_its_groups_are_judged_elsewhere(
    stage: Stage, tmp_path: Path
) -> None:
    ended = await stage.run(tmp_path, faults=fault(stage, "reward-0", signal.SIGKILL))
    ended.assert_every_group_is_accounted_for()
    (said,) = stage.told
    assert "reward-0 is left out, 2 of 3 rewards actors go on: " in said
    actors = [value for _, value in read_curves(tmp_path / "metrics.jsonl")["actors/rewards"]]
    assert actors[0] == 3 and actors[-1] == 2
    assert "JudgeError" not in ended.observer.totals.drops, "another actor was there for every group"


async def test_a_judge_that_hangs_is_found_out_left_out_and_its_groups_are_judged_elsewhere(
    stage: Stage, tmp_path: Path
) -> None:
    config = make_config(stage.garbage, steps=STEPS, group_deadline_s=8.0)
    ended = await stage.run(tmp_path, config=config, faults=fault(stage, "reward-1", signal.SIGSTOP))
    ended.assert_every_group_is_accounted_for()
    assert len(stage.told) == 2 and "reward-1 is left out, 1 of 3 rewards actors go on: mute" in stage.told[1]
    assert list(stage.rewards.pool.handles) == ["reward-2"]


async def test_when_the_last_judge_dies_the_run_ends_and_says_why(stage: Stage, tmp_path: Path) -> None:
    run = JudgedRun(
        stage.config(),
        stage.rewards,
        tracker=JsonlTracker(tmp_path / "metrics.jsonl"),
        progress=Progress(stream=io.StringIO()),
        faults=fault(stage, "reward-2", signal.SIGKILL),
    )
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(120):
            await run.run()
    error = first_error(caught.value)
    assert isinstance(error, EngineError)
    assert "no rewards actor is alive (the last: reward-2: " in str(error) and "resume the run" in str(error)
    assert FAULT_STEP <= len(run.windows) < STEPS
