"""An engine that stops answering in any phase of a sync, over any transport: it is named, the others are live in time.

Real Ray actors and real process groups around a fake engine. A receiver that hangs is woken afterwards and joins anew,
as a new actor would; those that are killed stay dead.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import ray

from rlaudio.errors import WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights.base import Broadcast, WeightTransport
from rlaudio.weights.collective import CollectiveTransport
from rlaudio.weights.object_store import ObjectStoreTransport
from tests.weight_world import FakeRanks, Pool, ReceivingActor

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(400)]

DEADLINES_S = {"object_store": 12.0, "collective": 48.0}
"""Waits, not work: long, because on a busy machine each step of the survivor has a sixth of it, or all."""
SLACK_S = 30.0
"""For a driver on a busy machine. What would wait for ever waits for longer: gloo's own patience is minutes."""
NUM_VALUES = 3 << 20
NUM_RANKS = 2
FAULTS = [f"{how} in {phase}" for how in ("stops", "dies") for phase in ("Pull", "Swap")]
CASES = [(how, phase) for how in ("stops", "dies") for phase in ("Join", "Announce", "Receive", "Swap")]


@dataclass
class World:
    """Two ranks, an engine that always works, and others that are told what to do."""

    ranks: FakeRanks
    transports: dict[str, WeightTransport] = field(default_factory=dict)
    pools: dict[str, Pool] = field(default_factory=dict)
    handles: dict[str, Any] = field(default_factory=dict)
    number: int = 0

    def victim(self) -> str:
        """A receiver that works so far: the one that hung last and was woken, or a new one."""
        name = f"victim{len(self.handles)}"
        free = [known for known in self.handles if known.startswith("victim")]
        return free[-1] if free else self.add(name)

    def add(self, name: str) -> str:
        self.handles[name] = ray.remote(ReceivingActor).options(num_cpus=0, max_concurrency=50).remote()
        ray.get(self.handles[name].warm.remote(), timeout=240.0)
        return name

    async def publish(self, transport: str, *names: str) -> Broadcast:
        """A new version to these, by that way."""
        self.number += 1
        self.pools[transport].handles = {name: self.handles[name] for name in names}
        sent = await self.ranks.publish(values(self.number), WeightVersion(0, self.number))
        return await self.transports[transport].broadcast(sent)


def values(number: int) -> dict[str, np.ndarray]:
    big = np.full(NUM_VALUES, number, np.uint16)
    big[::40] += np.uint16(number)
    return {"decoder.weight": big, "head.weight": np.full((3, 5), number, np.uint16)}


@pytest.fixture(scope="module")
def world(ray_session: None) -> Iterator[World]:
    made = World(FakeRanks(NUM_RANKS))
    made.pools = {name: Pool({}) for name in DEADLINES_S}
    made.transports = {
        "object_store": ObjectStoreTransport(made.pools["object_store"], deadline_s=DEADLINES_S["object_store"]),
        "collective": CollectiveTransport(
            made.pools["collective"], made.ranks, deadline_s=DEADLINES_S["collective"], on_gpu=False
        ),
    }
    made.add("survivor")
    yield made
    made.ranks.stop()
    for handle in made.handles.values():
        ray.kill(handle)


async def live(world: World, name: str) -> None:
    """It samples from the newest weights, bit for bit."""
    version, sums = await world.handles[name].held.remote()
    assert version == WeightVersion(0, world.number)
    assert sums == {key: int(value.astype(np.int64).sum()) for key, value in values(world.number).items()}


async def test_over_the_store_nobody_waits_for_those_that_stop_answering(world: World) -> None:
    """All of them in one broadcast: receivers know nothing of each other."""
    victims = {world.add(f"victim of the store {number}"): fault for number, fault in enumerate(FAULTS)}
    pids = [await world.handles[name].alive.remote() for name in victims]
    try:
        everybody = {"survivor", *victims}
        assert set((await world.publish("object_store", *everybody)).live) == everybody
        for name, fault in victims.items():
            await live(world, name)
            await world.handles[name].misbehave.remote(fault)
        began_s = time.monotonic()
        outcome = await world.publish("object_store", *everybody)
        assert time.monotonic() - began_s < DEADLINES_S["object_store"] + SLACK_S
        assert outcome.live == ("survivor",)
        assert outcome.evicted.keys() == victims.keys() == set(world.pools["object_store"].evicted)
        for name, error in outcome.evicted.items():
            step = "pull" if victims[name].endswith("Pull") else "swap to"
            assert str(error).startswith(f"{name} did not {step} weights 0.{world.number}"), error
        await live(world, "survivor")
    finally:
        for name, pid in zip(victims, pids, strict=True):
            del world.handles[name]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # one that stands still would not hear Ray's own way


@pytest.mark.parametrize(("how", "phase"), CASES, ids=["-".join(case) for case in CASES])
async def test_whoever_stops_answering_is_named_and_the_others_are_live(world: World, how: str, phase: str) -> None:
    """What a receiver does that only sleeps, with its process alive, is in `test_collective.py`."""
    victim = world.victim()
    if phase == "Join":  # the group that stands is not theirs
        await world.publish("collective", "survivor")
    else:
        assert set((await world.publish("collective", "survivor", victim)).live) == {"survivor", victim}
        await live(world, victim)
    pid = await world.handles[victim].alive.remote()
    await world.handles[victim].misbehave.remote(f"{how} in {phase}")
    began_s = time.monotonic()
    outcome = await world.publish("collective", "survivor", victim)
    assert time.monotonic() - began_s < DEADLINES_S["collective"] + SLACK_S
    assert outcome.live == ("survivor",)
    assert list(outcome.evicted) == [victim]
    said = str(outcome.evicted[victim])
    assert said.startswith(f"{victim} did not"), said
    assert world.pools["collective"].evicted[-1] == victim
    await live(world, "survivor")
    if how == "dies":
        del world.handles[victim]
    else:
        os.kill(pid, signal.SIGCONT)
        await world.handles[victim].misbehave.remote("")
    if phase == "Receive":
        assert (await world.publish("collective", "survivor")).live == ("survivor",)
        await live(world, "survivor")


async def test_a_rank_that_does_not_answer_is_named(world: World) -> None:
    """Without one rank's share there are no weights: the broadcast ends with its name, and in time."""
    await world.publish("collective", "survivor")
    world.number += 1
    sent = await world.ranks.publish(values(world.number), WeightVersion(0, world.number))
    os.kill(world.ranks.pids[1], signal.SIGSTOP)
    try:
        with pytest.raises(WeightSyncError, match="rank 1"):
            async with asyncio.timeout(DEADLINES_S["collective"] + SLACK_S):
                await world.transports["collective"].broadcast(sent)
    finally:
        os.kill(world.ranks.pids[1], signal.SIGCONT)
