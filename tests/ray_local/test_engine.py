"""One engine protocol, both engines: what goes in comes out, alone or in a crowd; one request's trouble stays its own.

How they swap weights is in `test_engine_swaps.py`, how the engine in process dies in `test_engine_deaths.py`.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rlaudio.engines.base import Sampling
from rlaudio.engines.inprocess import InProcessEngine
from rlaudio.errors import EngineError
from rlaudio.types import VersionSpan
from tests.ray_local.engine_world import BOUND_NATS, MAX_LEN, OLD, World, Worlds, same, until

# vLLM 0.32 and its dependencies warn on import; not ours to fix.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="session"),
]

CLIPS = [(), (1_700,), (9_000,), (16_000, 1_201), (31_999,), (16_160, 16_161, 16_000)]


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> World:
    return worlds.start


@pytest.fixture(scope="module")
def in_process(world: World) -> Iterator[InProcessEngine]:
    engine = InProcessEngine(world.settings(), version=OLD)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module", params=["in_process", "async_llm"])
def engine(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


async def test_seeded_requests_are_bit_equal_alone_batched_and_reordered(world: World, engine: Any) -> None:
    requests = [
        world.request(f"r{i}", world.sampling(24, seed=i), about=i % 4, clip_lengths=CLIPS[i % len(CLIPS)])
        for i in range(24)
    ]
    together = await asyncio.gather(*(engine.generate(request) for request in requests))
    reordered = await asyncio.gather(*(engine.generate(request) for request in reversed(requests)))
    alone = [await engine.generate(request) for request in requests[:6]]
    assert all(same(a, b) for a, b in zip(together, reversed(reordered), strict=True))
    assert all(same(a, b) for a, b in zip(together, alone, strict=False))
    assert len({tuple(generation.response_ids) for generation in together}) > 12, "seeds make no difference"


@pytest.mark.parametrize("temperature", [0.7, 1.0])
async def test_logprobs_are_of_the_distribution_that_was_sampled(world: World, engine: Any, temperature: float) -> None:
    sampling = world.sampling(20, seed=4, temperature=temperature)
    requests = [world.request(f"r{i}", sampling, clip_lengths=lengths) for i, lengths in enumerate(CLIPS)]
    for request, generation in zip(
        requests, await asyncio.gather(*(engine.generate(request) for request in requests)), strict=True
    ):
        assert len(generation.response_ids) == len(generation.logprobs) == 20
        expected = world.logprobs(request, generation.response_ids)
        np.testing.assert_allclose(generation.logprobs, expected, atol=BOUND_NATS)


async def test_banned_ids_are_never_sampled_whatever_the_neighbours_may(world: World, engine: Any) -> None:
    vocabulary = world.family.config.text_config.vocab_size
    allowed = [{20 + i % 3, 30 + i % 5} for i in range(12)]
    requests = []
    for i, pair in enumerate(allowed):
        # Ids past the vocabulary are harmless; an empty ban (the last) is a request of its own kind.
        banned = tuple(set(range(vocabulary + 40)) - pair) if i < 11 else ()
        sampling = Sampling(max_new_tokens=10 + 2 * i, temperature=2.0, seed=i, banned_token_ids=banned)
        requests.append(world.request(f"r{i}", sampling, about=i, clip_lengths=(2_000,)))
    generations = await asyncio.gather(*(engine.generate(request) for request in requests))
    for pair, generation in zip(allowed[:11], generations, strict=False):
        assert set(generation.response_ids.tolist()) <= pair
        assert np.isfinite(generation.logprobs).all()
        # Two ids share the mass, so at this temperature neither is certain.
        assert (generation.logprobs < -1e-3).all()
    assert len(set(generations[11].response_ids.tolist())) > 10


async def test_only_the_given_stop_ids_end_a_turn_and_belong_to_it(world: World, engine: Any) -> None:
    long = await engine.generate(world.request("r", world.sampling(60, seed=1)))
    assert long.finish_reason == "length"
    stop = int(long.response_ids[30])
    first = int(np.flatnonzero(long.response_ids == stop)[0])
    sampling = Sampling(60, seed=1, stop_token_ids=(stop,), banned_token_ids=world.family.tokenizer.ids.banned)
    short = await engine.generate(world.request("r", sampling))
    assert short.finish_reason == "stop"
    assert short.response_ids.tolist() == long.response_ids[: first + 1].tolist()
    # Nothing else stops it, not even the id the checkpoint's configuration names as end of text.
    others = set(range(world.family.config.text_config.vocab_size)) - {world.family.tokenizer.ids.turn_end}
    forced = Sampling(max_new_tokens=5, seed=0, banned_token_ids=tuple(others))
    ends = await engine.generate(world.request("r", forced))
    assert ends.response_ids.tolist() == [world.family.tokenizer.ids.turn_end] * 5


async def test_every_token_carries_the_version_given_at_the_start(world: World, engine: Any) -> None:
    generation = await engine.generate(world.request("r", world.sampling(7)))
    assert engine.version == OLD
    assert generation.version_spans == (VersionSpan(OLD, 0, 7),)


@pytest.mark.parametrize("surplus", [-1, 1, 5])
async def test_placeholders_that_do_not_match_the_encoder_are_an_error_with_counts(
    world: World, engine: Any, surplus: int
) -> None:
    request = world.request("r", world.sampling(4), clip_lengths=(9_000, 16_000), surplus=surplus)
    sent = len(request.prompt_ids)
    with pytest.raises(EngineError, match=f"{sent} prompt ids were sent but the engine read {sent - 2 * surplus}"):
        await engine.generate(request)


async def test_a_refused_request_leaves_the_others_alone(world: World, engine: Any) -> None:
    fine = asyncio.create_task(engine.generate(world.request("fine", world.sampling(40))))
    with pytest.raises(EngineError, match="'long'.*longer than the maximum"):
        await engine.generate(world.request("long", world.sampling(4), clip_lengths=(120_000,) * 8))
    with pytest.raises(EngineError, match="'hot'.*temperature"):
        await engine.generate(world.request("hot", world.sampling(4, temperature=-1.0)))
    assert len((await fine).response_ids) == 40


async def test_cancelling_aborts_inside_the_engine(world: World, engine: Any) -> None:
    budget = MAX_LEN - 40
    tasks = [
        asyncio.create_task(engine.generate(world.request(f"r{i}", world.sampling(budget, seed=i)))) for i in range(8)
    ]
    await until(lambda: engine.num_running == 8)
    for task in tasks[1:]:
        task.cancel()
    await until(lambda: engine.num_running == 1)
    assert not tasks[0].done(), "the budget must outlast the test"
    for task in tasks[1:]:
        with pytest.raises(asyncio.CancelledError):
            await task
    # The freed id may be used again at once.
    again = asyncio.create_task(engine.generate(world.request("r1", world.sampling(budget, seed=0))))
    assert same(await tasks[0], await again)


async def test_a_request_cancelled_before_it_is_seen_never_starts(world: World, engine: Any) -> None:
    task = asyncio.create_task(engine.generate(world.request("ghost", world.sampling(200))))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await engine.generate(world.request("after", world.sampling(2)))
    assert engine.num_running == 0


async def test_whoever_is_given_up_halfway_spoils_no_clip_for_others(world: World, engine: Any) -> None:
    """Between the engine's two processes a clip is sent once; who says that it was sent must have sent it."""
    for number in range(24):
        about = 50 + number  # a clip that nobody sent before
        task = asyncio.create_task(engine.generate(world.request(f"gone{number}", world.sampling(200), about=about)))
        await asyncio.sleep(number * 0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        after = await engine.generate(world.request(f"after{number}", world.sampling(2), about=about))
        assert len(after.response_ids) == 2


async def test_whoever_is_refused_spoils_no_clip_for_others(world: World, engine: Any) -> None:
    lengths = (120_000,) * 8
    with pytest.raises(EngineError, match="'long'.*longer than the maximum"):
        await engine.generate(world.request("long", world.sampling(4), about=90, clip_lengths=lengths))
    after = await engine.generate(world.request("short", world.sampling(2), about=90, clip_lengths=lengths[:1]))
    assert len(after.response_ids) == 2


# ---- what only the engine in process promises -----------------------------------------------------------------------


async def test_an_id_in_flight_cannot_be_used_twice(world: World, in_process: InProcessEngine) -> None:
    first = asyncio.create_task(in_process.generate(world.request("twin", world.sampling(30, seed=1))))
    await asyncio.sleep(0)
    with pytest.raises(EngineError, match="'twin' is in flight"):
        await in_process.generate(world.request("twin", world.sampling(30, seed=2)))
    alone = await in_process.generate(world.request("single", world.sampling(30, seed=1)))
    assert same(await first, alone)


async def test_one_engine_serves_several_event_loops(world: World, in_process: InProcessEngine) -> None:
    request = world.request("here", world.sampling(12, seed=9))
    elsewhere = world.request("there", world.sampling(12, seed=9))
    here, there = await asyncio.gather(
        in_process.generate(request), asyncio.to_thread(lambda: asyncio.run(in_process.generate(elsewhere)))
    )
    assert same(here, there)
