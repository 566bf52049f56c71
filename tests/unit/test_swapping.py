"""When a swap may begin, who waits for it, and how a turn goes on that it cut: without an engine."""

import asyncio
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaudio.engines.base import GenerationRequest, Sampling
from rlaudio.engines.gate import SwapGate
from rlaudio.engines.swapping import Piece, SwapMode, SwapPolicy, joined, rest_of
from rlaudio.errors import ConfigError, EngineDeadError
from rlaudio.types import VersionSpan, WeightVersion

MODES: tuple[SwapMode, ...] = get_args(SwapMode)
OLD, NEW = WeightVersion(1, 4), WeightVersion(1, 5)

pytestmark = pytest.mark.timeout(60)


def request(*, budget: int, seed: int | None = 7) -> GenerationRequest:
    return GenerationRequest("r", np.arange(5, dtype=np.int32), Sampling(max_new_tokens=budget, seed=seed))


def piece(ids: list[int], *spans: VersionSpan) -> Piece:
    return Piece(np.array(ids, np.int32), -np.array(ids, np.float32), spans)


# ---- a turn that was cut --------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=5), st.none() | st.integers(0, 2**63 - 1))
def test_pieces_join_to_what_they_were_cut_from(lengths: list[list[int]], seed: int | None) -> None:
    budget = sum(len(ids) for ids in lengths) + 1
    whole, pieces = request(budget=budget, seed=seed), []
    for number, ids in enumerate(lengths):
        rest = rest_of(whole, pieces)
        taken = sum(len(one.response_ids) for one in pieces)
        assert rest.prompt_ids.tolist() == [*range(5), *(i for one in lengths[:number] for i in one)]
        assert rest.sampling.max_new_tokens == budget - taken
        version = WeightVersion(0, number // 2)  # a cut by an update to the same version leaves one span
        pieces.append(piece(ids, *([VersionSpan(version, 0, len(ids))] if ids else [])))
    turn = joined(pieces, finish_reason="stop", generate_s=2.0)
    assert turn.response_ids.tolist() == [i for ids in lengths for i in ids]
    assert turn.logprobs.tolist() == [-i for ids in lengths for i in ids]
    told = [span.version.number for span in turn.version_spans for _ in range(span.start, span.end)]
    assert told == [number // 2 for number, ids in enumerate(lengths) for _ in ids]
    edges = [0, *(span.end for span in turn.version_spans)]
    assert [span.start for span in turn.version_spans] == edges[:-1]
    numbers = [span.version.number for span in turn.version_spans]
    assert len(set(numbers)) == len(numbers)
    assert turn.generate_s == 2.0


def test_a_rest_has_a_seed_of_its_own_that_depends_on_the_seed_and_the_cut_alone() -> None:
    def seed_after(*lengths: int, seed: int | None = 7) -> int | None:
        pieces = [piece([1] * length, VersionSpan(OLD, 0, length)) for length in lengths]
        return rest_of(request(budget=50, seed=seed), pieces).sampling.seed

    assert seed_after(0) == 7, "what was not cut is not touched"
    assert seed_after(3, 4) == seed_after(7)
    assert len({7, seed_after(3), seed_after(4), seed_after(3, seed=8)}) == 4
    assert seed_after(3, seed=None) is None


def test_a_mixed_span_is_not_joined_with_its_neighbour() -> None:
    spans = (VersionSpan(NEW, 0, 2), VersionSpan(NEW, 2, 3, mixed=True))
    assert joined([piece([1, 2, 3], *spans)], finish_reason="stop", generate_s=0.0).version_spans == spans


# ---- the policy -----------------------------------------------------------------------------------------------------


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sync\.swap is 'now'"):
        SwapPolicy("now")  # type: ignore[arg-type]
    for mode in MODES[1:]:
        with pytest.raises(ConfigError, match=rf"sync\.keep_kv_cache.*{mode} leaves no request"):
            SwapPolicy(mode, keep_kv_cache=True)


def test_kept_caches_are_named_by_the_swap_and_others_are_shared() -> None:
    assert SwapPolicy().salt(num_swaps=0) is SwapPolicy().salt(num_swaps=1) is None
    kept = SwapPolicy(keep_kv_cache=True)
    assert kept.salt(num_swaps=0) != kept.salt(num_swaps=1)


def test_a_kept_cache_is_not_for_requests_without_a_token() -> None:
    kept = SwapPolicy("in_flight", keep_kv_cache=True)
    assert [kept.cuts(num_sampled=number) for number in (0, 1, 9)] == [True, False, False]
    assert [SwapPolicy("abort").cuts(num_sampled=number) for number in (0, 9)] == [True, True]
    assert [SwapPolicy("in_flight").cuts(num_sampled=number) for number in (0, 9)] == [False, False]


def test_an_error_names_what_still_ran_and_counts_the_rest() -> None:
    turns = [f"t{i}" for i in range(5)]
    error = SwapPolicy("dialogue_ends").too_late(NEW, deadline_s=2.0, current=OLD, turns=turns, dialogues=["d"])
    assert str(error).endswith("still running: 1 dialogue (d); 5 turns (t0, t1, t2 and 2 more)")
    at_turns = SwapPolicy("turn_ends").too_late(NEW, deadline_s=2.0, current=OLD, turns=["t"], dialogues=["d"])
    assert str(at_turns).endswith("still running: 1 turn (t)"), "nothing waits for the dialogue"
    assert "1.5 were not live within 2.0 s; the engine has 1.4" in str(error)


# ---- the gate -------------------------------------------------------------------------------------------------------


async def settled(condition: Callable[[], bool] = lambda: True) -> None:
    for _ in range(20):
        await asyncio.sleep(0)
    assert condition()


class Actors:
    """Turns, dialogues and swaps that go on when they are told to, and write down when they were let in."""

    def __init__(self, mode: SwapMode) -> None:
        self.gate = SwapGate(SwapPolicy(mode))
        self.inside: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, kind: str, name: str) -> None:
        self._ends[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._run(kind, name))
        await settled()

    async def _run(self, kind: str, name: str) -> None:
        entry = {"turn": self.gate.turn, "dialogue": self.gate.dialogue, "swap": lambda _: self.gate.swap()}[kind]
        async with entry(name):
            self.inside.append(name)
            await self._ends[name].wait()
        self.inside.remove(name)

    async def go(self, name: str) -> None:
        self._ends[name].set()
        await self._tasks.pop(name)
        await settled()

    async def cancel(self, name: str) -> None:
        self._tasks[name].cancel()
        with pytest.raises(asyncio.CancelledError):
            await self._tasks.pop(name)
        await settled()

    async def outcome(self, name: str) -> None:
        await self._tasks.pop(name)

    async def __aenter__(self) -> "Actors":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


@pytest.mark.parametrize("mode", ["in_flight", "abort"])
async def test_a_swap_that_stops_turns_waits_for_nobody_and_nobody_waits_at_the_gate(mode: SwapMode) -> None:
    async with Actors(mode) as actors:
        for kind, name in (("dialogue", "d"), ("turn", "t"), ("swap", "s"), ("turn", "late"), ("dialogue", "later")):
            await actors.come(kind, name)
        assert actors.inside == ["d", "t", "s", "late", "later"]
        for name in ("s", "t", "d", "late", "later"):
            await actors.go(name)


async def test_at_turn_ends_new_turns_wait_and_dialogues_do_not() -> None:
    async with Actors("turn_ends") as actors:
        for kind, name in (("turn", "t"), ("swap", "s"), ("turn", "late"), ("dialogue", "d"), ("swap", "s2")):
            await actors.come(kind, name)
        assert actors.inside == ["t", "d"]
        await actors.go("t")
        assert actors.inside == ["d", "s"]
        await actors.go("s")
        assert actors.inside == ["d", "s2"], "the second swap comes before those who wait"
        await actors.go("s2")
        assert actors.inside == ["d", "late"]


async def test_at_dialogue_ends_turns_of_dialogues_go_in_and_new_dialogues_wait() -> None:
    async with Actors("dialogue_ends") as actors:
        for kind, name in (("dialogue", "d"), ("swap", "s"), ("turn", "d1"), ("dialogue", "late")):
            await actors.come(kind, name)
        assert actors.inside == ["d", "d1"]
        await actors.go("d1")
        await actors.come("turn", "d2")
        assert actors.inside == ["d", "d2"], "or the dialogue would never end"
        await actors.go("d2")
        await actors.go("d")
        assert actors.inside == ["s"]
        await actors.come("turn", "stray")
        assert actors.inside == ["s"]
        await actors.go("s")
        assert actors.inside == ["late", "stray"]


@pytest.mark.parametrize("mode", ["turn_ends", "dialogue_ends"])
async def test_a_swap_that_gives_up_lets_everyone_in(mode: SwapMode) -> None:
    async with Actors(mode) as actors:
        kind = "turn" if mode == "turn_ends" else "dialogue"
        for what, name in ((kind, "a"), ("swap", "s"), (kind, "b"), (kind, "c")):
            await actors.come(what, name)
        assert actors.inside == ["a"]
        await actors.cancel("b")
        await actors.cancel("s")
        assert actors.inside == ["a", "c"]
        for name in ("a", "c"):
            await actors.go(name)
        await actors.come("swap", "again")
        assert actors.inside == ["again"], "nobody who left is still counted"
        await actors.go("again")
        assert actors.gate.num_waiting == 0


@pytest.mark.parametrize("mode", ["turn_ends", "dialogue_ends"])
async def test_a_broken_engine_tells_everyone_who_waits_and_who_comes(mode: SwapMode) -> None:
    async with Actors(mode) as actors:
        kind = "turn" if mode == "turn_ends" else "dialogue"
        for what, name in ((kind, "a"), ("swap", "s"), ("swap", "s2"), (kind, "b")):
            await actors.come(what, name)
        actors.gate.break_down(EngineDeadError("the device is gone"))
        await actors.come(kind, "late")
        for name in ("s", "s2", "b", "late"):
            with pytest.raises(EngineDeadError, match="the device is gone"):
                await actors.outcome(name)
        await actors.go("a")
