"""Rollout and reward actors as real Ray processes, with the fake engine behind the real weight receiver; their run.

Each rollout actor plays one group at a time, so more actors play more. Pools, supervisors, window, loop, transport and
control desk are the real ones.
"""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

from rlaudio.actors.pool import RewardPool, RolloutPool, ScoredGroup
from rlaudio.config import RunConfig
from rlaudio.data.source import PromptSource
from rlaudio.experience.issuing import Issuer
from rlaudio.experience.ledger import Ledger
from rlaudio.loop import Parts, train
from rlaudio.recipes.control import commanded
from rlaudio.recipes.scaling import Scaling, autoscaling, supervised
from rlaudio.types import Message, PromptRecord, TextPart, WeightVersion
from rlaudio.weights.base import SyncStep
from rlaudio.weights.joining import JoinableWeights
from rlaudio.weights.object_store import ObjectStoreTransport
from rlaudio.weights.receiver import WeightReceiver
from tests.fakes import FakeEngine
from tests.weight_world import Header, Sent, SentShare, share_of

RECORDS = [PromptRecord(f"r{i}", "t", (Message("user", (TextPart("hi"),)),)) for i in range(5)]
ENVIRONMENT = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
TURNS = 3


class PlayingActor:
    """Plays one group at a time, three turns each; what it returns says who played and under which weights."""

    def __init__(self, name: str, turn_s: float) -> None:
        self._name, self._turn_s = name, turn_s
        self._engine = FakeEngine(reply=lambda request: [9, 1])
        self._receiver = WeightReceiver(self._engine)
        self._one_at_a_time = asyncio.Semaphore(1)

    async def start(self, version: WeightVersion) -> None:
        self._engine.version = version

    async def ping(self) -> None: ...

    async def pid(self) -> int:
        return os.getpid()

    async def play(self, record: PromptRecord, order: Any) -> tuple[Any, Any, None]:
        versions = []
        async with self._one_at_a_time:
            for _ in range(TURNS):
                versions.append(self._engine.version)
                await asyncio.sleep(self._turn_s)
        return SimpleNamespace(clips=(), shipped=(), actor=self._name), (order.group, versions), None

    async def sync(self, step: SyncStep) -> Any:
        return await step.run(self._receiver)


class JudgingActor:
    async def start(self) -> None: ...

    async def ping(self) -> None: ...

    async def pid(self) -> int:
        return os.getpid()

    async def judge(self, record: PromptRecord, played: tuple[int, list[WeightVersion]]) -> tuple[Any, Any]:
        group, versions = played
        header = SimpleNamespace(
            has_signal=True, versions=(min(versions), max(versions)), group=group, late="", spooled=None
        )
        return header, played


class PlayingPool(RolloutPool):
    turn_s = 0.1
    num_made = 0

    def make(self) -> Any:
        self.num_made += 1
        actor: Any = ray.remote(PlayingActor).options(
            num_cpus=0, max_concurrency=100, runtime_env={"env_vars": ENVIRONMENT}
        )
        return actor.remote(f"actor {self.num_made}", self.turn_s)


class JudgingPool(RewardPool):
    def make(self) -> Any:
        actor: Any = ray.remote(JudgingActor).options(
            num_cpus=0, max_concurrency=100, runtime_env={"env_vars": ENVIRONMENT}
        )
        return actor.remote()


class LiveRun:
    """A run of fakes on real Ray: learner and prompts are here, all the rest is what a run has.

    Attributes:
        learner_s: of a batch; may be changed meanwhile.
        trained: (group, actor that played it) in time, with the event loop's seconds in `trained_s`.
        ages: versions, of every group at the moment it was taken.
    """

    def __init__(self, config: RunConfig, folder: Path, *, learner_s: float = 0.0) -> None:
        self.config, self.folder, self.learner_s = config, folder, learner_s
        self.told: list[str] = []
        self.prompts = PromptSource(RECORDS, seed=0)
        self.version = WeightVersion(0, 0)
        self.trained: list[tuple[int, str]] = []
        self.trained_s: list[float] = []
        self.ages: list[int] = []
        self.drops: Counter[str] = Counter()
        self.is_busy = False
        self.stepped = asyncio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Scaling]:
        """Train until the block ends. Raises what the run raises."""
        config = self.config
        self.rollouts = PlayingPool(config, environment={}, told=self.told.append)
        self.rewards = JudgingPool(config, environment={}, told=self.told.append)
        transport = ObjectStoreTransport(self.rollouts.pool, deadline_s=60.0)
        weights = JoinableWeights(transport, receivers=self.rollouts.pool, version=self.version)
        here: Any = self
        try:
            await asyncio.gather(self.rollouts.start(self.version), self.rewards.start())
            async with supervised(
                config,
                rollouts=self.rollouts,
                rewards=self.rewards,
                weights=weights,
                version=self.version,
                told=self.told.append,
            ) as scaling:
                ledger = Ledger.in_memory()
                parts = Parts(
                    prompts=Issuer(self.prompts, ledger),
                    ledger=ledger,
                    rollouts=self.rollouts,
                    rewards=self.rewards,
                    learner=here,
                    weights=weights,
                    observer=here,
                    version=self.version,
                    save=self.save,
                )
                pools = {"rollouts": self.rollouts.pool, "rewards": self.rewards.pool}
                following = autoscaling(config, scaling, **pools, learner=self, told=self.told.append)
                desk = commanded(
                    self.folder,
                    ask=scaling.ask,
                    sizes=scaling.sizes,
                    environment=ENVIRONMENT,
                    told=self.told.append,
                )
                async with desk, following:
                    training = asyncio.create_task(
                        train(config.algorithm, parts, first_step=0, last_step=10**6, save_every=10**6)
                    )
                    self.training = training
                    try:
                        yield scaling
                    finally:
                        training.cancel()
                        await asyncio.wait([training])
                        if not training.cancelled() and (error := training.exception()) is not None:
                            raise error
        finally:
            self.rollouts.pool.stop()
            self.rewards.pool.stop()

    async def until(self, seen: Any) -> None:
        """Wait until `seen()` is true, looking after every step; the test's own deadline bounds it."""
        while not seen():
            self.stepped.clear()
            waiting = asyncio.create_task(self.stepped.wait())
            await asyncio.wait([self.training, waiting], return_when=asyncio.FIRST_COMPLETED, timeout=0.5)
            waiting.cancel()
            if self.training.done():
                self.training.result()

    async def until_trained(self, num_more: int) -> list[tuple[int, str]]:
        """The next so many groups that are trained on."""
        first = len(self.trained)
        await self.until(lambda: len(self.trained) >= first + num_more)
        return self.trained[first:]

    def groups_per_s(self, first: int, last: int) -> float:
        """Throughput between two of the trained groups."""
        return (last - first) / max(self.trained_s[last] - self.trained_s[first], 1e-9)

    def num_open(self) -> int:
        """Groups that were issued, and neither trained on nor dropped."""
        return self.prompts.num_issued - len(self.trained) - self.drops.total()

    # ---- learner, observer -------------------------------------------------------------------------------------

    async def prepare(self, refs: Sequence[Any], states: Sequence[Any]) -> list[Any]:
        self.is_busy = True
        return list(refs)

    def minibatches(self, prepared: Sequence[Any]) -> list[int]:
        return [0]

    async def forward_backward(self, part: int) -> None:
        await asyncio.sleep(self.learner_s)

    async def optimizer_step(self) -> Sent:
        self.version = WeightVersion(0, self.version.number + 1)
        tensors = {"w": np.full(1000, self.version.number, np.float32)}
        share = share_of(tensors, rank=0, world_size=1, dtype="float32", version=self.version)
        header = Header(0, share.num_bytes)
        self.is_busy = False
        return Sent(self.version, [SentShare(header, ray.put(share), None, ray.put(share.manifest))])

    def dropped(self, reason: str) -> None:
        self.drops[reason] += 1

    def step(self, step: int, *, groups: Sequence[ScoredGroup], consumed_by: WeightVersion, **_: object) -> None:
        for group in groups:
            header: Any = group.header
            played: Any = group.played
            self.trained.append((header.group, played.actor))
            self.trained_s.append(asyncio.get_running_loop().time())
            self.ages.append(consumed_by.number - group.oldest_version.number)
        self.stepped.set()

    async def save(self, step: int) -> None: ...
