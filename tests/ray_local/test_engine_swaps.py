"""Weights swapped under running requests, in every mode, by both engines: afterwards they are a fresh engine.

A fresh engine is one that was started from the new weights. Greedy turns are compared with it token by token: what a
turn says behind the swap is what the fresh engine says behind the same prefix.
"""

import asyncio
import time
import zlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from rlaudio.engines.base import Engine, Generation, GenerationRequest, Sampling, SwapReport, WeightUpdate
from rlaudio.engines.inprocess import InProcessEngine
from rlaudio.engines.swapping import Piece, SwapPolicy, rest_of
from rlaudio.errors import WeightSyncError
from rlaudio.types import VersionSpan, WeightVersion
from tests.ray_local.engine_world import (
    BOUND_NATS,
    MAX_NUM_SEQS,
    NEW,
    OLD,
    World,
    Worlds,
    assert_equal,
    greedy,
    until,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="session"),
]

IN_FLIGHT, TURN_ENDS, DIALOGUE_ENDS, ABORT = map(SwapPolicy, ("in_flight", "turn_ends", "dialogue_ends", "abort"))
KEEP = SwapPolicy("in_flight", keep_kv_cache=True)
POLICIES = pytest.mark.parametrize(
    "policy", [IN_FLIGHT, TURN_ENDS, DIALOGUE_ENDS, ABORT, KEEP], ids=lambda p: "keep" if p.keep_kv_cache else p.mode
)
NUM_FLIGHTS = 6
BUDGET = 130
LONG = 440  # as long as the window allows
NUM_TRIES = 4
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def world(worlds: Worlds) -> World:
    return worlds.start


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def in_process(worlds: Worlds) -> AsyncIterator[InProcessEngine]:
    engine = InProcessEngine(worlds.start.settings(), version=OLD)
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def fresh(worlds: Worlds, in_process: InProcessEngine) -> AsyncIterator[InProcessEngine]:
    """Started from the new weights. It shares vLLM's globals with the other: they run by turns, and end together."""
    engine = InProcessEngine(worlds.target.settings(), version=NEW)
    yield engine
    await engine.close()


@pytest.fixture(scope="module", params=["in_process", "async_llm"])
def shared_engine(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest_asyncio.fixture(loop_scope="session")
async def engine(shared_engine: Any, world: World) -> AsyncIterator[Any]:
    """With the old weights, before and after."""
    yield shared_engine
    assert shared_engine.num_running == shared_engine.num_waiting == 0, "a test left something behind"
    shared_engine.swap = IN_FLIGHT
    await shared_engine.update_weights(world.update(version=OLD), deadline_s=DEADLINE_S)


def flight(world: World, name: str, number: int, sampling: Sampling) -> GenerationRequest:
    """Long enough that the prefix cache covers the first clip's placeholders."""
    return world.request(name, sampling, about=number % 3, clip_lengths=(9000, 30_000))


async def take_off(engine: Engine, requests: list[GenerationRequest]) -> list[asyncio.Task[Generation]]:
    """Return when each of them has tokens, or as many as the engine lets in at once."""
    short = replace(requests[0], request_id="pilot", sampling=replace(requests[0].sampling, max_new_tokens=6))
    tasks = [asyncio.create_task(engine.generate(request)) for request in requests[: MAX_NUM_SEQS - 1]]
    # vLLM starts them in order, so they are some tokens on when the last one has six.
    pilot = asyncio.create_task(engine.generate(short))
    await asyncio.sleep(0)
    tasks += [asyncio.create_task(engine.generate(request)) for request in requests[MAX_NUM_SEQS - 1 :]]
    await pilot
    return tasks


async def warm_up(engine: Engine, world: World) -> None:
    """Whoever brought a clip has gone: every flight finds it in the prefix cache, and must encode it after the swap."""
    for number in range(3):
        await engine.generate(flight(world, f"gone{number}", number, world.greedy(1)))


async def swapped_in_flight(
    engine: Any, worlds: Worlds, requests: list[GenerationRequest]
) -> tuple[list[Generation], SwapReport]:
    """Swap while the requests are somewhere in the middle.

    Nothing stops them while this process is not let run, least of all where the engine is another one: a swap that
    came too late to matter is tried again.
    """
    for _ in range(NUM_TRIES):
        await warm_up(engine, worlds.start)
        async with engine.dialogue("the flights"):
            flights = await take_off(engine, requests)
            swap = asyncio.create_task(engine.update_weights(worlds.target.update(), deadline_s=DEADLINE_S))
            if engine.swap.mode in ("turn_ends", "dialogue_ends"):
                await until(lambda: engine.num_waiting == 1)
            else:
                await swap
            in_time = not any(task.done() for task in flights)
            generations = [await task for task in flights]
        report = await swap
        if in_time:
            assert report.paused_s > 0
            assert report.waited_s >= 0
            return generations, report
        await engine.update_weights(worlds.start.update(version=OLD), deadline_s=DEADLINE_S)
    pytest.fail(f"{NUM_TRIES} swaps came too late to matter")


def versions(generation: Generation) -> list[WeightVersion]:
    return [span.version for span in generation.version_spans]


async def assert_tokens_belong_to_their_weights(
    fresh: Engine, world: World, requests: list[GenerationRequest], generations: list[Generation]
) -> None:
    """Those of the old span are what torch says with the old weights, those of the new one the fresh engine's."""
    behind = []
    for request, generation in zip(requests, generations, strict=True):
        old, *new = generation.version_spans
        assert (old.start, old.version) == (0, OLD)
        assert not old.mixed
        expected = world.logprobs(request, generation.response_ids[: old.end])
        np.testing.assert_allclose(generation.logprobs[: old.end], expected, atol=BOUND_NATS)
        if new:
            behind.append((behind_span(request, generation, old), part(generation, old.end)))
    again = await asyncio.gather(*(fresh.generate(request) for request, _ in behind))
    assert_equal([rest for _, rest in behind], list(again))


def behind_span(request: GenerationRequest, generation: Generation, span: VersionSpan) -> GenerationRequest:
    kept = slice(span.start, span.end)
    piece = Piece(generation.response_ids[kept], generation.logprobs[kept], (span,))
    return rest_of(request, [piece])


def part(generation: Generation, start: int) -> Generation:
    return replace(generation, response_ids=generation.response_ids[start:], logprobs=generation.logprobs[start:])


# ---- after a swap, in every mode ------------------------------------------------------------------------------------


@POLICIES
async def test_new_requests_are_a_fresh_engines(
    worlds: Worlds, engine: Any, fresh: InProcessEngine, policy: SwapPolicy
) -> None:
    """Although prompts, clips and encoder rows of the same names lie in every cache from before."""
    engine.swap = policy
    before = await greedy(engine, worlds.start)
    requests = [flight(worlds.start, f"f{i}", i, worlds.start.greedy(40)) for i in range(NUM_FLIGHTS)]
    await swapped_in_flight(engine, worlds, [replace(r, sampling=worlds.start.greedy(BUDGET)) for r in requests])
    assert engine.version == NEW
    after = await greedy(engine, worlds.start)
    # What the flights left in the caches behind the swap is asked for too.
    twins = await asyncio.gather(*(engine.generate(request) for request in requests))
    assert {version for generation in (*after, *twins) for version in versions(generation)} == {NEW}
    assert not any(span.mixed for generation in (*after, *twins) for span in generation.version_spans)
    assert_equal(after, await greedy(fresh, worlds.start))
    assert_equal(twins, await asyncio.gather(*(fresh.generate(request) for request in requests)))
    changed = [not np.array_equal(a.response_ids, b.response_ids) for a, b in zip(before, after, strict=True)]
    assert all(changed), "the two sets of weights must differ for this to mean anything"


@pytest.mark.parametrize("policy", [IN_FLIGHT, ABORT], ids=lambda policy: policy.mode)
async def test_a_swap_in_mid_generation_goes_on_as_a_fresh_engine(
    worlds: Worlds, engine: Any, fresh: InProcessEngine, policy: SwapPolicy
) -> None:
    engine.swap = policy
    world = worlds.start
    requests = [flight(world, f"f{i}", i, world.greedy(BUDGET)) for i in range(NUM_FLIGHTS)]
    began_s = time.monotonic()
    generations, report = await swapped_in_flight(engine, worlds, requests)
    elapsed_s = time.monotonic() - began_s
    assert report.num_running == NUM_FLIGHTS
    for generation in generations:
        assert versions(generation) == [OLD, NEW]
        assert generation.version_spans[0].end >= 6
        assert generation.version_spans[-1].end == len(generation.response_ids) == BUDGET
        assert generation.finish_reason == "length"
        assert report.paused_s < generation.generate_s <= elapsed_s
    await assert_tokens_belong_to_their_weights(fresh, world, requests, generations)


async def test_a_kept_cache_belongs_to_neither_version_and_says_so(
    worlds: Worlds, engine: Any, fresh: InProcessEngine
) -> None:
    engine.swap = KEEP
    world = worlds.start
    # More than run at once: the last ones have no token when the weights change, so they are the new version's.
    requests = [flight(world, f"f{i}", i, world.greedy(BUDGET)) for i in range(MAX_NUM_SEQS + 2)]
    generations, report = await swapped_in_flight(engine, worlds, requests)
    assert report.num_running == len(requests)
    late = [(r, g) for r, g in zip(requests, generations, strict=True) if versions(g) == [NEW]]
    assert 1 <= len(late) <= 3
    assert_equal([g for _, g in late], await asyncio.gather(*(fresh.generate(request) for request, _ in late)))
    assert not any(span.mixed for _, generation in late for span in generation.version_spans)
    cut = [(r, g) for r, g in zip(requests, generations, strict=True) if versions(g) == [OLD, NEW]][:NUM_FLIGHTS]
    assert len(cut) == NUM_FLIGHTS
    for request, generation in cut:
        old, new = generation.version_spans
        assert (old.mixed, new.mixed) == (False, True)
        expected = world.logprobs(request, generation.response_ids[: old.end])
        np.testing.assert_allclose(generation.logprobs[: old.end], expected, atol=BOUND_NATS)
        for weights in (world, worlds.target):
            alone = weights.logprobs(request, generation.response_ids)[old.end :]
            assert np.abs(alone - generation.logprobs[old.end :]).max() > 0.01, "then the setting changes nothing"


# ---- turns that a swap cut off --------------------------------------------------------------------------------------


async def test_a_resumed_turn_keeps_its_budget_and_has_a_seed_made_of_its_own_and_the_cut(
    worlds: Worlds, engine: Any, fresh: InProcessEngine
) -> None:
    engine.swap = ABORT
    world = worlds.start
    requests = [flight(world, f"f{i}", i, world.sampling(BUDGET, seed=10 + i)) for i in range(NUM_FLIGHTS)]
    generations, _ = await swapped_in_flight(engine, worlds, requests)
    rests = []
    for request, generation in zip(requests, generations, strict=True):
        assert len(generation.response_ids) == BUDGET
        old, new = generation.version_spans
        rests.append(behind_span(request, generation, old))
        assert rests[-1].sampling.max_new_tokens == new.end - new.start
        assert rests[-1].sampling.seed not in (None, request.sampling.seed)
    again = await asyncio.gather(*(fresh.generate(rest) for rest in rests))
    assert_equal(again, [part(generation, generation.version_spans[0].end) for generation in generations])


async def test_a_resumed_turn_still_ends_at_its_stop_id(worlds: Worlds, engine: Any) -> None:
    """One of about forty ids stops: some turns meet it before the cut, some behind it, some never."""
    engine.swap = ABORT
    world = worlds.start
    spoken = world.family.tokenizer.encode("w0 w1")
    stop = int(spoken[0])
    banned = tuple(i for i in range(world.family.config.text_config.vocab_size) if not stop <= i < stop + 40)
    samplings = [Sampling(BUDGET, 2.0, seed=i, stop_token_ids=(stop,), banned_token_ids=banned) for i in range(24)]
    flights = await take_off(engine, [flight(world, f"f{i}", i, one) for i, one in enumerate(samplings)])
    await engine.update_weights(worlds.target.update(), deadline_s=DEADLINE_S)
    resumed = 0
    for task in flights:
        generation = await task
        assert stop not in generation.response_ids[:-1]
        if generation.finish_reason == "stop":
            assert generation.response_ids[-1] == stop
            resumed += versions(generation) == [OLD, NEW]
        else:
            assert len(generation.response_ids) == BUDGET
    assert resumed, "no turn was cut before its stop id"


async def test_a_turn_cut_twice_is_one_turn_of_three_versions(worlds: Worlds, engine: Any) -> None:
    engine.swap = ABORT
    world = worlds.start
    requests = [flight(world, f"f{i}", i, world.greedy(LONG)) for i in range(3)]
    flights = await take_off(engine, requests)
    await engine.update_weights(worlds.target.update(), deadline_s=DEADLINE_S)
    last = WeightVersion(2, 0)
    await engine.update_weights(world.update(version=last), deadline_s=DEADLINE_S)
    assert not any(task.done() for task in flights)
    for request, generation in zip(requests, [await task for task in flights], strict=True):
        assert len(generation.response_ids) == LONG
        spans = generation.version_spans
        assert (versions(generation)[0], versions(generation)[-1]) == (OLD, last)
        assert [spans[0].start, *(s.end for s in spans)] == [0, *(s.start for s in spans[1:]), LONG]
        for weights, span in zip((world, worlds.target, world), spans, strict=False):
            if len(spans) == 3:
                expected = weights.logprobs(request, generation.response_ids)[span.start : span.end]
                np.testing.assert_allclose(generation.logprobs[span.start : span.end], expected, atol=BOUND_NATS)


# ---- waiting --------------------------------------------------------------------------------------------------------


async def test_turns_that_run_end_and_new_ones_wait_for_the_swap(
    worlds: Worlds, engine: Any, fresh: InProcessEngine
) -> None:
    engine.swap = TURN_ENDS
    world = worlds.start
    flights = await take_off(engine, [flight(world, f"f{i}", i, world.greedy(LONG)) for i in range(3)])
    # Two updates: the second follows the first before anyone is let in.
    first = asyncio.create_task(engine.update_weights(world.update(version=WeightVersion(1, 9)), deadline_s=DEADLINE_S))
    await until(lambda: engine.num_waiting == 1)
    second = asyncio.create_task(engine.update_weights(worlds.target.update(), deadline_s=DEADLINE_S))
    await until(lambda: engine.num_waiting == 2)
    late = flight(world, "late", 0, world.greedy(40))
    waits = asyncio.create_task(engine.generate(late))
    gives_up = asyncio.create_task(engine.generate(flight(world, "gives up", 1, world.greedy(40))))
    await until(lambda: engine.num_waiting == 4)
    assert engine.num_running == 3, "the flights must outlast the test"
    gives_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gives_up
    assert {version for task in flights for version in versions(await task)} == {OLD}
    reports = [await first, await second]
    assert [report.num_running for report in reports] == [0, 0]
    assert reports[0].waited_s > 0
    assert engine.version == NEW
    assert_equal([await waits], [await fresh.generate(late)])


async def test_dialogues_that_run_end_and_new_ones_wait_for_the_swap(worlds: Worlds, engine: Any) -> None:
    engine.swap = DIALOGUE_ENDS
    world = worlds.start
    said: list[tuple[str, WeightVersion]] = []
    inside, go_on = asyncio.Event(), asyncio.Event()

    async def play(name: str, *, first: bool) -> None:
        async with engine.dialogue(name):
            for turn in range(2):
                generation = await engine.generate(world.request(f"{name}{turn}", world.greedy(4)))
                said.extend((name, version) for version in versions(generation))
                if first:
                    inside.set()
                    await go_on.wait()

    running = asyncio.create_task(play("running", first=True))
    await inside.wait()
    swap = asyncio.create_task(engine.update_weights(worlds.target.update(), deadline_s=DEADLINE_S))
    await until(lambda: engine.num_waiting == 1)
    waiting = asyncio.create_task(play("waiting", first=False))
    gives_up = asyncio.create_task(play("gives up", first=False))
    await until(lambda: engine.num_waiting == 3)
    gives_up.cancel()
    assert engine.version == OLD
    go_on.set()
    await asyncio.gather(running, waiting)
    assert (await swap).num_running == 0
    assert said == [("running", OLD)] * 2 + [("waiting", NEW)] * 2


@pytest.mark.parametrize(
    ("policy", "named"),
    [(TURN_ENDS, r"turn_ends, still running: 1 turn \(slow\)"), (DIALOGUE_ENDS, r"1 dialogue \(group 3\); 1 turn")],
    ids=["turn_ends", "dialogue_ends"],
)
async def test_a_deadline_passes_while_something_runs(
    worlds: Worlds, engine: Any, policy: SwapPolicy, named: str
) -> None:
    engine.swap = policy
    world = worlds.start
    before = await greedy(engine, world)

    async def turn_of_another_dialogue() -> Generation:
        async with engine.dialogue("another"):
            generation: Generation = await engine.generate(world.request("waits", world.greedy(1)))
            return generation

    async with engine.dialogue("group 3"):
        slow = asyncio.create_task(engine.generate(flight(world, "slow", 0, world.greedy(LONG))))
        await until(lambda: engine.num_running == 1)
        swap = asyncio.create_task(engine.update_weights(worlds.target.update(), deadline_s=0.1))
        await until(lambda: engine.num_waiting == 1 or swap.done())
        waits = asyncio.create_task(turn_of_another_dialogue())
        with pytest.raises(WeightSyncError, match=rf"1\.5 were not live within 0\.1 s; the engine has 1\.4.*{named}"):
            await swap
        # Nothing was changed, and nobody is kept waiting for what still runs.
        assert versions(await waits) == [OLD]
        assert not slow.done()
    assert versions(await slow) == [OLD]
    assert_equal(await greedy(engine, world), before)
    assert (engine.version, engine.num_waiting) == (OLD, 0)


# ---- updates that cannot be loaded ----------------------------------------------------------------------------------


def damaged(update: WeightUpdate, kind: str) -> tuple[WeightUpdate, str]:
    """One way in which an update can be wrong, and what its error must name."""
    tensors, dtypes, checksums = dict(update.tensors), dict(update.dtypes), dict(update.checksums)
    norm = "model.norm.weight"
    match kind:
        case "unknown name":
            tensors["model.extra.weight"] = tensors[norm]
            dtypes["model.extra.weight"], checksums["model.extra.weight"] = "float32", checksums[norm]
            culprit = "model.extra.weight"
        case "shape":
            culprit = norm
            tensors[norm] = tensors[norm][:-1].copy()
            checksums[norm] = zlib.crc32(tensors[norm].data)
        case "checksum":
            culprit = "model.layers.2.self_attn.o_proj.weight"
            tensors[culprit] = tensors[culprit].copy()
            tensors[culprit][0, 0] += 1.0
        case _:
            culprit = kind
            del tensors[kind]
    return WeightUpdate(update.version, tensors, dtypes, checksums), culprit


WRONG = [
    "unknown name",
    "shape",
    "checksum",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.v_proj.bias",
]


@pytest.mark.parametrize("policy", [IN_FLIGHT, ABORT], ids=lambda policy: policy.mode)
async def test_wrong_updates_change_nothing_and_name_the_tensor(
    worlds: Worlds, engine: Any, policy: SwapPolicy
) -> None:
    engine.swap = policy
    world = worlds.start
    before = await greedy(engine, world)
    (running,) = await take_off(engine, [flight(world, "runs", 0, world.greedy(BUDGET))])
    for kind in WRONG:
        wrong, culprit = damaged(worlds.target.update(), kind)
        with pytest.raises(WeightSyncError, match=f"'{culprit}'"):
            await engine.update_weights(wrong, deadline_s=30.0)
        assert engine.version == OLD
    assert versions(await running) == [OLD]
    assert_equal(await greedy(engine, world), before)
    # A deadline that cannot be met: nothing is swapped behind the caller's back either.
    with pytest.raises(WeightSyncError, match=r"1\.5 were not live within 0\.0 s; the engine has 1\.4"):
        await engine.update_weights(worlds.target.update(), deadline_s=0.0)
    assert_equal(await greedy(engine, world), before)
    # After all that a right one still works, in half the bytes, and alone for some whole layers.
    await engine.update_weights(worlds.target.update(wire_dtype="bfloat16"), deadline_s=30.0)
    assert engine.version == NEW
    after = await greedy(engine, world)
    assert any(not np.array_equal(a.response_ids, b.response_ids) for a, b in zip(before, after, strict=True))
