"""At staleness 0 the asynchronous machinery is a plain loop: the same weights, bit for bit. And its actor's endings.

Bit for bit needs an engine that runs one request at a time, and an encoder that has heard every clip before. Else what
is computed together depends on when groups arrive, and the last bits on that: log-probabilities by 2e-6 nats, with the
same ids and rewards. They enter the importance weights: one step of 1e-3 then differed by up to 7e-5.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from rlaudio.actors.members import ActorPool
from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.actors.reward import RewardWorker
from rlaudio.actors.rollout import PlayOrder, RolloutWorker
from rlaudio.actors.serving import start_engine
from rlaudio.config import RunConfig
from rlaudio.data.source import PromptSource
from rlaudio.errors import EngineError
from rlaudio.experience.issuing import Issuer
from rlaudio.experience.ledger import Ledger
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.messages import MinibatchSpec
from rlaudio.loop import Parts, train
from rlaudio.models.families import open_family
from rlaudio.recipes.cluster import actor_environment
from rlaudio.recipes.doctor import trainer_spec
from rlaudio.types import PromptRecord, WeightVersion
from rlaudio.weights.object_store import ObjectStoreTransport
from rlaudio.weights.snapshot import Snapshot
from tests.ray_local.equivalence_world import STEPS, HangEngine, NumRunning, WholeWeights, make_config, make_records

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]

START = WeightVersion(0, 0)


@dataclass(frozen=True)
class World:
    config: RunConfig
    records: list[PromptRecord]
    rollouts: RolloutPool


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Iterator[World]:
    """One rollout actor for all tests of this file; its first test finds it with the checkpoint's weights."""
    clips = tmp_path_factory.mktemp("clips")
    config = make_config(tiny_checkpoint, clips)
    records = make_records(clips)
    rollouts = RolloutPool(config, environment=actor_environment())
    asyncio.run(rollouts.start(START))
    yield World(config, records, rollouts)
    rollouts.pool.stop()


@pytest.fixture
def one_process() -> Iterator[None]:
    """This process may be engine and trainer at once: vLLM opens a world of one, and DeepSpeed takes what it finds."""
    environment = {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    os.environ.update(environment)
    yield
    from rlaudio.learner.optimization import leave_ranks

    leave_ranks()
    for name in environment:
        os.environ.pop(name, None)


@pytest.mark.usefixtures("one_process")
async def test_staleness_zero_gives_the_weights_of_a_plain_loop(world: World) -> None:
    machinery, dropped = await asynchronous(world)
    start, plain, num_dull = await plain_loop(world)
    assert machinery.version == plain.version == WeightVersion(0, STEPS)
    assert machinery.tensors.keys() == plain.tensors.keys()
    assert [name for name, tensor in plain.tensors.items() if not np.array_equal(tensor, machinery.tensors[name])] == []
    assert all(not np.array_equal(tensor, start.tensors[name]) for name, tensor in plain.tensors.items())
    assert len(dropped) == num_dull > 0, "groups without signal are replaced, on both sides alike"


async def asynchronous(world: World) -> tuple[Snapshot, list[str]]:
    """`loop.train` with pools, window, learner group and transport, all through Ray; and the reasons of drops."""
    config, dropped = world.config, []
    rewards = RewardPool(config, environment=actor_environment())
    learner = LearnerGroup(trainer_spec(config, START), algorithm=config.algorithm, env_vars=actor_environment())
    observer: Any = SimpleNamespace(dropped=dropped.append, step=lambda step, **_: None)

    async def save(step: int) -> None: ...

    try:
        await asyncio.gather(rewards.start(), learner.start())
        ledger = Ledger.in_memory()
        parts = Parts(
            prompts=Issuer(PromptSource(world.records, seed=config.run.seed), ledger),
            ledger=ledger,
            rollouts=world.rollouts,
            rewards=rewards,
            learner=learner,
            weights=ObjectStoreTransport(world.rollouts.pool, deadline_s=60.0),
            observer=observer,
            version=START,
            save=save,
        )
        for index, record in enumerate(world.records):
            await world.rollouts.play_greedy(record, index=index, purpose="hear", silence=False)
        await train(config.algorithm, parts, first_step=0, last_step=STEPS, save_every=STEPS)
        return await learner.probe(WholeWeights()), dropped
    finally:
        rewards.pool.stop()
        await learner.stop()


async def plain_loop(world: World) -> tuple[Snapshot, Snapshot, int]:
    """The same training, one thing after the other in this process. Weights before and after, groups without signal."""
    from rlaudio.learner.optimization import prepare_deepspeed
    from rlaudio.learner.rank import RankWorker

    config, algorithm = world.config, world.config.algorithm
    engine = await start_engine(
        config.rollout.engine,
        family=open_family(config.model),
        dtype="float32",
        on_gpu=False,
        version=START,
        seed=config.run.seed,
        encoded_clips=True,
    )
    rollout, reward = RolloutWorker(config, on_gpu=False, engine=engine), RewardWorker(config, on_gpu=False)
    await rollout.start(START)
    await reward.start()
    prepare_deepspeed()
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    rank = RankWorker(trainer_spec(config, START))
    start = snapshot = rank.snapshot()
    for index, record in enumerate(world.records):
        await rollout.play(record, PlayOrder(index, 1, 0.0, "hear"))
    prompts, num_dull = PromptSource(world.records, seed=config.run.seed), 0
    for _ in range(STEPS):
        batch, states = [], []
        while len(batch) < algorithm.groups_per_step:
            group, record = prompts.num_issued, prompts.next()
            seed = f"run{config.run.seed}/train/{group}/0"
            order = PlayOrder(group, algorithm.group_size, config.sampling.temperature, seed, ship_states=True)
            header, dialogues, heard = await rollout.play(record, order)
            judged, experience = await reward.judge(record, dialogues)
            if not judged.has_signal:
                num_dull += 1
                continue
            batch.append(experience)
            states.append((header.shipped, lambda heard=heard: heard))
        rank.prepare(batch, algorithm, states=states)
        rank.forward_backward(MinibatchSpec(epoch=0, index=0))
        _, snapshot = rank.optimizer_step()
        assert snapshot is not None
        await engine.update_weights(snapshot.to_update(), deadline_s=60.0)
    await engine.close()
    assert start is not None and snapshot is not None
    return start, snapshot, num_dull


@asynccontextmanager
async def playing(world: World, *, siblings: int = 1600) -> AsyncIterator["asyncio.Task[Any]"]:
    """A group under way that keeps the engine busy for minutes, longer than `until` waits."""
    config = replace(world.config, algorithm=replace(world.config.algorithm, group_size=siblings))
    many = RolloutPool(config, environment={}, pool=world.rollouts.pool)
    task = asyncio.create_task(many.play(world.records[0], group=1_000))
    try:
        await until(world, lambda num_running: num_running > 0)
        yield task
    finally:
        task.cancel()


async def until(world: World, holds: Any, *, deadline_s: float = 60.0) -> None:
    """Wait until the engine's number of requests is so."""
    (handle,) = world.rollouts.pool.handles.values()
    async with asyncio.timeout(deadline_s):
        while not holds(await handle.probe.remote(NumRunning())):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.02)


async def test_a_cancelled_group_leaves_the_engine(world: World) -> None:
    async with playing(world) as task:
        task.cancel()
        await until(world, lambda num_running: num_running == 0)
        with pytest.raises(asyncio.CancelledError):
            await task
    played = await world.rollouts.play(world.records[0], group=1_001)
    assert played.header.num_turns == 2 * world.config.algorithm.group_size


async def test_groups_that_hear_the_same_sounds_hold_the_same_states(world: World) -> None:
    """Once in Ray's store, however many groups are in flight; shipped anew when nobody held them any more."""
    record = world.records[0]
    first = await world.rollouts.play(record, group=1_003)
    again = await world.rollouts.play(record, group=1_004)
    assert first.header.shipped and again.header.clips == first.header.clips
    assert (again.header.shipped, again.header.states_bytes, again.states) == ((), 0, first.states)
    read = await first.states[0].ref
    assert tuple(read.column("sha256").to_pylist()) == first.states[0].names == first.header.shipped
    shipped = first.header.shipped
    del first, again
    assert (await world.rollouts.play(record, group=1_005)).header.shipped == shipped


async def test_a_busy_engine_is_slow_and_a_hanging_one_is_left_out(world: World) -> None:
    """The same question to the same actor: with hundreds of requests in its engine, and with its engine stuck."""
    told: list[str] = []
    ((name, handle),) = world.rollouts.pool.handles.items()
    config = replace(world.config, rollout=replace(world.config.rollout, group_deadline_s=4.0))
    busy = ActorPool("rollout", {name: handle}, alive_deadline_s=60.0, told=told.append)
    async with playing(world) as task, busy.lease() as member:
        assert not await busy.examine(member, asked_s=0.0)
        assert not told and not task.done()
    await until(world, lambda num_running: num_running == 0)

    await handle.probe.remote(HangEngine())
    pool = ActorPool("rollout", {name: handle}, alive_deadline_s=3.0, told=told.append)
    async with asyncio.timeout(60.0):
        with pytest.raises(EngineError, match=r"no rollout actor is alive \(the last: rollout-0: mute"):
            await RolloutPool(config, environment={}, pool=pool).play(world.records[0], group=1_002)
    assert [line.split(":")[0] for line in told] == ["rollout-0 is left out, 0 of 1 rollout actors go on"]
    async with asyncio.timeout(60.0):
        with pytest.raises(RayActorError):
            await handle.ping.remote()
