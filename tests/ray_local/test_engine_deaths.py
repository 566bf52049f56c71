"""How the engine in process dies: everyone who waits is told, and mixed weights are never served."""

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaudio.engines.async_llm import AsyncLLMEngine
from rlaudio.engines.base import Engine
from rlaudio.engines.inprocess import InProcessEngine
from rlaudio.engines.swapping import SwapPolicy
from rlaudio.errors import EngineError, WeightSyncError
from tests.ray_local.engine_world import OLD, World, Worlds, until

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

LONG = 440  # as long as the window allows: what runs must outlast what is done to it


@asynccontextmanager
async def running(build: Callable[[], Engine]) -> AsyncIterator[Any]:
    engine = build()
    try:
        yield engine
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def start(worlds: Worlds) -> World:
    return worlds.start


@pytest.fixture(scope="module")
def target(worlds: Worlds) -> World:
    return worlds.target


def exploding() -> dict[str, object]:
    """A fault inside a step, as a driver error or a broken model would be."""
    from rlaudio.engines.bans import BannedIds

    class Exploding(BannedIds):
        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            if self._batch_size > 1:
                raise MemoryError("the device is gone")
            return super().apply(logits)

    return {"logits_processors": [Exploding]}


def tearing() -> dict[str, object]:
    """Tensors that stop arriving in the middle of a swap."""
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from rlaudio.weights.vllm_engine import RlaudioUpdateInfo, RlaudioWeightEngine

    class Tearing(RlaudioWeightEngine):
        def _arriving(self, update_info: RlaudioUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
            yield from itertools.islice(super()._arriving(update_info), 9)
            raise OSError("the source is gone")

    WeightTransferEngineFactory.register_engine("tearing", Tearing)
    return {"weight_transfer_config": WeightTransferConfig(backend="tearing")}


async def test_death_reaches_everyone_who_waits_and_everyone_who_comes_later(start: World, target: World) -> None:
    settings = start.settings(**exploding())
    async with running(lambda: InProcessEngine(settings, version=OLD)) as engine:
        await engine.generate(start.request("single", start.sampling(3)))
        requests = [start.request(f"r{i}", start.sampling(50, seed=i)) for i in range(5)]
        outcomes = await asyncio.gather(*(engine.generate(r) for r in requests), return_exceptions=True)
        assert all(isinstance(outcome, EngineError) and "the device is gone" in str(outcome) for outcome in outcomes)
        with pytest.raises(EngineError, match="the engine is dead.*the device is gone"):
            await engine.generate(start.request("late", start.sampling(3)))
        with pytest.raises(EngineError, match="the engine is dead"):
            await engine.update_weights(target.update(), deadline_s=5.0)


async def test_a_swap_torn_halfway_ends_the_engine_instead_of_serving_mixed_weights(
    start: World, target: World
) -> None:
    """With the flight cut off, so that nothing but the engine knows of it when the swap fails."""
    settings, swap = start.settings(**tearing()), SwapPolicy("abort")
    async with running(lambda: InProcessEngine(settings, version=OLD, swap=swap)) as engine:
        flight = asyncio.create_task(engine.generate(start.request("r", start.sampling(LONG))))
        await until(lambda: engine.num_running == 1)
        with pytest.raises(WeightSyncError, match=r"1\.5 failed halfway.*the source is gone"):
            await engine.update_weights(target.update(), deadline_s=30.0)
        with pytest.raises(EngineError, match="the source is gone"):
            await flight
        with pytest.raises(EngineError, match="the engine is dead"):
            await engine.generate(start.request("late", start.sampling(3)))
        assert engine.version == OLD


@pytest.mark.parametrize(("kind", "says"), [(InProcessEngine, "ended with"), (AsyncLLMEngine, "could not be built")])
async def test_an_engine_that_cannot_be_built_says_so(start: World, tmp_path: Path, kind: Any, says: str) -> None:
    settings = dataclasses.replace(start.settings(), model=str(tmp_path))
    with pytest.raises(EngineError, match=says):
        kind(settings, version=OLD)


async def test_closing_fails_what_runs_and_what_waits_and_refuses_what_comes(start: World, target: World) -> None:
    """A swap waits for a turn to end, and another turn and another swap wait for it."""
    engine = InProcessEngine(start.settings(), version=OLD, swap=SwapPolicy("turn_ends"))
    tasks = [asyncio.create_task(engine.generate(start.request("r", start.sampling(LONG))))]
    await until(lambda: engine.num_running == 1)
    tasks += [asyncio.create_task(engine.update_weights(target.update(), deadline_s=60.0)) for _ in range(2)]
    await until(lambda: engine.num_waiting == 2)
    tasks += [asyncio.create_task(engine.generate(start.request("waits", start.sampling(3))))]
    await until(lambda: engine.num_waiting == 3)
    await engine.close()
    for task in tasks:
        with pytest.raises(EngineError, match="closed while requests were running"):
            await task
    with pytest.raises(EngineError, match="the engine is dead"):
        await engine.generate(start.request("r", start.sampling(3)))
