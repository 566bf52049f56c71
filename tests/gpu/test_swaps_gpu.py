"""A swap between two tokens on a GPU: what runs goes on as a fresh engine of the new weights would.

The same flights as in `tests/ray_local/test_engine_swaps.py`, whose helpers they are, so that CPUs exercise them. Here
rounding depends on what else is in a batch: ids may part where two are equally likely, log-probabilities may not.
"""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlaudio.engines.async_llm import AsyncLLMEngine
from rlaudio.engines.base import Generation
from rlaudio.engines.inprocess import InProcessEngine
from rlaudio.engines.settings import EngineSettings
from rlaudio.engines.swapping import SwapPolicy
from tests.ray_local.engine_world import NEW, OLD, World, Worlds
from tests.ray_local.test_engine_swaps import (
    BUDGET,
    NUM_FLIGHTS,
    behind_span,
    flight,
    part,
    swapped_in_flight,
    versions,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: torch.cuda.is_available() is False"),
]

BOUND_NATS = 2e-3


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds.create(tmp_path_factory.mktemp("worlds"))


def on_gpu(world: World) -> EngineSettings:
    return replace(world.settings(), device="cuda", kv_cache_mb=256)


@pytest.mark.parametrize("kind", [InProcessEngine, AsyncLLMEngine])
@pytest.mark.parametrize("policy", [SwapPolicy("in_flight"), SwapPolicy("abort")], ids=lambda policy: policy.mode)
async def test_a_swap_in_mid_generation_goes_on_as_a_fresh_engine(
    worlds: Worlds, policy: SwapPolicy, kind: Any
) -> None:
    world = worlds.start
    requests = [flight(world, f"f{i}", i, world.greedy(BUDGET)) for i in range(NUM_FLIGHTS)]
    engine = await asyncio.to_thread(kind, on_gpu(world), version=OLD, swap=policy)
    try:
        generations, report = await swapped_in_flight(engine, worlds, requests)
    finally:
        await engine.close()
    print(kind.__name__, policy.mode, report)
    behind = []
    for request, generation in zip(requests, generations, strict=True):
        assert versions(generation) == [OLD, NEW]
        old = generation.version_spans[0]
        for weights, tokens in ((world, slice(0, old.end)), (worlds.target, slice(old.end, None))):
            expected = weights.logprobs(request, generation.response_ids)[tokens]
            np.testing.assert_allclose(generation.logprobs[tokens], expected, atol=BOUND_NATS)
        behind.append((behind_span(request, generation, old), part(generation, old.end)))

    fresh = await asyncio.to_thread(kind, on_gpu(worlds.target), version=NEW)
    try:
        again = await asyncio.gather(*(fresh.generate(rest) for rest, _ in behind))
    finally:
        await fresh.close()
    for found, (_, said) in zip(again, behind, strict=True):
        assert_like(said, found)


def assert_like(one: Generation, other: Generation) -> None:
    """Equal up to where two ids are equally likely, if there is such a place."""
    differs = np.flatnonzero(one.response_ids != other.response_ids)
    end = 1 + int(differs[0]) if len(differs) else len(one.response_ids)
    np.testing.assert_allclose(one.logprobs[:end], other.logprobs[:end], atol=BOUND_NATS)
