"""The processes of a run that are killed: real judge, fake engine behind the real receiver, a rank without a model."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from rlaudio.actors.reward import RewardWorker
from rlaudio.actors.rollout import PlayedHeader, PlayOrder
from rlaudio.config import AlgorithmSettings, RunConfig
from rlaudio.errors import RolloutError
from rlaudio.experience.builder import played_batch
from rlaudio.experience.states import states_batch
from rlaudio.learner.messages import MinibatchSpec, PreparedBatch, ShareHeader, StepMetrics, TrainerSpec
from rlaudio.learner.rank_actor import RankActor
from rlaudio.types import Dialogue, PromptRecord, Turn, VersionSpan, WeightVersion
from rlaudio.weights.base import SyncStep
from rlaudio.weights.receiver import WeightReceiver
from tests.chaos.faults import announce
from tests.fakes import FakeEngine
from tests.weight_world import share_of

TURN_S, LEARN_S, SAVE_S = 0.03, 0.05, 0.05
PROMPT_IDS = 8000
"""Rows of more than the 100 kB that Ray would keep with the driver: they lie on the node that made them."""
WEIGHTS = 60_000
MAX_AGE = 3
"""In versions: see `world.make_config`."""


class Engine:
    """A rollout actor without a model: ids from the order's seed, some groups slow, one in twenty fails."""

    def __init__(self) -> None:
        announce("rollout")
        self._engine = FakeEngine(reply=lambda request: [9, 1])
        self._receiver = WeightReceiver(self._engine)

    async def start(self, version: WeightVersion) -> None:
        self._engine.version = version

    async def ping(self) -> None: ...

    async def sync(self, step: SyncStep) -> Any:
        return await step.run(self._receiver)

    async def play(self, record: PromptRecord, order: PlayOrder) -> tuple[PlayedHeader, pa.RecordBatch, pa.RecordBatch]:
        rng = random.Random(order.seed)
        spans = []
        for turn in range(2):
            spans.append(VersionSpan(self._engine.version, turn, turn + 1))
            await asyncio.sleep(TURN_S * rng.choice([1.0, 1.0, 3.0]))
        if rng.random() < 0.05:
            raise RolloutError("it does not fit the window")
        prompt = np.zeros(PROMPT_IDS, dtype=np.int32)
        dialogues = []
        for sibling in range(order.num_siblings):
            ids = np.array([rng.randrange(100) for _ in range(2)], dtype=np.int32)
            turns = Turn(0, prompt, ids, np.full(2, -3.0, dtype=np.float32), tuple(spans), (), "so", "yes", "stop")
            dialogues.append(Dialogue(record.id, order.group, sibling, (turns,)))
        return PlayedHeader(4, 8, 8), played_batch(record, dialogues), states_batch(())


class Judge(RewardWorker):
    """The real one."""

    def __init__(self, config: RunConfig, *, on_gpu: bool) -> None:
        announce("reward")
        super().__init__(config, on_gpu=on_gpu)


class Rank(RankActor):
    """A learner rank whose weights are a list of batches."""

    def __init__(self, rank: int, world_size: int) -> None:
        announce("learner")
        super().__init__(rank, world_size)

    def open_store(self) -> None:
        """There is nothing to meet for."""

    def build(self, spec: TrainerSpec, address: tuple[str, int] | None) -> None:
        worker: Any = ListOfBatches(spec, rank=self._rank, world_size=self._world_size)
        self._live = worker


class ListOfBatches:
    """What `RankWorker` does, without a model. It reads rows where ranks do: what it trains on is what lies in them.

    The groups that the weights have seen are saved with them: the ledger is compared with something else than itself.
    """

    def __init__(self, spec: TrainerSpec, *, rank: int, world_size: int) -> None:
        self.trainer = SimpleNamespace(spec=spec, version=spec.version, metrics=self._metrics)
        self._rank, self._world_size = rank, world_size
        self._seen: list[list[int]] = []
        self._batch: list[int] = []

    def prepare(
        self, batches: Sequence[pa.RecordBatch], algorithm: AlgorithmSettings, *, states: Sequence[Any]
    ) -> PreparedBatch:
        self._batch = [batch.column("group")[0].as_py() for batch in batches]
        for batch in batches:
            for spans in batch.column("version_spans").to_pylist():
                ages = [self.trainer.version.number - span["number"] for span in spans]
                assert all(0 <= age <= MAX_AGE for age in ages), f"tokens {ages} versions old"
        rows = sum(batch.num_rows for batch in batches)
        return PreparedBatch(rows, rows, len(batches), 2 * rows, 2 * rows, 1, 1, 1.0, 0.0)

    def forward_backward(self, part: MinibatchSpec) -> None:
        time.sleep(LEARN_S)

    def optimizer_step(self, *, snapshot: bool) -> tuple[StepMetrics, None]:
        self._seen.append(self._batch)
        version = self.trainer.version
        self.trainer.version = WeightVersion(version.incarnation, version.number + 1)
        return self._metrics({}), None

    def hand_out(self) -> Any:
        tensors = {"w": np.full(WEIGHTS, len(self._seen), np.float32)}
        share = share_of(
            tensors, rank=self._rank, world_size=self._world_size, dtype="float32", version=self.trainer.version
        )
        return SimpleNamespace(header=ShareHeader(self._rank, share.num_bytes, 0.0), share=share, delta=None)

    def save(self, path: Path) -> None:
        (path / f"seen-{self._rank}.json").write_text(json.dumps(self._seen))
        time.sleep(SAVE_S)

    def load(self, path: Path) -> StepMetrics:
        self._seen = json.loads((path / f"seen-{self._rank}.json").read_text())
        self.trainer.version = WeightVersion(self.trainer.version.incarnation, len(self._seen))
        return self._metrics({})

    def export(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / f"seen-{self._rank}.json").write_text(json.dumps(self._seen))

    def _metrics(self, values: dict[str, float]) -> StepMetrics:
        return StepMetrics(self.trainer.version, values)
