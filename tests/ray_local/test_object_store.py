"""Weights through Ray's object store: whoever takes them in time is live, everyone else is named and left out."""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray

from rlaudio.errors import WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights.object_store import ObjectStoreTransport
from rlaudio.weights.shares import Share
from rlaudio.weights.snapshot import verify_update
from tests.weight_world import Header, Pool, ReceivingActor, Sent, SentShare, share_of

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]

VERSION = WeightVersion(0, 3)
NUM_VALUES = 1 << 18
NUM_RANKS = 2


def values() -> dict[str, np.ndarray]:
    return {"a.weight": np.arange(NUM_VALUES, dtype=np.float32), "b": np.ones(3, np.float32)}


@ray.remote(num_cpus=0)
class Rank:
    def step(self, rank: int) -> Share:
        # No torch in the workers: importing it would be most of this test.
        return share_of(values(), rank=rank, world_size=NUM_RANKS, dtype="float32", version=VERSION)


@ray.remote(num_cpus=0)
class Rollout(ReceivingActor):
    """A fake engine behind the real receiver; also says what it has got."""

    async def last(self) -> tuple[float, bool]:
        update = self.engine.updates[-1]
        verify_update(update)
        return float(update.tensors["a.weight"][-1]), self.cancelled


@pytest.fixture(scope="module")
def sent(ray_session: None) -> Sent:
    learner = Rank.remote()
    refs = [learner.step.remote(rank) for rank in range(NUM_RANKS)]
    ready, _ = ray.wait(refs, num_returns=NUM_RANKS, timeout=240.0)
    assert len(ready) == NUM_RANKS
    # Gone before anybody pulls: a method's return value outlives its actor.
    ray.kill(learner)
    return Sent(version=VERSION, shares=[SentShare(Header(rank), ref) for rank, ref in enumerate(refs)])


@pytest.fixture(scope="module")
def actors(ray_session: None) -> Iterator[dict[str, Any]]:
    faults = {"one": "", "two": "", "slow": "sleeps in Pull", "wrong": "refuses", "dead": ""}
    handles = {name: Rollout.remote(fault) for name, fault in faults.items()}
    ray.get([handle.alive.remote() for handle in handles.values()], timeout=240.0)
    ray.kill(handles["dead"])
    yield handles
    for handle in handles.values():
        ray.kill(handle)


def pool(actors: dict[str, Any], *names: str) -> Pool:
    return Pool({name: actors[name] for name in names})


async def test_everyone_has_the_same_bytes(sent: Sent, actors: dict[str, Any]) -> None:
    receivers = pool(actors, "one", "two")
    outcome = await ObjectStoreTransport(receivers, deadline_s=60.0).broadcast(sent)
    assert (outcome.version, outcome.live, outcome.evicted, receivers.evicted) == (VERSION, ("one", "two"), {}, [])
    assert [await handle.last.remote() for handle in receivers.handles.values()] == [(NUM_VALUES - 1, False)] * 2


async def test_the_slow_the_refusing_and_the_dead_are_named_and_left_out(sent: Sent, actors: dict[str, Any]) -> None:
    receivers = pool(actors, "one", "slow", "wrong", "dead")
    async with asyncio.timeout(90.0):
        outcome = await ObjectStoreTransport(receivers, deadline_s=10.0).broadcast(sent)
    assert outcome.live == ("one",)
    assert sorted(receivers.evicted) == sorted(outcome.evicted) == ["dead", "slow", "wrong"]
    assert str(outcome.evicted["slow"]) == "slow did not pull weights 0.3 within 10 s"
    assert "wrong did not swap to weights 0.3" in str(outcome.evicted["wrong"])
    assert "tensor 'b' has another shape" in str(outcome.evicted["wrong"])
    assert "dead did not pull weights 0.3" in str(outcome.evicted["dead"])
    # The call that was given up does not linger in the actor.
    async with asyncio.timeout(90.0):
        while not await actors["slow"].was_cancelled.remote():  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.05)


async def test_nobody_left_is_an_error_that_names_everyone(sent: Sent, actors: dict[str, Any]) -> None:
    with pytest.raises(WeightSyncError, match=r"0\.3 reached no engine: wrong did not.*; dead did not") as caught:
        await ObjectStoreTransport(pool(actors, "wrong", "dead"), deadline_s=60.0).broadcast(sent)
    assert "another shape" in str(caught.value)
    with pytest.raises(WeightSyncError, match="reached no engine: there are none"):
        await ObjectStoreTransport(Pool({}), deadline_s=2.0).broadcast(sent)
