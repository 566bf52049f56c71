"""Weights arrive beside a real engine: it goes on generating, and what fails on the way changes nothing in it."""

import asyncio
import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import ray
import torch

from rlaudio.engines.base import Generation
from rlaudio.engines.inprocess import InProcessEngine
from rlaudio.errors import WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights.collective import CollectiveTransport
from rlaudio.weights.object_store import ObjectStoreTransport, Offer, Pull
from rlaudio.weights.receiver import Stage, Swap, WeightReceiver
from rlaudio.weights.shares import Share
from rlaudio.weights.snapshot import Snapshot
from tests.ray_local.engine_world import World
from tests.weight_world import Arrived, FakeRanks, Header, Here, Pool, ReceivingActor, Sent, SentShare, gone, share_of

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(400)]

START, NEW, NEWER = WeightVersion(0, 0), WeightVersion(0, 1), WeightVersion(0, 2)


class Arriving:
    """What stands for an object reference whose object is still on its way."""

    def __init__(self) -> None:
        self.arrival: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.arrival


@dataclasses.dataclass
class Engine:
    """An engine in this process and the weights that it was started from."""

    world: World
    engine: InProcessEngine
    trained: dict[str, np.ndarray]

    @property
    def handle(self) -> Any:
        receiver = WeightReceiver(self.engine)
        return Here(lambda step: step.run(receiver))

    def moved(self, seed: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {
            name: (one + 0.05 * rng.standard_normal(one.shape)).astype(np.float32) for name, one in self.trained.items()
        }

    def shares(self, tensors: dict[str, np.ndarray], version: WeightVersion) -> list[Share]:
        return [share_of(tensors, rank=rank, world_size=2, dtype="float32", version=version) for rank in range(2)]

    async def says(self) -> list[Generation]:
        requests = [self.world.request(f"g{i}", self.world.greedy(16), about=i) for i in range(3)]
        return list(await asyncio.gather(*(self.engine.generate(request) for request in requests)))

    async def keep_generating(self, ended: list[int]) -> None:
        number = 0
        while True:
            request = self.world.request(f"load{number}", self.world.greedy(8), about=number % 3)
            ended.append(len((await self.engine.generate(request)).response_ids))
            number += 1


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    world = World.create(tmp_path_factory.mktemp("staging") / "start", seed=0)
    module = world.family.load_module(dtype=torch.float32)
    trained = [(name, one) for name, one in world.family.public_names(module) if not world.family.frozen(name)]
    engine = InProcessEngine(world.settings(), version=START)
    yield Engine(world, engine, Snapshot.of(trained, version=START, wire_dtype="float32").tensors)
    asyncio.run(engine.close())


def assert_equal(ones: list[Generation], others: list[Generation]) -> None:
    for one, other in zip(ones, others, strict=True):
        np.testing.assert_array_equal(one.response_ids, other.response_ids)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


async def test_a_pull_holds_no_token_up_and_a_failed_one_changes_nothing(started: Engine) -> None:
    before = await started.says()
    receiver = WeightReceiver(started.engine)
    one, two = started.shares(started.moved(1), NEW)
    offers = [Arriving(), Arriving()]
    ended: list[int] = []
    load = asyncio.create_task(started.keep_generating(ended))
    try:
        pull = asyncio.create_task(
            Pull(NEW, tuple(Offer(rank, ref) for rank, ref in enumerate(offers)), 60.0).run(receiver)
        )
        offers[0].arrival.set_result(one)
        while len(ended) < 4:  # noqa: ASYNC110 (requests begin and end while half of the weights are here)
            await asyncio.sleep(0.01)
        assert not pull.done()
        offers[1].arrival.set_result(two)
        assert await pull == one.num_bytes + two.num_bytes
        assert started.engine.version == START

        # What never comes, and what does not fit together: neither reaches the engine.
        with pytest.raises(WeightSyncError, match=r"share of rank 1 of weights 0\.2 did not come .* within 0\.2 s"):
            await Pull(NEWER, (Offer(0, Arrived(one)), Offer(1, Arriving())), 0.2).run(receiver)
        with pytest.raises(WeightSyncError, match=r"shares of ranks \[0, 0\] of 2"):
            await Stage((one, one)).run(receiver)
        with pytest.raises(WeightSyncError, match="nothing was staged"):
            await Swap(NEW, 5.0).run(receiver)
        damaged = two.values.copy()
        damaged[0] += 1
        await Stage((one, Share(two.manifest, damaged))).run(receiver)
        with pytest.raises(WeightSyncError, match=r"has CRC-32"):
            await Swap(NEW, 5.0).run(receiver)
    finally:
        load.cancel()
        await asyncio.wait([load])
    assert started.engine.version == START
    assert_equal(await started.says(), before)


async def test_over_gloo_an_engine_survives_a_receiver_that_is_killed(started: Engine, ray_session: None) -> None:
    tensors = started.moved(2)
    await Stage(tuple(started.shares(tensors, NEW))).run(receiver := WeightReceiver(started.engine))
    assert (await Swap(NEW, 60.0).run(receiver)).paused_s > 0
    expected = await started.says()
    await Stage(tuple(started.shares(started.moved(3), NEW))).run(receiver)
    await Swap(NEW, 60.0).run(receiver)
    other = await started.says()
    assert any((a.response_ids != b.response_ids).any() for a, b in zip(expected, other, strict=True))

    ranks = FakeRanks(2, dtype="float32")
    victim = ray.remote(ReceivingActor).options(num_cpus=0, max_concurrency=50).remote()
    try:
        pid = await victim.alive.remote()
        pool = Pool({"engine": started.handle, "victim": victim})
        transport = CollectiveTransport(pool, ranks, deadline_s=180.0, on_gpu=False)
        first = await transport.broadcast(await ranks.publish(started.moved(4), NEW))
        assert first.live == ("engine", "victim")
        await victim.misbehave.remote("dies in Receive")
        ended: list[int] = []
        load = asyncio.create_task(started.keep_generating(ended))
        second = await transport.broadcast(await ranks.publish(tensors, NEWER))
        num_ended = len(ended)
        async with asyncio.timeout(60):  # what ran meanwhile goes on and ends
            while len(ended) == num_ended:  # noqa: ASYNC110 (an engine thread has no event to offer)
                await asyncio.sleep(0.01)
        load.cancel()
        await asyncio.wait([load])
        assert (second.live, list(second.evicted), pool.evicted) == (("engine",), ["victim"], ["victim"])
        await gone(pid)
        assert started.engine.version == NEWER
        assert_equal(await started.says(), expected)
        assert second.deliveries["engine"].paused_s > 0
    finally:
        ranks.stop()


async def test_the_store_brings_every_byte(started: Engine) -> None:
    shares = started.shares(started.moved(5), WeightVersion(0, 7))
    sent = Sent(WeightVersion(0, 7), [SentShare(Header(rank), Arrived(share)) for rank, share in enumerate(shares)])
    outcome = await ObjectStoreTransport(Pool({"engine": started.handle}), deadline_s=60.0).broadcast(sent)
    delivery = outcome.deliveries["engine"]
    assert (outcome.live, delivery.num_bytes) == (("engine",), sum(share.num_bytes for share in shares))
    assert 0 < delivery.paused_s < delivery.live_s
