"""kill -9 of a learner rank in the middle of a run: the ranks start again, the run ends, every group is trained once.

Real ranks with a tiny policy, real judge, ledger, spool and checkpoints; engines without a model.
"""

import asyncio
import io
import os
import signal
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import ray

from rlaudio.actors.members import ActorPool
from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.actors.reward import RewardWorker
from rlaudio.config import AlgorithmSettings, LearnerSettings, RunConfig
from rlaudio.data.run_data import RunData
from rlaudio.errors import RanksLostError
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.messages import PublishedSnapshot, TrainerSpec
from rlaudio.learner.rank import RankWorker
from rlaudio.loop import Parts
from rlaudio.observe.progress import Progress
from rlaudio.recipes.restoring import remembering, with_spool
from rlaudio.recipes.training import train_through_losses
from rlaudio.runs import create_run
from rlaudio.types import WeightVersion
from rlaudio.weights.shares import assemble
from rlaudio.weights.snapshot import Snapshot
from tests.ray_local.learner_world import World
from tests.ray_local.ledger_world import RECORDS, Engine, make_config

STEPS, PER_STEP, EVERY = 5, 2, 2

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(480)]


@dataclass(frozen=True)
class Pid:
    def run(self, worker: RankWorker) -> int:
        return os.getpid()


class Engines:
    """`WeightTransport`: engines are told the version; the weights themselves are looked at here."""

    def __init__(self, handles: dict[str, Any]) -> None:
        self.handles = handles
        self.received: list[tuple[WeightVersion, Snapshot]] = []

    async def broadcast(self, snapshot: PublishedSnapshot, **_: object) -> None:
        weights = assemble([await share.ref for share in snapshot.shares])
        self.received.append((snapshot.version, weights))
        for engine in self.handles.values():
            await engine.take.remote(snapshot.version)


class Killer:
    """An observer that kills the last rank when a step is done."""

    def __init__(self, ranks: LearnerGroup, *, after: int) -> None:
        self.steps: list[int] = []
        self.steps_done = 0
        self.pids: list[int] = []
        self._after = after

    def dropped(self, reason: str) -> None: ...

    def step(self, step: int, **_: object) -> None:
        self.steps.append(step)
        self.steps_done = step + 1
        if step == self._after and self.pids:
            os.kill(self.pids.pop(), signal.SIGKILL)
            self.pids.clear()

    def went_back(self, step: int) -> None:
        self.steps_done = step


def small(root: Path, world: World, **learner: Any) -> RunConfig:
    config = make_config(str(root))
    settings: dict[str, Any] = {
        "ranks": 2,
        "num_cpus": 0.1,
        "lr": 1e-4,
        "zero_stage": 1,
        "start_deadline_s": 240.0,
        "step_deadline_s": 240.0,
    }
    return replace(
        config,
        model=replace(config.model, path=str(world.family.path)),
        run=replace(config.run, steps=STEPS, checkpoint_every=EVERY),
        algorithm=AlgorithmSettings(group_size=4, groups_per_step=PER_STEP, max_staleness=1, kl_coef=0.0),
        learner=LearnerSettings(**(settings | learner)),
    )


async def test_a_rank_that_is_killed_costs_the_steps_since_the_last_checkpoint(
    learner_world: World, tmp_path: Path
) -> None:
    config = small(tmp_path, learner_world)
    said = io.StringIO()
    progress = Progress(stream=said)
    folder = create_run(str(tmp_path), name="lost", seed=0)
    spec = TrainerSpec(model=config.model, clips_root="", learner=config.learner)
    learner = LearnerGroup(spec, algorithm=config.algorithm)
    options = {"num_cpus": 0.1, "max_concurrency": 100}
    words = learner_world.family.tokenizer.encode("one two three four five six seven nine")
    engine = ray.remote(Engine).options(**options)
    engines = {f"rollout-{i}": engine.remote(WeightVersion(0, 0), words) for i in range(2)}
    judges: dict[str, Any] = {
        "reward-0": ray.remote(RewardWorker).options(**options).remote(with_spool(config, folder), on_gpu=False)
    }
    rollouts = RolloutPool(config, environment={}, pool=ActorPool("rollout", engines, alive_deadline_s=120.0))
    rewards = RewardPool(config, environment={}, pool=ActorPool("rewards", judges, alive_deadline_s=120.0))
    weights: Any = Engines(engines)
    killer: Any = Killer(learner, after=2)
    try:
        with (
            folder,
            remembering(config, data=RunData(RECORDS, {}), folder=folder, resume=False, told=progress.say) as memory,
        ):
            await rewards.start()
            await learner.start()
            killer.pids = await learner._all("probe", Pid())
            parts = Parts(
                prompts=memory.prompts,
                ledger=memory.ledger,
                rollouts=rollouts,
                rewards=rewards,
                learner=learner,
                weights=weights,
                observer=killer,
                version=memory.version,
                save=memory.saver(learner),
            )
            await train_through_losses(
                config, parts, memory, folder=folder, progress=progress, went_back=killer.went_back
            )
            sums = memory.ledger.sums()
        assert await learner.find_lost() == ""
        os.kill((await learner._all("probe", Pid()))[0], signal.SIGKILL)
        for _ in range(1000):  # until Ray has noticed
            if await learner.find_lost():
                break
            await asyncio.sleep(0.1)
        assert await learner.find_lost() == "learner rank 0 died"
        with pytest.raises(RanksLostError, match="broken"):
            await learner.snapshot()
    finally:
        rollouts.pool.stop()
        rewards.pool.stop()
        await learner.stop()

    # Step 2 was taken and lost: the last checkpoint was that of two steps.
    assert killer.steps == [0, 1, 2, 2, 3, 4], said.getvalue()
    assert "learner rank 1 died" in said.getvalue() and "going on from step 2" in said.getvalue()
    assert sums.problems == () and sums.durable == STEPS * PER_STEP and sums.num_lives == 2
    versions = [version for version, _ in weights.received]
    # What step 2 made in the first life may have been on its way when the rank was killed, or not.
    assert [version for version in versions if version.incarnation == 1] == [WeightVersion(1, n) for n in (2, 3, 4, 5)]
    assert Counter(version.incarnation for version in versions)[0] in (2, 3)
    by_version = dict(weights.received)
    assert by_version[WeightVersion(1, 2)].checksums == by_version[WeightVersion(0, 2)].checksums, "the same weights"
    assert (folder.path / "model" / "config.json").is_file()
