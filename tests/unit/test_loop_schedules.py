"""Hundreds of schedules through the real `loop.train` and the real pools: random delays, faults and settings.

They run on a virtual clock, where a deadlock is an error. What is promised is computed from what the fakes saw, not
from what window and pools say of themselves. The same schedules are run through windows and pools that are broken on
purpose, and must tell.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pytest

from rlaudio import loop
from rlaudio.actors.members import MAX_TIMEOUTS_IN_A_ROW, ActorPool, Member
from rlaudio.actors.pool import ScoredGroup
from rlaudio.aio import first_error
from rlaudio.config import AlgorithmSettings
from rlaudio.errors import (
    DataError,
    EngineError,
    LearnerError,
    LedgerError,
    StalenessError,
    StarvedError,
    WeightSyncError,
)
from rlaudio.experience.ledger import Ledger
from rlaudio.experience.window import CUT_OFF, DIVERGED, NO_SIGNAL, TOO_OLD, StalenessWindow
from rlaudio.types import WeightVersion
from tests import fake_run
from tests.fake_actors import Ailment, FakeActor
from tests.fake_run import FakeRun, HungError, VirtualClockLoop

pytestmark = pytest.mark.timeout(600)  # seconds of work, on a machine that may have other things to do
NUM_SCHEDULES = 400
FATAL: dict[str, Exception] = {
    "play": ZeroDivisionError("a bug in the player"),
    "judge": AttributeError("a bug in a reward"),
    "prepare": LearnerError("rank 1 died in prepare"),
    "forward_backward": LearnerError("rank 0 did not finish forward_backward within 600 s"),
    "optimizer_step": LearnerError("rank 1 died in optimizer_step"),
    "broadcast": OSError(24, "Too many open files"),
    "save": OSError(28, "No space left on device"),
}


AILMENTS: tuple[Ailment, ...] = ("mute", "mute", "stuck", "hung", "dead", "engine dead")


def schedule(seed: int) -> FakeRun:
    """Settings, chances, actors that fall ill, and at most one fatal fault, all from the seed."""
    rng = random.Random(seed)
    per_step = rng.randint(1, 4)
    settings = AlgorithmSettings(
        name=rng.choice(["grpo", "grpo", "ppo"]),
        groups_per_step=per_step,
        max_staleness=seed % 5,
        look_ahead=seed // 5 % 4,
        too_old=rng.choice(["wait", "drop"]),
        minibatches=rng.randint(1, min(2, per_step)),
        max_dropped_in_a_row=rng.choice([6, 500]),
        max_divergences_in_a_row=rng.choice([1, 3]),
    )
    fatal = {}
    if rng.random() < 0.4:
        call = rng.choice(list(FATAL))
        calls_per_step = {"play": 6 * per_step, "judge": 3 * per_step, "broadcast": 2, "save": 1}.get(call, 1)
        fatal[call] = (rng.randrange(1 + 6 * calls_per_step if call != "save" else 2), FATAL[call])
    num_engines, num_judges = rng.randint(1, 3), rng.randint(1, 3)
    ill = rng.choice([0.0, 0.0, 0.3, 0.7])
    names = [*(f"rollout-{i}" for i in range(num_engines)), *(f"reward-{i}" for i in range(num_judges))]
    ailments = {name: (rng.randrange(20), rng.choice(AILMENTS)) for name in names if rng.random() < ill}
    return FakeRun(
        settings,
        seed=seed,
        num_engines=num_engines,
        num_judges=num_judges,
        steps=rng.randint(3, 10),
        delay_s=rng.choice([0.001, 1.0, 60.0]),
        fail_share=rng.choice([0.0, 0.1, 0.5]),
        dull_share=rng.choice([0.0, 0.2, 0.5]),
        slow_share=rng.choice([0.0, 0.1, 0.3]),
        diverge_share=rng.choice([0.0, 0.0, 0.1, 0.4]),
        refuse_share=rng.choice([0.0, 0.0, 0.0, 0.05, 0.3]),
        fatal=fatal,
        ailments=ailments,
    )


def bound_of(settings: AlgorithmSettings) -> int:
    """Versions, as the documentation states them."""
    batches = settings.max_staleness
    if settings.too_old == "wait" and settings.max_staleness > 0:
        batches += (settings.look_ahead + settings.groups_per_step - 1) // settings.groups_per_step
    return batches * settings.minibatches * settings.epochs


@dataclass(frozen=True, slots=True)
class Outcome:
    world: FakeRun
    error: BaseException | None

    @property
    def leaf(self) -> BaseException | None:
        return first_error(self.error) if isinstance(self.error, BaseExceptionGroup) else self.error


def run(world: FakeRun) -> Outcome:
    try:
        world.run()
    except Exception as error:
        return Outcome(world, error)
    return Outcome(world, None)


def broken_promises(outcome: Outcome) -> list[str]:
    world = outcome.world
    return list(chain(_age(world), _accounts(world), _ledger(world), _actors(world), _end(outcome)))


def _age(world: FakeRun) -> Iterator[str]:
    bound = bound_of(world.settings)
    if max(world.ages, default=0) > bound:
        yield f"a token of age {max(world.ages)} was trained on, the bound is {bound}"
    look_ahead = world.settings.look_ahead if world.settings.max_staleness else 0
    for place, group in enumerate(world.taken):
        if (overtakers := sum(before > group for before in world.taken[:place])) > look_ahead:
            yield f"group {group} was overtaken by {overtakers}, look-ahead is {look_ahead}"


def _accounts(world: FakeRun) -> Iterator[str]:
    """Every issued group is trained, dropped with a reason, or still open when the run ends: once, and nothing else."""
    dropped = set(world.ledger.ended) - set(world.trained)
    num_open = world.prompts.num_issued - len(world.ledger.ended)
    if len(dropped) != len(world.drops) or len(world.ledger.ended) != len(world.trained) + len(world.drops):
        yield f"{len(world.ledger.ended)} groups ended, {len(world.trained)} trained, dropped for {world.drops}"
    dull = {group for group, judged in world.judged.items() if not judged.has_signal}
    useless = world.failed | dull if world.settings.drops_groups_without_signal else world.failed
    if lost := useless - dropped:
        yield f"groups {lost} are of no use and were not dropped"
    if lost := world.started - world.cut_off - set(world.judged):
        yield f"groups {lost} were begun and not heard of again"
    if len(set(world.taken)) != len(world.taken) or len(set(world.trained)) != len(world.trained):
        yield "a group was trained twice"
    if lost := set(world.taken) & useless:
        yield f"groups {lost} are of no use and were trained on"
    reasons = {"RolloutError", "TurnTimeoutError", "JudgeError", "VerdictTimeoutError", NO_SIGNAL, DIVERGED, CUT_OFF}
    if world.settings.look_ahead and world.settings.max_staleness and world.settings.too_old == "drop":
        reasons.add(TOO_OLD)
    if unknown := set(world.drops) - reasons:
        yield f"drops for {unknown}"
    slots = (world.settings.max_staleness + 1) * world.settings.groups_per_step
    if num_open > slots:
        yield f"{num_open} groups are open with {slots} slots"


def _ledger(world: FakeRun) -> Iterator[str]:
    """It adds up, and says of every group of this life what was seen from outside."""
    sums = world.ledger.sums()
    yield from sums.problems
    if sums.num_groups != world.prompts.num_issued:
        yield f"{sums.num_groups} groups are in the ledger, {world.prompts.num_issued} prompts were dealt"
    lives = [world]
    while (before := lives[0].before) is not None:
        lives.insert(0, before)
    trained: list[int] = []  # that the present weights have seen
    for life, after in zip(lives, [*lives[1:], None], strict=True):
        until = len(life.steps_done) if after is None else after.first_step - life.first_step
        trained += life.trained[: until * life.settings.groups_per_step]
    if sums.trained + sums.durable != len(trained):
        yield f"{sums.trained} + {sums.durable} groups are trained in the ledger, {len(trained)} were"
    if len(set(trained)) != len(trained):
        yield "the present weights have seen a group twice"
    drops = Counter(chain.from_iterable(life.drops for life in lives))
    if sums.dropped != drops:
        yield f"dropped in the ledger: {sums.dropped}, seen: {dict(drops)}"
    if sums.issued + sums.ready + len(trained) + drops.total() != sums.num_groups:
        yield f"{sums.num_groups} groups were dealt, {sums.issued} + {sums.ready} are open"


def _actors(world: FakeRun) -> Iterator[str]:
    """Who fell ill is named and left out, once, soon after it was noticed; nobody else is."""
    left_out = Counter(sentence.split(" is left out")[0] for sentence in world.told)
    if twice := [name for name, count in left_out.items() if count > 1]:
        yield f"{twice} were left out twice"
    for name, actor in world.actors.items():
        late = _time_outs_in_a_row(actor) >= MAX_TIMEOUTS_IN_A_ROW
        if name in left_out and not (actor.ill or actor.refused or late):
            yield f"{name} was left out and was well"
        if name in left_out or actor.noticed_s is None:
            continue
        lived_s = world.took_s - actor.noticed_s
        # The first time-out of a stuck actor says nothing yet: it answers pings. Only a run that ended is excused.
        if actor.ill in ("dead", "engine dead") or (actor.refused and lived_s > 0) or late:
            yield f"{name} was {actor.ill or 'refusing weights'} for {lived_s:g} s after it was noticed, and stayed"
        if actor.ill in ("mute", "hung") and lived_s > world.alive_deadline_s + world.sync_deadline_s:
            yield f"{name} was {actor.ill} for {lived_s:g} s after it was noticed, and stayed"


def _time_outs_in_a_row(actor: FakeActor) -> int:
    """The most time-outs, each of a call that began after the one before, with none served between."""
    most = in_a_row = 0
    last_s = float("-inf")
    for began_s, ended_s in sorted(actor.timed_out, key=lambda call: call[1]):
        if began_s < last_s:
            continue
        in_a_row = 1 if any(last_s <= served_s <= ended_s for served_s in actor.served_s) else in_a_row + 1
        most, last_s = max(most, in_a_row), ended_s
    return most


def _end(outcome: Outcome) -> Iterator[str]:
    """It ends, as a success exactly if nothing fatal happened."""
    world, leaf = outcome.world, outcome.leaf
    if leaf is None:
        if world.fatal_raised:
            yield f"a run that looks like success after {world.fatal_raised[0]!r}"
        if world.steps_done != list(range(world.steps)) or world.saved[-1:] != [world.steps]:
            yield f"steps {world.steps_done} done, {world.saved} saved, of {world.steps}"
        if len(world.trained) != world.steps * world.settings.groups_per_step:
            yield f"{len(world.trained)} groups trained"
        if set(world.live) != {world.version}:
            yield f"engines hold {world.live}, the learner {world.version}"
        return
    if isinstance(leaf, StarvedError):
        in_a_row = 0
        most = 0
        for reason in world.ends:
            in_a_row = 0 if not reason else in_a_row + (reason not in (TOO_OLD, DIVERGED))
            most = max(most, in_a_row)
        if most < world.settings.max_dropped_in_a_row:
            yield f"starved after {most} drops in a row"
    elif isinstance(leaf, WeightSyncError) or (isinstance(leaf, EngineError) and "actor is alive" in str(leaf)):
        if world.rollouts.pool.num_alive and world.rewards.pool.num_alive:
            yield f"ended by {leaf!r} with actors alive in both pools"
    elif not world.fatal_raised or not (leaf is world.fatal_raised[0] or leaf.__cause__ is world.fatal_raised[0]):
        yield f"ended by {leaf!r}, not by {world.fatal_raised[:1]}"


def test_every_schedule_keeps_age_accounts_and_ends_as_it_should() -> None:
    outcomes = [run(schedule(seed)) for seed in range(NUM_SCHEDULES)]
    broken = {seed: problems for seed, outcome in enumerate(outcomes) if (problems := broken_promises(outcome))}
    assert not broken

    # Else the promises would be kept by schedules in which nothing happens.
    seen = Counter(type(outcome.leaf).__name__ for outcome in outcomes)
    assert seen["NoneType"] > NUM_SCHEDULES / 3
    errors = {type(error).__name__ for error in FATAL.values()}
    assert all(seen[name] >= 3 for name in {*errors, "DivergenceError", "StarvedError", "WeightSyncError"}), seen
    assert seen["EngineError"] >= 10, "a whole pool was lost"
    actors = [actor for outcome in outcomes for actor in outcome.world.actors.values()]
    noticed = Counter(actor.ill for actor in actors if actor.noticed_s is not None)
    assert all(noticed[ailment] >= 10 for ailment in AILMENTS), noticed
    survived = [one for one in outcomes if one.leaf is None and one.world.told]
    assert len(survived) >= 20, "runs that lose an actor and go on"
    drops = Counter(chain.from_iterable(outcome.world.drops for outcome in outcomes))
    assert all(drops[reason] >= 15 for reason in ("RolloutError", "JudgeError", NO_SIGNAL, DIVERGED, TOO_OLD)), drops
    at_the_bound = [one for one in outcomes if one.world.ages and max(one.world.ages) == bound_of(one.world.settings)]
    settings = {(one.world.settings.max_staleness, one.world.settings.too_old) for one in at_the_bound}
    assert len(settings) == 10, "the bound is the least one: every staleness reaches it"
    over = [one for one in at_the_bound if one.world.settings.too_old == "wait" and one.world.settings.look_ahead]
    assert any(max(one.world.ages) > one.world.settings.max_staleness * one.world.settings.minibatches for one in over)


# ---- lives after lives --------------------------------------------------------------------------------------------


def next_life(before: FakeRun, *, seed: int, schedule: Callable[[int], FakeRun]) -> FakeRun:
    """Another schedule, that goes on where `before` saved last; most are stopped somewhere."""
    rng = random.Random(seed)
    world = schedule(seed + 10_000)
    stop_s = rng.choice([None, rng.uniform(0, 60) * world.delay_s])
    return replace(world, settings=before.settings, before=before, stop_s=stop_s, lost_share=rng.choice([0.0, 0.3]))


def lives_of(seed: int, *, schedule: Callable[[int], FakeRun] = schedule) -> list[Outcome]:
    first = schedule(seed)
    first.stop_s = random.Random(-seed).choice([None, 20 * first.delay_s, 100 * first.delay_s])
    outcomes = [run(first)]
    for number in range(1, 3):
        world, leaf = outcomes[-1].world, outcomes[-1].leaf
        if (seed + number) % 3 and leaf is not None and not isinstance(leaf, LearnerError):
            world.keep()  # else its process was killed
        outcomes.append(run(next_life(world, seed=1000 * number + seed, schedule=schedule)))
    return outcomes


def broken_in_later_lives(outcomes: Sequence[Outcome]) -> list[str]:
    problems: list[str] = []
    for outcome in outcomes:
        world = outcome.world
        problems += _age(world) if world.before is None else (p for p in _age(world) if "a token of age" in p)
        if world.abandoned:
            problems.append(f"groups {world.abandoned} have tokens of abandoned weights and were trained on")
        if world.seen_again:
            problems.append(f"groups {world.seen_again} were trained on though the weights had seen them")
        if isinstance(outcome.leaf, HungError | StalenessError | LedgerError | DataError):
            problems.append(f"ended by {outcome.leaf!r}")
    return [*problems, *_ledger(outcomes[-1].world)]


def test_what_lives_leave_to_each_other_adds_up() -> None:
    """Stopped anywhere, by a fault or from outside, and gone on from the last save: twice."""
    all_lives = [lives_of(seed) for seed in range(NUM_SCHEDULES // 4)]
    broken = {seed: problems for seed, lives in enumerate(all_lives) if (problems := broken_in_later_lives(lives))}
    assert not broken

    worlds = [outcome.world for lives in all_lives for outcome in lives]
    assert sum(len(world.recalled) for world in worlds) > 40, "experience is reused"
    assert sum(len(set(world.recalled) & set(world.taken)) for world in worlds) > 20, "and trained on"
    reasons = Counter(chain.from_iterable(world.ledger.sums().reissued for world in worlds))
    for why in ("under way", "abandoned", "not in the spool", "SpoolError"):
        assert any(why in reason for reason in reasons), reasons
    assert sum(world.ledger.sums().num_undone > 0 for world in worlds) > 5


class ForgetsADrop(Ledger):
    def dropped(self, group: int, *, reason: str) -> None:
        if group % 7:
            super().dropped(group, reason=reason)


class ForgetsABatch(Ledger):
    def trained(self, groups: Sequence[int], *, step: int) -> None:
        if step % 3:
            super().trained(groups, step=step)


class KeepsWhatWasUndone(Ledger):
    """What was trained on soon after the checkpoint is held to be durable: the next life does not train on it."""

    def restore(self, *, step: int, **options: Any) -> Any:
        return super().restore(step=step + 2, **options)


class CallsEverythingFresh(Ledger):
    def restore(self, *, problem: Any, **options: Any) -> Any:
        return super().restore(problem=lambda entry, place: "", **options)


@pytest.mark.parametrize(
    ("ledger", "says"),
    [
        (ForgetsADrop, "dropped in the ledger"),
        (ForgetsABatch, "are trained in the ledger"),
        (KeepsWhatWasUndone, "are trained in the ledger"),
        (CallsEverythingFresh, "have tokens of abandoned weights"),
    ],
)
def test_a_broken_ledger_is_noticed(ledger: type[Ledger], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = type(ledger.__name__, (fake_run.WrittenDownLedger, ledger), {})
    monkeypatch.setattr(fake_run, "WrittenDownLedger", broken)
    problems = chain.from_iterable(broken_in_later_lives(lives_of(seed)) for seed in range(NUM_SCHEDULES))
    assert any(says in problem for problem in problems)


# ---- the schedules notice a broken window -------------------------------------------------------------------------


class _Trusting(StalenessWindow[ScoredGroup]):
    """Without its own check of ages, so that only what the fakes saw can tell."""

    def _is_too_old(self, group: int, consumed_by: WeightVersion) -> bool:
        return False


class OneSlotTooMany(_Trusting):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._slots.release()


class ReleasesTwice(_Trusting):
    def release(self, tickets: Any) -> None:
        super().release(tickets)
        self._slots.release()


class OutOfOrder(_Trusting):
    def _choose(self) -> tuple[list[int], Counter[int]]:
        ready = [group for group in reversed(self._line) if group in self._ready]
        return sorted(ready[: self._groups_per_step]), Counter()


class NeverReleases(_Trusting):
    def release(self, tickets: Any) -> None: ...


class LosesAccount(_Trusting):
    def _count_drop(self, group: int, *, reason: str) -> None:
        self._dropped[reason] += 1


class AgeIsOfTheNewestToken(StalenessWindow[ScoredGroup]):
    def _is_too_old(self, group: int, consumed_by: WeightVersion) -> bool:
        return consumed_by.number - self._ready[group][0].header.versions[1].number > self.bound


@pytest.mark.parametrize(
    ("window", "says"),
    [
        (OneSlotTooMany, "a token of age"),
        (ReleasesTwice, "a token of age"),
        (OutOfOrder, "was overtaken by"),
        (NeverReleases, "ended by HungError"),
        (LosesAccount, "were not dropped"),
        (AgeIsOfTheNewestToken, "a token of age"),
    ],
)
def test_a_broken_window_is_noticed(
    window: type[StalenessWindow[ScoredGroup]], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "StalenessWindow", window)
    problems = chain.from_iterable(broken_promises(run(schedule(seed))) for seed in range(NUM_SCHEDULES))
    assert any(says in problem for problem in problems)


class NobodyIsExamined(ActorPool):
    async def examine(self, member: Member, *, asked_s: float) -> bool:
        return False


class SlowIsMute(ActorPool):
    async def examine(self, member: Member, *, asked_s: float) -> bool:
        self.evict(member.name, reason="a call timed out")
        return True


class PingsWithoutDeadline(ActorPool):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **(options | {"alive_deadline_s": None}))


class CallsWithoutDeadline(ActorPool):
    async def call(self, member: Member, ref: Any, *, deadline_s: float | None) -> Any:
        return await super().call(member, ref, deadline_s=None)  # type: ignore[arg-type]


class PatientForever(ActorPool):
    async def examine(self, member: Member, *, asked_s: float) -> bool:
        member.num_timeouts = -1
        return await super().examine(member, asked_s=asked_s)


class KeepsWhomItNames(ActorPool):
    def evict(self, name: str, *, reason: str) -> None:
        member = self._members.get(name)
        super().evict(name, reason=reason)
        if member is not None:
            self._members[name] = member


class SilentEviction(ActorPool):
    def evict(self, name: str, *, reason: str) -> None:
        self._members.pop(name, None)


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        (NobodyIsExamined, "was mute for"),
        (SlowIsMute, "was well"),
        (PingsWithoutDeadline, "ended by HungError"),
        (CallsWithoutDeadline, "ended by HungError"),
        (PatientForever, "was stuck for"),
        (KeepsWhomItNames, "were left out twice"),
        (SilentEviction, "after it was noticed, and stayed"),
    ],
)
def test_a_broken_pool_is_noticed(pool: type[ActorPool], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_run, "ActorPool", pool)
    problems = chain.from_iterable(broken_promises(run(schedule(seed))) for seed in range(NUM_SCHEDULES))
    assert any(says in problem for problem in problems)


def test_the_window_itself_refuses_a_group_that_is_older_than_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot too many again, now with the window's own check in place: the run ends, nothing too old is trained."""

    class Leaky(StalenessWindow[ScoredGroup]):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._slots.release()

    monkeypatch.setattr(loop, "StalenessWindow", Leaky)
    outcomes = [run(schedule(seed)) for seed in range(100)]
    assert not any("a token of age" in problem for outcome in outcomes for problem in _age(outcome.world))
    assert sum(type(outcome.leaf).__name__ == "StalenessError" for outcome in outcomes) > 3


def test_a_deadlock_on_the_virtual_clock_is_an_error_at_once() -> None:
    async def wait_for_nothing() -> None:
        await asyncio.Event().wait()

    with pytest.raises(HungError, match="every task waits"), asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        runner.run(wait_for_nothing())
