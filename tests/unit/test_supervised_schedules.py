"""Hundreds of schedules in which actors are lost, come back and are asked for or sent away, through the real loop.

As `test_loop_schedules.py`, whose promises hold here too: every group is accounted for and no token is too old, whoever
comes and goes. The same schedules are run through pools and supervisors that are broken on purpose, and must tell.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest

from rlaudio.actors.members import ActorPool
from rlaudio.actors.supervisor import Supervisor, pause_before_restart
from rlaudio.config import AlgorithmSettings, SupervisionSettings
from rlaudio.errors import ConfigError, EngineError
from rlaudio.experience.window import NO_SIGNAL, TOO_OLD
from rlaudio.weights.joining import JoinableWeights
from tests import fake_run
from tests.fake_actors import Ailment
from tests.fake_run import FakeRun
from tests.unit.test_loop_schedules import (
    AILMENTS,
    Outcome,
    _accounts,
    _age,
    _end,
    _ledger,
    _time_outs_in_a_row,
    broken_in_later_lives,
    lives_of,
    run,
)

NUM_SCHEDULES = 300


def schedule(seed: int) -> FakeRun:
    """Sizes that change, actors that fall ill, some in their start, and those that come for them, all from the seed."""
    rng = random.Random(seed)
    delay_s = rng.choice([0.001, 1.0, 60.0])
    per_step = rng.randint(1, 4)
    settings = AlgorithmSettings(
        groups_per_step=per_step,
        max_staleness=seed % 4,
        look_ahead=seed // 4 % 3,
        too_old=rng.choice(["wait", "drop"]),
        minibatches=rng.randint(1, min(2, per_step)),
        max_dropped_in_a_row=500,
    )
    only_resized = seed % 3 == 0
    num_engines, num_judges = rng.randint(1, 3), rng.randint(1, 2)
    ill = 0.0 if only_resized else rng.choice([0.3, 0.7])
    names = [*(f"rollout-{i}" for i in range(num_engines)), *(f"reward-{i}" for i in range(num_judges))]
    ailments: dict[str, tuple[int, Ailment]] = {
        name: (rng.randrange(20), rng.choice(AILMENTS)) for name in names if rng.random() < ill
    }
    times = sorted(rng.uniform(0, 40 * delay_s) for _ in range(rng.randint(1, 8) if rng.random() < 0.7 else 0))
    supervision = SupervisionSettings(
        max_restarts=rng.choice([0, 2, 8]),
        window_s=rng.choice([20, 1000]) * delay_s,
        first_pause_s=delay_s,
        longest_pause_s=8 * delay_s,
        place_deadline_s=10 * delay_s,
        drain_deadline_s=rng.choice([0.0, 0.0, 1.0, 15.0]) * delay_s,
    )
    return FakeRun(
        settings,
        seed=seed,
        num_engines=num_engines,
        num_judges=num_judges,
        steps=rng.randint(4, 12),
        delay_s=delay_s,
        attempts=1 if only_resized else 2,
        dull_share=rng.choice([0.0, 0.2]),
        fail_share=0.0 if only_resized else rng.choice([0.0, 0.1]),
        refuse_share=0.0 if only_resized else rng.choice([0.0, 0.0, 0.05]),
        ailments=ailments,
        supervision=supervision,
        ill_share=0.0 if only_resized else rng.choice([0.0, 0.2, 1.0]),
        resizes=[(at_s, rng.choice(["rollout", "rollout", "rewards"]), rng.randint(1, 5)) for at_s in times],
    )


def only_resized(world: FakeRun) -> bool:
    return world.seed % 3 == 0


def broken_promises(outcome: Outcome) -> list[str]:
    world = outcome.world
    return list(chain(_age(world), _accounts(world), _ledger(world), _members(world), _sizes(world), _ended(outcome)))


def _members(world: FakeRun) -> Iterator[str]:
    """Who joins holds what the others hold; who is lost was ill; who is ill does not stay."""
    for name, held, others in world.joined:
        if others - {held}:
            yield f"{name} joined with {held} among {others}"
    left_out = Counter(sentence.split(" is left out")[0] for sentence in world.told if " is left out" in sentence)
    for name, actor in world.actors.items():
        late = _time_outs_in_a_row(actor) >= 3
        if left_out[name] > 1 or (left_out[name] and not (actor.ill or actor.refused or late)):
            yield f"{name} was left out {left_out[name]} times, {actor.ill or 'well'}"
        if actor.ended or actor.noticed_s is None or actor.ill in (None, "stuck"):
            continue
        lived_s = world.took_s - actor.noticed_s
        if lived_s > world.alive_deadline_s + world.sync_deadline_s + 10 * world.delay_s:
            yield f"{name} was {actor.ill} for {lived_s:g} s after it was noticed, and stayed"


def _sizes(world: FakeRun) -> Iterator[str]:
    for role, size in world.sizes.items():
        if size.serving + size.coming + size.given_up != size.wanted:
            yield f"{role}: {size} does not add up"
    if not only_resized(world):
        return
    if reasons := set(world.drops) - {NO_SIGNAL, TOO_OLD}:
        yield f"a change of size cost groups: {reasons}"
    longest_s = 3 * world.delay_s  # of one group, whatever it is
    assert world.supervision is not None
    if world.supervision.drain_deadline_s > longest_s and (late := [one for one in world.told if "handed" in one]):
        yield f"not drained: {late}"


def _ended(outcome: Outcome) -> Iterator[str]:
    world, leaf = outcome.world, outcome.leaf
    if leaf is None and not world.live:
        yield from ()  # the last one was lost in the last step
    elif isinstance(leaf, EngineError) and "actor is alive" in str(leaf):
        if not any(size.serving == size.coming == 0 and size.given_up for size in world.sizes.values()):
            yield f"ended by {leaf!r} with {world.sizes}"
    else:
        yield from _end(outcome)


def test_whoever_comes_and_goes_every_group_is_accounted_for_and_no_token_is_too_old() -> None:
    outcomes = [run(schedule(seed)) for seed in range(NUM_SCHEDULES)]
    broken = {seed: problems for seed, outcome in enumerate(outcomes) if (problems := broken_promises(outcome))}
    assert not broken

    # Else the promises would be kept by schedules in which nothing happens.
    said = Counter(
        what
        for outcome in outcomes
        for sentence in outcome.world.told
        for what in ("is left out", "starts again", "is given up", "has joined", "has left", "handed over")
        if what in sentence
    )
    assert all(said[what] >= 50 for what in ("is left out", "starts again", "has joined", "has left")), said
    assert said["is given up"] >= 20 and said["handed over"] >= 5, said
    survived = [one for one in outcomes if one.leaf is None and any("left out" in line for line in one.world.told)]
    assert len(survived) >= 50, "runs that lose an actor and go on"
    caught_up = [held for one in outcomes for _, held, _ in one.world.joined if held.number]
    assert len(caught_up) >= 100, "whoever joins late holds weights of the learner"
    alone = [one for one in outcomes if one.leaf is None and any("0 of 1 rollout" in line for line in one.world.told)]
    assert len(alone) >= 5, "a run whose only engine is lost goes on with the next"
    ended = Counter(type(one.leaf).__name__ for one in outcomes)
    assert ended["EngineError"] >= 5, ended


def test_whoever_joins_a_run_that_was_gone_on_with_holds_what_it_holds() -> None:
    """Lives after lives, as in `test_loop_schedules.py`, in each of which actors come and go."""
    all_lives = [lives_of(seed, schedule=schedule) for seed in range(NUM_SCHEDULES // 4)]
    broken = {
        seed: problems
        for seed, lives in enumerate(all_lives)
        if (problems := [*broken_in_later_lives(lives), *chain.from_iterable(_members(one.world) for one in lives)])
    }
    assert not broken
    later = [outcome.world for lives in all_lives for outcome in lives[1:]]
    assert sum(len(world.joined) for world in later) > 50 and sum(len(world.recalled) for world in later) > 20


# ---- the schedules notice what is broken --------------------------------------------------------------------------


class NoWeightsForWhoJoins(JoinableWeights):
    async def join(self, name: str, handle: Any, *, take_in: Callable[[], None]) -> Any:
        take_in()


class JoinsAnyTime(JoinableWeights):
    """Between the two halves of a broadcast, too."""

    async def join(self, name: str, handle: Any, *, take_in: Callable[[], None]) -> Any:
        if self._latest is not None:
            await handle.take_weights(self._latest.version)
        take_in()


class EndsWhoLeavesAtOnce(ActorPool):
    async def retire(self, name: str, *, deadline_s: float) -> int:
        return await super().retire(name, deadline_s=0.0)


class HandsOverAsFailed(ActorPool):
    def give_no_more(self, name: str) -> None: ...


class ForgetsTheLost(Supervisor):
    def _lose(self, name: str, reason: str) -> None: ...


@pytest.mark.parametrize(
    ("part", "broken", "says"),
    [
        ("JoinableWeights", NoWeightsForWhoJoins, "joined with"),
        ("JoinableWeights", NoWeightsForWhoJoins, "StalenessError"),
        ("JoinableWeights", JoinsAnyTime, "joined with"),
        ("ActorPool", EndsWhoLeavesAtOnce, "not drained"),
        ("ActorPool", HandsOverAsFailed, "a change of size cost groups"),
        ("Supervisor", ForgetsTheLost, "does not add up"),
    ],
)
def test_what_is_broken_is_noticed(part: str, broken: type, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_run, part, broken)
    problems = chain.from_iterable(broken_promises(run(schedule(seed))) for seed in range(NUM_SCHEDULES))
    assert any(says in problem for problem in problems)


# ---- one thing at a time ------------------------------------------------------------------------------------------

ONE_GROUP = AlgorithmSettings(groups_per_step=1, max_staleness=1)


def test_a_place_whose_actors_are_lost_again_and_again_is_given_up_and_the_run_goes_on_with_the_rest() -> None:
    sick: dict[str, tuple[int, Ailment]] = dict.fromkeys(("rollout-0", "rollout-0.2", "rollout-0.3"), (0, "dead"))
    settings = SupervisionSettings(max_restarts=2, window_s=1000.0, first_pause_s=1.0)
    world = FakeRun(ONE_GROUP, steps=60, ailments=sick, supervision=settings)
    outcome = run(world)
    assert outcome.leaf is None and not broken_promises(outcome)
    (given_up,) = (sentence for sentence in world.told if "given up" in sentence)
    assert given_up.startswith("rollout-0 is given up after 3 losses (supervision.max_restarts is 2), the last was ")
    assert "rollout-0.3: " in given_up
    assert "ActorDiedError" in given_up or "RayActorError" in given_up
    assert "`rlaudio scale` fills its place again" in given_up
    size = world.sizes["rollout"]
    assert (size.wanted, size.serving, size.given_up) == (2, 1, 1)


def test_starts_that_fail_count_however_long_they_take() -> None:
    """The window is for actors that have worked: a start of five minutes must not make a crash loop go on for ever."""
    never_up: dict[str, tuple[int, Ailment]] = {f"rollout-0.{life}": (-1, "dead") for life in range(2, 9)}
    settings = SupervisionSettings(max_restarts=3, window_s=1.0, first_pause_s=10.0)
    world = FakeRun(ONE_GROUP, steps=400, ailments={"rollout-0": (0, "dead"), **never_up}, supervision=settings)
    assert run(world).leaf is None
    assert [line for line in world.told if "rollout-0 is given up after 4 losses" in line and "rollout-0.5" in line]
    assert world.sizes["rollout"].given_up == 1


async def test_whoever_leaves_counts_from_the_moment_it_is_asked_to() -> None:
    """Else a command that looks at once would think that it is done."""
    world = FakeRun(ONE_GROUP, num_engines=3, supervision=SupervisionSettings())
    world._supervise(None, SupervisionSettings())  # type: ignore[arg-type]
    supervisor = world.supervisors["rollout"]
    supervisor.resize(1)
    assert (supervisor.size.serving, supervisor.size.leaving) == (1, 2) and not supervisor.size.settled
    await asyncio.sleep(0.05)
    assert supervisor.size.settled and supervisor.pool.num_alive == 1
    supervisor.resize(2)
    assert (supervisor.size.serving, supervisor.size.coming) == (1, 1) and not supervisor.size.settled
    await supervisor.stop()


def test_a_run_ends_when_every_place_is_given_up_and_says_of_what() -> None:
    world = FakeRun(
        ONE_GROUP, num_engines=1, supervision=SupervisionSettings(max_restarts=1), ill_share=0.0,
        ailments={"rollout-0": (0, "engine dead"), "rollout-0.2": (-1, "dead")},
    )  # fmt: skip
    leaf = run(world).leaf
    assert isinstance(leaf, EngineError) and "no rollout actor is alive (the last: rollout-0" in str(leaf)
    assert any("rollout-0 is given up" in sentence and "rollout-0.2" in sentence for sentence in world.told)


def test_pauses_double_up_to_the_longest_and_places_lost_together_do_not_come_together() -> None:
    settings = SupervisionSettings(first_pause_s=2.0, longest_pause_s=20.0)
    assert [pause_before_restart(n, settings, chance=0.0) for n in (1, 2, 3, 4, 5)] == [1.0, 2.0, 4.0, 8.0, 10.0]
    assert pause_before_restart(3, settings, chance=0.5) == 6.0
    assert pause_before_restart(2000, settings, chance=0.999) < 20.0


def test_a_pool_of_nobody_is_refused() -> None:
    world = FakeRun(ONE_GROUP, supervision=SupervisionSettings(), resizes=[(0.0, "rollout", 0)])
    assert run(world).leaf is None
    with pytest.raises(ConfigError, match="at least 1"):
        world.supervisors["rollout"].resize(0)
