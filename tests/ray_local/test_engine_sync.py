"""`AsyncLLM` gets its weights over real gloo groups, and is what is left when other receivers are killed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import ray

from rlaudio.engines.async_llm import AsyncLLMEngine
from rlaudio.engines.base import Generation
from rlaudio.engines.inprocess import InProcessEngine
from rlaudio.types import WeightVersion
from rlaudio.weights.base import SyncStep
from rlaudio.weights.collective import CollectiveTransport
from rlaudio.weights.receiver import WeightReceiver
from rlaudio.weights.receiving import Join
from tests.ray_local.engine_world import OLD, World, Worlds, assert_equal, greedy
from tests.weight_world import Here, LocalRanks, Pool, ReceivingActor, gone

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="session"),
]

FIRST, SECOND, THIRD = (WeightVersion(1, number) for number in (6, 7, 8))
DEADLINE_S = 180.0


class Surviving:
    """The receiving end beside the engine in this process; remembers the groups that it was asked into."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self._receiver = WeightReceiver(engine)
        self.joined: list[Join] = []

    async def sync(self, step: SyncStep) -> Any:
        if isinstance(step, Join):
            self.joined.append(step)
        return await step.run(self._receiver)


@pytest_asyncio.fixture(loop_scope="session")
async def engine(async_llm: AsyncLLMEngine, worlds: Worlds) -> AsyncIterator[AsyncLLMEngine]:
    """With the old weights, before and after."""
    yield async_llm
    await async_llm.update_weights(worlds.start.update(version=OLD), deadline_s=60.0)


async def keep_generating(engine: AsyncLLMEngine, world: World, ended: list[Generation]) -> None:
    number = 0
    while True:
        ended.append(await engine.generate(world.request(f"load{number}", world.greedy(8), about=number % 3)))
        number += 1


async def test_async_llm_survives_receivers_that_are_killed_in_the_middle_of_a_sync(
    worlds: Worlds, engine: AsyncLLMEngine, ray_session: None
) -> None:
    """One dies when the new version is announced, the next while it travels; requests go on all the time.

    The first death is one before anything was sent: the others have to meet again. The second may leave the engine
    with everything or with half of it.
    """
    old, new = worlds.start.update().tensors, worlds.target.update().tensors
    before = await greedy(engine, worlds.start)
    ranks, surviving = LocalRanks(2, dtype="float32", refer=ray.put), Surviving(engine)
    victims = {name: ray.remote(ReceivingActor).options(num_cpus=0, max_concurrency=50).remote() for name in "ab"}
    try:
        await asyncio.gather(*(victim.warm.remote() for victim in victims.values()))
        pids = [await victim.alive.remote() for victim in victims.values()]
        pool = Pool({"engine": Here(surviving.sync), **victims})
        transport = CollectiveTransport(pool, ranks, deadline_s=DEADLINE_S, on_gpu=False)
        assert (await transport.broadcast(ranks.publish(old, FIRST))).live == ("engine", "a", "b")
        assert_equal(await greedy(engine, worlds.start), before)

        await victims["a"].misbehave.remote("dies in Announce")
        await victims["b"].misbehave.remote("dies in Receive")
        ended: list[Generation] = []
        load = asyncio.create_task(keep_generating(engine, worlds.start, ended))
        second = await transport.broadcast(ranks.publish(new, SECOND))
        num_ended = len(ended)
        async with asyncio.timeout(60):  # what ran meanwhile goes on and ends
            while len(ended) < num_ended + 2:  # noqa: ASYNC110 (there is no event to wait for)
                await asyncio.sleep(0.01)
        load.cancel()
        await asyncio.wait([load])
        assert (second.live, sorted(second.evicted), sorted(pool.evicted)) == (("engine",), ["a", "b"], ["a", "b"])
        for pid in pids:
            await gone(pid)
        told = [span.version for generation in ended for span in generation.version_spans]
        assert told == sorted(told, key=[FIRST, SECOND].index)
        assert told[-1] == engine.version == SECOND
        after = await greedy(engine, worlds.start)
        assert {span.version for generation in after for span in generation.version_spans} == {SECOND}

        # The survivor's group serves on, under an id that no group with the dead had.
        pool.handles = {"engine": pool.handles["engine"]}
        third = await transport.broadcast(ranks.publish(old, THIRD))
        assert (third.live, third.evicted, engine.version) == (("engine",), {}, THIRD)
        assert_equal(await greedy(engine, worlds.start), before)
        met = [join.spec.names for join in surviving.joined]
        assert met[0] == ("engine", "a", "b")
        assert ("engine", "b") in met
        assert met[-1] == ("engine",)
        assert len({join.spec.group_id for join in surviving.joined}) == len(met)
    finally:
        for victim in victims.values():
            ray.kill(victim)
    assert_equal(after, await said_by_a_fresh_engine(worlds))


async def said_by_a_fresh_engine(worlds: Worlds) -> list[Generation]:
    """What an engine says that was started from the new weights."""
    fresh = InProcessEngine(worlds.target.settings(), version=SECOND)
    try:
        return await greedy(fresh, worlds.start)
    finally:
        await fresh.close()
