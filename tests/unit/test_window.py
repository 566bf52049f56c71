"""The window's promises: bounded age, admission order, one end per ticket, and no endless spinning on drops."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaudio.config import AlgorithmSettings
from rlaudio.config_checks import value_problems
from rlaudio.errors import StalenessError, StarvedError
from rlaudio.experience.window import TOO_OLD, StalenessWindow, Ticket
from rlaudio.types import WeightVersion


@dataclass(frozen=True, slots=True)
class Played:
    number: int
    incarnation: int = 0

    @property
    def oldest_version(self) -> WeightVersion:
        return WeightVersion(self.incarnation, self.number)


def make(
    max_staleness: int = 1,
    groups_per_step: int = 2,
    max_dropped: int = 50,
    *,
    look_ahead: int = 0,
    too_old: str = "wait",
    dropped: Callable[[Ticket, str], None] = lambda ticket, reason: None,
) -> StalenessWindow[Played]:
    settings = AlgorithmSettings(
        max_staleness=max_staleness,
        groups_per_step=groups_per_step,
        max_dropped_in_a_row=max_dropped,
        look_ahead=look_ahead,
        too_old=too_old,
    )
    return StalenessWindow(settings, dropped=dropped)


async def admitted(window: StalenessWindow[Played]) -> Ticket:
    """The next number takes a slot, as soon as one is free."""
    await window.slot()
    return window.admit(window.stats().admitted)


async def take(window: StalenessWindow[Played], *, number: int = 0) -> list[int]:
    """Numbers of the groups taken to train version `number`."""
    return [ticket.group for ticket, _ in await window.take(consumed_by=WeightVersion(0, number))]


@settings(max_examples=100, deadline=None)
@given(
    staleness=st.integers(0, 4),
    per_step=st.integers(1, 5),
    drop_share=st.floats(0, 0.6),
    seed=st.integers(0, 10_000),
)
def test_no_taken_group_is_older_than_the_bound(staleness: int, per_step: int, drop_share: float, seed: int) -> None:
    """Whatever the order of settling, dropping and publishing: age at consumption <= max_staleness."""
    ages, taken = asyncio.run(_run(staleness, per_step, drop_share, seed))
    assert max(ages) <= staleness
    assert taken == sorted(taken)


async def _run(staleness: int, per_step: int, drop_share: float, seed: int) -> tuple[list[int], list[int]]:
    rng = random.Random(seed)
    window = make(staleness, per_step, 10_000)
    live = trained = 0
    ages: list[int] = []
    order: list[int] = []

    async def jitter() -> None:
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)

    async def play(ticket: Ticket) -> None:
        version = live  # the oldest token of a group is sampled right after admission
        await jitter()
        if rng.random() < drop_share:
            await window.drop(ticket, reason="no")
        else:
            await window.settle(ticket, Played(version))

    async def produce(tasks: asyncio.TaskGroup) -> None:
        while True:
            tasks.create_task(play(await admitted(window)))

    async def publish(version: int, tickets: list[Ticket]) -> None:
        nonlocal live
        await jitter()
        live = version
        window.release(tickets)

    async with asyncio.TaskGroup() as tasks:
        producer = tasks.create_task(produce(tasks))
        publishing: asyncio.Task[None] | None = None
        for _ in range(8):
            batch = await window.take(consumed_by=WeightVersion(0, trained))
            ages.extend(trained - played.number for _, played in batch)
            order.extend(ticket.group for ticket, _ in batch)
            await jitter()
            if publishing is not None:
                await publishing
            trained += 1
            publishing = tasks.create_task(publish(trained, [ticket for ticket, _ in batch]))
        assert publishing is not None
        await publishing
        producer.cancel()
    return ages, order


async def test_staleness_zero_admits_nothing_until_the_weights_are_live() -> None:
    window = make(0, 2)
    first, second = await admitted(window), await admitted(window)
    await window.settle(second, Played(0))
    await window.settle(first, Played(0))
    assert await take(window) == [0, 1]
    waiting = asyncio.create_task(admitted(window))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    window.release([first, second])
    assert (await asyncio.wait_for(waiting, 1)).group == 2


async def test_a_dropped_group_frees_its_slot_and_leaves_the_line() -> None:
    told: list[tuple[Ticket, str]] = []
    window = make(0, 2, dropped=lambda ticket, reason: told.append((ticket, reason)))
    first, second = await admitted(window), await admitted(window)
    await window.drop(first, reason="bad")
    third = await asyncio.wait_for(admitted(window), 1)
    await window.settle(second, Played(0))
    await window.settle(third, Played(0))
    assert await take(window) == [1, 2]
    stats = window.stats()
    assert (stats.admitted, stats.taken, stats.waiting, stats.ready) == (3, 2, 0, 0), "a dropped group was not trained"
    assert stats.dropped == {"bad": 1} and told == [(first, "bad")]


async def test_a_ticket_ends_once() -> None:
    window = make()
    ticket = await admitted(window)
    await window.settle(ticket, Played(0))
    with pytest.raises(ValueError, match="group 0 is not waiting"):
        await window.settle(ticket, Played(0))
    with pytest.raises(ValueError, match="group 0 is not waiting"):
        await window.drop(ticket, reason="again")
    with pytest.raises(ValueError, match="group 0 holds no slot"):
        window.release([ticket])


async def test_a_batch_is_released_once() -> None:
    window = make(0, 1)
    ticket = await admitted(window)
    await window.settle(ticket, Played(0))
    await take(window)
    window.release([ticket])
    with pytest.raises(ValueError, match="group 0 holds no slot"):
        window.release([ticket])


async def test_a_batch_that_is_lost_counts_as_dropped() -> None:
    told: list[str] = []
    window = make(0, 1, dropped=lambda ticket, reason: told.append(reason))
    ticket = await admitted(window)
    await window.settle(ticket, Played(0))
    await take(window)
    assert window.stats().taken == 1
    window.lose([ticket], reason="lost")
    waiting = asyncio.create_task(admitted(window))
    await asyncio.sleep(0.01)
    assert not waiting.done(), "its slot is held until weights that have not seen it are live"
    stats = window.stats()
    assert (stats.admitted, stats.taken, stats.dropped, told) == (1, 0, {"lost": 1}, ["lost"])
    window.release([ticket])
    assert (await asyncio.wait_for(waiting, 1)).group == 1


async def test_nothing_but_drops_is_an_error_that_names_the_reason() -> None:
    window = make(1, 2, max_dropped=3)
    taking = asyncio.create_task(take(window))
    for _ in range(3):
        await window.drop(await admitted(window), reason="JudgeError", detail="judge is down")
    assert window.stats().dropped == {"JudgeError": 3}
    with pytest.raises(StarvedError, match="3 groups in a row.*JudgeError: judge is down"):
        await asyncio.wait_for(taking, 1)


async def test_a_slow_group_is_overtaken_so_often_and_then_waited_for() -> None:
    window = make(3, 2, look_ahead=3)
    tickets = [await admitted(window) for _ in range(8)]
    for ticket in tickets[1:]:
        await window.settle(ticket, Played(0))
    assert await take(window) == [1, 2]
    assert window.stats().overtaken == 2
    taking = asyncio.create_task(take(window, number=1))  # 3 may still overtake group 0, 4 may not
    await asyncio.sleep(0.01)
    assert not taking.done()
    await window.settle(tickets[0], Played(0))
    assert await asyncio.wait_for(taking, 1) == [0, 3]
    assert await take(window, number=2) == [4, 5]


async def test_a_group_older_than_slots_and_order_explain_is_an_error_that_names_it() -> None:
    for look_ahead, too_old in ((0, "wait"), (0, "drop"), (2, "drop")):
        window = make(1, 1, look_ahead=look_ahead, too_old=too_old)
        await window.settle(await admitted(window), Played(3))
        with pytest.raises(StalenessError, match=rf"group 0 has a token of version 0\.3.*bound of {1 + look_ahead}"):
            await take(window, number=5 + look_ahead)


async def test_experience_of_abandoned_weights_is_an_error_however_fresh_it_looks() -> None:
    window = make(4, 1)
    await window.settle(await admitted(window), Played(7, incarnation=1))
    with pytest.raises(StalenessError, match=r"version 1\.7"):
        await take(window, number=7)


@pytest.mark.parametrize(("too_old", "taken", "dropped"), [("wait", [0], {}), ("drop", [1], {TOO_OLD: 1})])
async def test_too_old_is_trained_within_the_wider_bound_or_dropped(
    too_old: str, taken: list[int], dropped: dict[str, int]
) -> None:
    window = make(1, 1, look_ahead=1, too_old=too_old)
    for number in (0, 2):
        await window.settle(await admitted(window), Played(number))
    assert window.stats().bound == (2 if too_old == "wait" else 1)
    assert await take(window, number=2) == taken
    assert window.stats().dropped == dropped


async def test_waits_are_measured() -> None:
    window = make(0, 1)
    await window.settle(await admitted(window), Played(0))
    await asyncio.sleep(0.3)
    await take(window)
    assert window.stats().ready_s >= 0.29 > window.stats().take_s


def test_settings_without_sense_are_refused() -> None:
    for wrong, says in (
        ({"look_ahead": -1}, "algorithm.look_ahead is -1"),
        ({"too_old": "keep"}, "algorithm.too_old is 'keep': set wait or drop"),
        ({"max_divergences_in_a_row": 0}, "algorithm.max_divergences_in_a_row is 0"),
    ):
        (problem,) = value_problems(AlgorithmSettings(**wrong), key="algorithm")  # type: ignore[arg-type]
        assert says in problem
