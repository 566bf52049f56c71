"""One life of a run whose processes are killed: `python -m tests.chaos.world LIFE.json`, inside a cluster of two nodes.

Loop, pools, supervisors, transport, judge, ledger, spool, checkpoints and the restart of ranks are the real ones. A
life ends with code 0 when the run is at its end, by its own fault or with whatever error ended it.
"""

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from rlaudio.actors.pool import PlayedGroup, RewardPool, RolloutPool, ScoredGroup
from rlaudio.config import (
    AlgorithmSettings,
    LearnerSettings,
    RewardSettings,
    RolloutSettings,
    RunConfig,
    RunSettings,
    SourceSettings,
    SupervisionSettings,
)
from rlaudio.data.run_data import RunData
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.messages import MinibatchSpec, TrainerSpec
from rlaudio.loop import Parts
from rlaudio.observe.progress import Progress
from rlaudio.recipes.cluster import actor_environment
from rlaudio.recipes.restoring import remembering, with_spool
from rlaudio.recipes.scaling import supervised
from rlaudio.recipes.training import bring_back, train_through_losses
from rlaudio.runs import create_run, open_run
from rlaudio.types import Message, PromptRecord, TextPart
from rlaudio.weights.base import Broadcast, Receivers, SnapshotRef
from rlaudio.weights.joining import JoinableWeights
from rlaudio.weights.object_store import ObjectStoreTransport
from tests.chaos.actors import Engine, Judge, Rank
from tests.chaos.faults import Fault, Saboteur, announcing

RECORDS = [PromptRecord(f"r{index}", "t", (Message("user", (TextPart("hi"),)),)) for index in range(11)]
PER_STEP, EVERY = 2, 2
PATIENCE_S = 120.0
"""Of every deadline: far above what anything takes, below what a life may take."""
DONE = "the run has ended"


@dataclass(frozen=True)
class Life:
    """What a life is told.

    Attributes:
        root: of the run's folder, and of the file of faults that struck.
        run: to go on with; empty: a new one.
        nodes: file of the cluster's nodes.
    """

    address: str
    root: str
    run: str
    nodes: str
    steps: int
    seed: int
    faults: list[Fault]

    @property
    def struck(self) -> Path:
        return Path(self.root) / "struck.jsonl"


def make_config(life: Life) -> RunConfig:
    return RunConfig(
        run=RunSettings(
            name="chaos", root=life.root, steps=life.steps, seed=life.seed, checkpoint_every=EVERY, shared_root=True
        ),
        rewards=RewardSettings(
            sources=[SourceSettings(name="odd", judge="tests.ray_local.equivalence_world:LikesOddSums")],
            actors=1,
            group_deadline_s=PATIENCE_S,
            start_deadline_s=PATIENCE_S,
        ),
        rollout=RolloutSettings(actors=2, attempts=4, group_deadline_s=PATIENCE_S, start_deadline_s=PATIENCE_S),
        algorithm=AlgorithmSettings(group_size=4, groups_per_step=PER_STEP, max_staleness=2, look_ahead=1),
        learner=LearnerSettings(ranks=2, max_restarts=5, start_deadline_s=PATIENCE_S, step_deadline_s=PATIENCE_S),
        supervision=SupervisionSettings(max_restarts=1000, first_pause_s=0.1, longest_pause_s=0.5),
    )


class Rollouts(RolloutPool):
    sabotage: Saboteur

    def make(self) -> Any:
        return _remote(Engine, self._environment, "pool").remote()

    async def play(self, record: PromptRecord, *, group: int) -> PlayedGroup:
        self.sabotage.at("generation")
        return await super().play(record, group=group)


class Judges(RewardPool):
    sabotage: Saboteur

    def make(self) -> Any:
        return _remote(Judge, self._environment, "pool").remote(self._config, on_gpu=False)

    async def judge(self, played: PlayedGroup) -> ScoredGroup:
        self.sabotage.at("judging")
        scored = await super().judge(played)
        asyncio.get_running_loop().call_soon(self.sabotage.at, "window")  # when the ledger and the window have it
        return scored


class Ranks(LearnerGroup):
    rank_actor = Rank
    sabotage: Saboteur

    async def forward_backward(self, part: MinibatchSpec) -> None:
        self.sabotage.at("learning")
        await super().forward_backward(part)


class Weights(JoinableWeights):
    sabotage: Saboteur

    async def broadcast(self, snapshot: SnapshotRef, *, to: Receivers | None = None) -> Broadcast:
        self.sabotage.at("publish")
        return await super().broadcast(snapshot, to=to)


class Steps:
    """An observer that counts."""

    def __init__(self, sabotage: Saboteur, *, steps_done: int) -> None:
        self._sabotage = sabotage
        self.went_back(steps_done)

    def dropped(self, reason: str) -> None: ...

    def step(self, step: int, *, groups: Sequence[ScoredGroup], **_: object) -> None:
        self.went_back(step + 1)

    def went_back(self, step: int) -> None:
        self.steps_done = self._sabotage.steps_done = step


def _remote(kind: type, environment: Any, node: str) -> Any:
    return ray.remote(kind).options(
        num_cpus=0, max_concurrency=100, resources={node: 0.01}, runtime_env={"env_vars": dict(environment)}
    )


async def live(life: Life) -> None:
    config = make_config(life)
    folder = open_run(life.run) if life.run else create_run(life.root, name=config.run.name, seed=life.seed)
    progress = Progress(stream=sys.stderr)
    pids = Path(life.root) / "pids" / str(os.getpid())
    environment = {**actor_environment(), **announcing(pids)}
    sabotage = Saboteur(life.faults, struck=life.struck, pids=pids, nodes=Path(life.nodes), seed=life.seed)
    Rollouts.sabotage = Judges.sabotage = Ranks.sabotage = Weights.sabotage = sabotage
    resume = bool(life.run)
    with folder, remembering(config, data=RunData(RECORDS, {}), folder=folder, resume=resume, told=progress.say) as it:
        settings = with_spool(config, folder)
        rollouts = Rollouts(settings, environment=environment, told=progress.say)
        rewards = Judges(settings, environment=environment, told=progress.say)
        spec = TrainerSpec(model=config.model, clips_root="", learner=config.learner, version=it.version)
        learner = Ranks(
            spec, algorithm=config.algorithm, env_vars=environment, place=lambda: {"resources": {"learner": 0.01}}
        )
        transport = ObjectStoreTransport(rollouts.pool, deadline_s=PATIENCE_S)
        weights = Weights(transport, receivers=rollouts.pool, version=it.version)
        observer: Any = Steps(sabotage, steps_done=it.step)
        save_whole = it.saver(learner)

        async def save(step: int) -> None:
            sabotage.at("checkpoint")
            await save_whole(step)

        try:
            await asyncio.gather(rollouts.start(it.version), rewards.start(), learner.start())
            async with supervised(
                config, rollouts=rollouts, rewards=rewards, weights=weights, version=it.version, told=progress.say
            ):
                version = it.version
                if it.checkpoint is not None:
                    version = await bring_back(learner, weights, it.checkpoint)
                parts = Parts(
                    prompts=it.prompts,
                    ledger=it.ledger,
                    rollouts=rollouts,
                    rewards=rewards,
                    learner=learner,
                    weights=weights,
                    observer=observer,
                    version=version,
                    save=save,
                )
                await train_through_losses(
                    config, parts, it, folder=folder, progress=progress, went_back=observer.went_back
                )
        finally:
            rollouts.pool.stop()
            rewards.pool.stop()
            await learner.stop()


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    life = Life(**told | {"faults": [Fault(**fault) for fault in told["faults"]]})
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    ray.init(address=life.address, log_to_driver=False, logging_level="ERROR")
    asyncio.run(live(life))
    ray.shutdown()
    print(DONE, flush=True)


if __name__ == "__main__":
    main()
