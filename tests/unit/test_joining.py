"""Whoever joins a run holds what the others hold: joins and broadcasts take turns."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlaudio.errors import WeightSyncError
from rlaudio.types import WeightVersion
from rlaudio.weights.base import Broadcast
from rlaudio.weights.joining import JoinableWeights
from tests.fake_run import Weights

START = WeightVersion(0, 0)


@dataclass
class Members:
    """Receivers by name, what each holds, and how a transport reaches them."""

    held: dict[str, WeightVersion] = field(default_factory=lambda: {"one": START})
    expects_more: bool = False
    fails: list[str] = field(default_factory=list)  # once for every time it is named here
    sent: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)
    at_work: int = 0

    @property
    def handles(self) -> dict[str, str]:
        return {name: name for name in self.held}

    @property
    def num_alive(self) -> int:
        return len(self.held)

    def evict(self, name: str, *, reason: str) -> None:
        del self.held[name]

    async def broadcast(self, snapshot: Any, *, to: Any = None) -> Broadcast:
        names = tuple((to or self).handles)
        self.sent.append((snapshot.version.number, names))
        self.at_work += 1
        assert self.at_work == 1, "two at once would meet in one process group"
        await asyncio.sleep(0.01)
        self.at_work -= 1
        for name in names:
            if name in self.fails:
                self.fails.remove(name)
                (to or self).evict(name, reason="it refused")
                raise WeightSyncError(f"{name} refused")
            self.held[name] = snapshot.version
        if not names:
            raise WeightSyncError("there are none")
        return Broadcast(snapshot.version, names, {})


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaudio.weights.joining.BETWEEN_ATTEMPTS_S", 0.0)


def version(number: int) -> Weights:
    return Weights(WeightVersion(0, number))


def joinable(members: Members) -> JoinableWeights:
    return JoinableWeights(members, receivers=members, version=START)


async def test_before_the_first_broadcast_nothing_needs_to_be_sent() -> None:
    members = Members()
    taken: list[str] = []
    assert await joinable(members).join("two", "two", take_in=lambda: taken.append("two")) == START
    assert (taken, members.sent) == (["two"], [])


async def test_the_last_weights_go_to_the_one_that_joins_and_to_nobody_else() -> None:
    members = Members()
    weights = joinable(members)
    await weights.broadcast(version(3))
    assert await weights.join("two", "two", take_in=lambda: None) == WeightVersion(0, 3)
    assert members.sent == [(3, ("one",)), (3, ("two",))]
    assert set(members.held.values()) == {WeightVersion(0, 3)}


async def test_a_join_during_a_broadcast_waits_for_it_and_a_broadcast_for_a_join() -> None:
    members = Members()
    weights = joinable(members)
    seen: list[set[WeightVersion]] = []
    await asyncio.gather(
        weights.broadcast(version(1)),
        weights.join("two", "two", take_in=lambda: seen.append(set(members.held.values()))),
        weights.broadcast(version(2)),
        weights.join("three", "three", take_in=lambda: seen.append(set(members.held.values()))),
    )
    assert seen == [{WeightVersion(0, 1)}, {WeightVersion(0, 2)}]
    assert set(members.held.values()) == {WeightVersion(0, 2)}


async def test_a_join_that_fails_takes_nobody_in_and_is_tried_again() -> None:
    members = Members(fails=["two", "two"])
    weights = joinable(members)
    await weights.broadcast(version(1))
    taken: list[str] = []
    await weights.join("two", "two", take_in=lambda: taken.append("two"))
    assert taken == ["two"] and len(members.sent) == 4
    members.fails = ["three"] * 3
    with pytest.raises(WeightSyncError, match="three refused"):
        await weights.join("three", "three", take_in=lambda: taken.append("three"))
    assert taken == ["two"]


async def test_a_broadcast_to_nobody_is_no_end_while_somebody_comes_and_who_comes_holds_it() -> None:
    members = Members(held={}, expects_more=True)
    weights = joinable(members)
    outcome = await weights.broadcast(version(5))
    assert outcome.live == () and outcome.evicted, "it says so"
    await weights.join("two", "two", take_in=lambda: None)
    assert members.held == {"two": WeightVersion(0, 5)}
    members.held.clear()
    members.expects_more = False
    with pytest.raises(WeightSyncError, match="there are none"):
        await weights.broadcast(version(6))


async def test_a_broadcast_that_fails_with_engines_alive_ends_the_run() -> None:
    """That is a learner rank's doing: somebody else who comes would not mend it."""
    members = Members(held={"one": START, "two": START}, expects_more=True, fails=["one"])
    with pytest.raises(WeightSyncError, match="one refused"):
        await joinable(members).broadcast(version(1))
