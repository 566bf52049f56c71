"""The collective transport in one process: real gloo groups, receivers that hang on purpose, no Ray.

With processes that are killed and stopped: `test_transport_chaos.py`.
"""

import asyncio
import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import ray
import torch.distributed  # noqa: F401 (before any deadline runs)

from rlaudio.errors import WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights import membership
from rlaudio.weights.base import Broadcast
from rlaudio.weights.collective import CollectiveTransport
from rlaudio.weights.joining import JoinableWeights
from tests.weight_world import Here, LocalRanks, Pool, ReceivingActor, Sent

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

    def sent(self, number: int) -> Sent:
        return self.ranks.publish(values(number), WeightVersion(0, number))

    async def publish(self) -> Broadcast:
        self.number += 1
        return await self.transport.broadcast(self.sent(self.number))

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


async def test_ranks_that_start_again_form_a_group_of_their_own_at_once() -> None:
    """With the same engines, and one rank fewer: nobody tries the group that the ranks before had formed."""
    world = World.of("one", "two")
    await world.publish()
    before = world.ranks.start_again(NUM_RANKS - 1)
    world.ranks.sent.clear()
    outcome = await world.publish()
    assert (set(outcome.live), outcome.evicted) == ({"one", "two"}, {})
    await world.live("one", "two")
    assert [step.method for step in world.ranks.sent] == ["open", "join", "send"]
    assert len(before) == NUM_RANKS


async def test_who_joins_between_two_broadcasts_gets_the_weights_of_the_last_and_then_those_of_the_next() -> None:
    world = World.of("one", "two")
    receivers: Any = world.pool
    weights = JoinableWeights(world.transport, receivers=receivers, version=WeightVersion(0, 0))
    world.number += 1
    await weights.broadcast(world.sent(world.number))
    three = ReceivingActor()
    handle = Here(three.sync)
    held = await weights.join("three", handle, take_in=lambda: world.pool.handles.update(three=handle))
    world.actors["three"] = three
    assert held == WeightVersion(0, 1)
    await world.live("one", "two", "three")
    world.number += 1
    outcome = await weights.broadcast(world.sent(world.number))
    assert (set(outcome.live), outcome.evicted) == ({"one", "two", "three"}, {})
    await world.live("one", "two", "three")


async def test_who_joins_when_the_ranks_hold_newer_weights_gets_those() -> None:
    """Ranks keep one version to send: that of the broadcast which is about to begin."""
    world = World.of("one")
    receivers: Any = world.pool
    weights = JoinableWeights(world.transport, receivers=receivers, version=WeightVersion(0, 0))
    await weights.broadcast(world.sent(1))
    newer = world.sent(2)
    two = world.actors["two"] = ReceivingActor()
    handle = Here(two.sync)
    joining = asyncio.create_task(weights.join("two", handle, take_in=lambda: world.pool.handles.update(two=handle)))
    await asyncio.sleep(0)
    outcome = await weights.broadcast(newer)
    assert (outcome.live, outcome.evicted) == (("one",), {})
    assert await joining == WeightVersion(0, 2)
    world.number = 2
    await world.live("one", "two")


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
