"""A small run whose driver can be killed: real Ray, ledger, spool, checkpoints, reward actor; fake engine and learner.

`python -m tests.ray_local.ledger_world ROOT [RUN]` starts it, or goes on with RUN. The learner keeps a list of the
groups that its weights have seen and saves it with them: the ledger is compared with something else than itself.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from rlaudio.actors.members import ActorPool
from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.actors.reward import RewardWorker
from rlaudio.actors.rollout import PlayedHeader, PlayOrder
from rlaudio.config import AlgorithmSettings, RewardSettings, RunConfig, RunSettings, SourceSettings
from rlaudio.data.run_data import RunData
from rlaudio.errors import RolloutError
from rlaudio.experience.builder import played_batch
from rlaudio.experience.states import states_batch
from rlaudio.loop import Parts
from rlaudio.observe.progress import Progress
from rlaudio.recipes.cluster import actor_environment
from rlaudio.recipes.restoring import remembering, with_spool
from rlaudio.recipes.rl import train_and_keep
from rlaudio.runs import create_run, open_run
from rlaudio.types import Dialogue, Message, PromptRecord, TextPart, Turn, VersionSpan, WeightVersion

RECORDS = [PromptRecord(f"r{index}", "t", (Message("user", (TextPart("hi"),)),)) for index in range(11)]
STEPS, PER_STEP = 40, 3


def make_config(root: str) -> RunConfig:
    odd = SourceSettings(name="odd", judge="tests.ray_local.equivalence_world:LikesOddSums")
    return RunConfig(
        run=RunSettings(name="killed", root=root, steps=STEPS, checkpoint_every=4),
        rewards=RewardSettings(sources=[odd]),
        algorithm=AlgorithmSettings(group_size=4, groups_per_step=PER_STEP, max_staleness=2, look_ahead=1),
    )


class Engine:
    """A rollout actor without a model: ids from the order's seed, now and then slow, now and then a failure."""

    def __init__(self, version: WeightVersion) -> None:
        self._version = version

    async def take(self, version: WeightVersion) -> None:
        self._version = version

    async def play(self, record: PromptRecord, order: PlayOrder) -> tuple[PlayedHeader, pa.RecordBatch, pa.RecordBatch]:
        rng = random.Random(order.seed)
        await asyncio.sleep(rng.choice([0.0, 0.01, 0.05]))
        if rng.random() < 0.1:
            raise RolloutError("it does not fit the window")
        dialogues = []
        for sibling in range(order.num_siblings):
            ids = np.array([rng.randrange(100) for _ in range(5)], dtype=np.int32)
            spans = (VersionSpan(self._version, 0, 5),)
            turn = Turn(0, ids, ids, ids.astype(np.float32), spans, (), "so", "yes", "stop")
            dialogues.append(Dialogue(record.id, order.group, sibling, (turn,)))
        return PlayedHeader(4, 20, 20), played_batch(record, dialogues), states_batch(())


class Learner:
    """Weights that are a list of batches. Reads rows where ranks would: what it trains on is what lies in them."""

    def __init__(self, version: WeightVersion) -> None:
        self.version = version
        self.seen: list[list[int]] = []
        self._batch: list[int] = []

    async def prepare(self, refs: Sequence[Any], states: Sequence[Any]) -> None:
        batches: list[pa.RecordBatch] = [await ref for ref in refs]
        self._batch = [batch.column("group")[0].as_py() for batch in batches]
        for batch in batches:
            for spans in batch.column("version_spans").to_pylist():
                assert all(0 <= self.version.number - span["number"] <= 3 for span in spans), "a token is too old"

    def minibatches(self, prepared: None) -> list[int]:
        return [0]

    async def forward_backward(self, part: int) -> None:
        await asyncio.sleep(0.01)

    async def optimizer_step(self) -> Any:
        self.seen.append(self._batch)
        self.version = WeightVersion(self.version.incarnation, self.version.number + 1)
        return SimpleNamespace(version=self.version)

    async def save(self, path: Path) -> WeightVersion:
        (path / "seen.json").write_text(json.dumps(self.seen))
        await asyncio.sleep(0.02)
        return self.version

    def load(self, path: Path) -> None:
        self.seen = json.loads((path / "seen.json").read_text())


class Quiet:
    """Reports nothing, counts steps."""

    steps_done = 0

    def dropped(self, reason: str) -> None: ...

    def step(self, step: int, **_: object) -> None:
        self.steps_done = step + 1
        print(f"step {step}", flush=True)


async def run(root: str, resumed: str | None) -> None:
    config = make_config(root)
    folder = open_run(resumed) if resumed else create_run(root, name=config.run.name, seed=0)
    told = Progress(stream=sys.stderr)
    with (
        folder,
        remembering(
            config, data=RunData(RECORDS, {}), folder=folder, resume=resumed is not None, told=told.say
        ) as memory,
    ):
        settings = with_spool(config, folder)
        learner: Any = Learner(memory.version)
        if memory.checkpoint is not None:
            learner.load(memory.checkpoint)
        assert len(learner.seen) == memory.version.number == memory.step
        options = {"num_cpus": 0.1, "max_concurrency": 100}
        engine, judge = ray.remote(Engine).options(**options), ray.remote(RewardWorker).options(**options)
        engines: dict[str, Any] = {f"rollout-{i}": engine.remote(memory.version) for i in range(2)}
        judges: dict[str, Any] = {"reward-0": judge.remote(settings, on_gpu=False)}
        rollouts = RolloutPool(config, environment={}, pool=ActorPool("rollout", engines, alive_deadline_s=60.0))
        rewards = RewardPool(config, environment={}, pool=ActorPool("rewards", judges, alive_deadline_s=60.0))
        await rewards.start()

        class Weights:
            async def broadcast(self, snapshot: Any) -> None:
                await asyncio.gather(*(engine.take.remote(snapshot.version) for engine in engines.values()))

        weights: Any = Weights()
        observer: Any = Quiet()
        parts = Parts(
            prompts=memory.prompts,
            ledger=memory.ledger,
            rollouts=rollouts,
            rewards=rewards,
            learner=learner,
            weights=weights,
            observer=observer,
            version=memory.version,
            save=memory.saver(learner),
        )
        await train_and_keep(config, parts, first_step=memory.step, progress=told)


def main() -> None:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": actor_environment()},
    )
    asyncio.run(run(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None))
    ray.shutdown()


if __name__ == "__main__":
    main()
