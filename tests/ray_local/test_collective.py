"""The collective transport in one process: real gloo groups, receivers that hang on purpose, no Ray.

With processes that are killed and stopped: `test_transport_chaos.py`.
"""

import asyncio
import dataclasses
import time

import numpy as np
import pytest
import ray
import torch.distributed  # noqa: F401 (before any deadline runs)

from rlaudio.errors import WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights import membership
from rlaudio.weights.base import Broadcast
from rlaudio.weights.collective import CollectiveTransport
from tests.weight_world import Here, LocalRanks, Pool, ReceivingActor

pytestmark = pytest.mark.timeout(400)

NUM_RANKS = 2
DEADLINE_S = 48.0
"""Waits, not work: long, because every step has a sixth of it or more on a busy machine."""
SLACK_S = 30.0
"""For the same machine: what waits for ever waits for longer."""


def values(number: int) -> dict[str, np.ndarray]:
    big = np.arange(200_000).astype(np.uint16)
    big[::50] += np.uint16(number)
    return {"decoder.weight": big, "head.weight": np.full((3, 5), number % 7, np.uint16)}


@dataclasses.dataclass
class World:
    ranks: LocalRanks
    pool: Pool
    transport: CollectiveTransport
    actors: dict[str, ReceivingActor] = dataclasses.field(default_factory=dict)
    number: int = 0

    @classmethod
    def of(cls, *names: str, delta: bool = False) -> "World":
        ranks, pool = LocalRanks(NUM_RANKS), Pool({})
        world = cls(ranks, pool, CollectiveTransport(pool, ranks, deadline_s=DEADLINE_S, on_gpu=False))
        for name in names:
            world.add(name, delta=delta)
        return world

    def add(self, name: str, *, delta: bool = False) -> None:
        self.actors[name] = ReceivingActor(keeps_base=delta)
        self.pool.handles[name] = Here(self.actors[name].sync)

    async def publish(self) -> Broadcast:
        self.number += 1
        return await self.transport.broadcast(self.ranks.publish(values(self.number), WeightVersion(0, self.number)))

    async def live(self, *names: str) -> None:
        for name in names:
            version, sums = await self.actors[name].held()
            assert version == WeightVersion(0, self.number), name
            assert sums == {key: int(one.astype(np.int64).sum()) for key, one in values(self.number).items()}

    def num_groups(self) -> int:
        return sum(step.method == "join" for step in self.ranks.sent) // NUM_RANKS


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cancel", lambda call: call.future().cancel())
    monkeypatch.setattr(membership, "_host", lambda: "127.0.0.1")
    monkeypatch.setattr(membership, "CHUNK_BYTES", 1 << 16)  # several chunks per share


async def test_a_group_serves_until_somebody_joins() -> None:
    world = World.of("one", "two")
    for _ in range(2):
        outcome = await world.publish()
        assert (set(outcome.live), outcome.evicted) == ({"one", "two"}, {})
        await world.live("one", "two")
    assert world.num_groups() == 1
    world.add("three")
    assert set((await world.publish()).live) == {"one", "two", "three"}
    await world.live("one", "two", "three")
    assert world.num_groups() == 2


async def test_the_silent_one_is_named_and_the_others_are_live_in_time() -> None:
    """In every phase, and a rank that sends nothing, side by side: they mostly wait."""
    phases = ("Join", "Announce", "Receive", "Swap")
    await asyncio.gather(*(silent_in(phase) for phase in phases), a_silent_rank_is_named_and_nobody_is_left_out())


async def silent_in(phase: str) -> None:
    world = World.of("one", "silent", "two")
    if phase != "Join":
        await world.publish()
    await world.actors["silent"].misbehave(f"sleeps in {phase}")
    began_s = time.monotonic()
    outcome = await world.publish()
    assert time.monotonic() - began_s < DEADLINE_S + SLACK_S, phase
    assert set(outcome.live) == {"one", "two"}, phase
    await world.live("one", "two")
    assert list(outcome.evicted) == ["silent"], phase
    assert str(outcome.evicted["silent"]).startswith("silent did not"), phase
    assert "silent" in world.pool.evicted, phase
    del world.pool.handles["silent"]
    outcome = await world.publish()
    assert (set(outcome.live), outcome.evicted) == ({"one", "two"}, {}), phase
    await world.live("one", "two")


async def a_silent_rank_is_named_and_nobody_is_left_out() -> None:
    world = World.of("one", "two")
    await world.publish()
    world.ranks.mute = 1
    began_s = time.monotonic()
    with pytest.raises(WeightSyncError, match="rank 1"):
        await world.publish()
    assert time.monotonic() - began_s < DEADLINE_S + SLACK_S
    assert world.pool.evicted == []


async def test_a_group_that_broke_is_formed_again_and_nobody_is_blamed() -> None:
    world = World.of("one", "two")
    await world.publish()
    await world.actors["two"].misbehave("breaks in Receive")
    outcome = await world.publish()
    assert outcome.evicted == {}, str(outcome.evicted)
    assert (set(outcome.live), world.pool.evicted) == ({"one", "two"}, [])
    await world.live("one", "two")


async def test_a_refusal_names_its_reason() -> None:
    world = World.of("one", "wrong")
    world.actors["wrong"].engine.refuses = True
    outcome = await world.publish()
    assert outcome.live == ("one",)
    assert "tensor 'b' has another shape" in str(outcome.evicted["wrong"])


async def test_nobody_at_all_is_an_error() -> None:
    with pytest.raises(WeightSyncError, match=r"0\.1 reached no engine: there are none"):
        await World.of().publish()


async def test_differences_travel_and_a_newcomer_gets_the_whole() -> None:
    world = World.of("one", "two", delta=True)
    whole = (await world.publish()).deliveries["one"].num_bytes
    small = (await world.publish()).deliveries["one"].num_bytes
    await world.live("one", "two")
    assert small < whole / 4
    world.add("new", delta=True)
    assert (await world.publish()).deliveries["one"].num_bytes == whole  # one group, one form
    assert (await world.publish()).deliveries["new"].num_bytes < whole / 4
    await world.live("one", "two", "new")
