"""The policy that follows the queue, on simulated runs: it finds the size that keeps the learner busy, and stays."""

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from rlaudio.actors.autoscale import NUM_LOOKS, Change, Look, next_change
from rlaudio.config import AutoscaleSettings

PER_STEP = 8
NUM_SLOTS = 3 * PER_STEP
TICK_S = 1.0


@dataclass
class SimulatedRun:
    """Groups that flow from rollout actors over judges to a learner, in steps of a second, with noise.

    Args:
        play_s, judge_s: of one group, on an actor that has no other: an actor does one at a time.
        learn_s: of a batch.
    """

    settings: AutoscaleSettings
    play_s: float = 40.0
    judge_s: float = 1.0
    learn_s: float = 60.0
    rollout: int = 1
    reward: int = 1
    noise: float = 0.2
    seed: int = 0
    changes: list[tuple[float, Change]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.playing, self.judging, self.ready = float(NUM_SLOTS), 0.0, 0.0
        self.learning_s = self.now_s = 0.0
        self.looks: deque[Look] = deque(maxlen=NUM_LOOKS)
        self.num_steps = 0

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.looks.append(self._look())
            change = next_change(list(self.looks), self.settings, num_slots=NUM_SLOTS)
            if change is not None:
                self.changes.append((self.now_s, change))
                setattr(self, change.pool, change.size)

    def _look(self) -> Look:
        num_ticks = int(self.settings.look_s / TICK_S)
        busy = playing = judging = 0.0
        for _ in range(num_ticks):
            self._tick()
            busy += (self.learning_s > 0) / num_ticks
            playing += self.playing / num_ticks
            judging += self.judging / num_ticks
        return Look(self.now_s, self.rollout, self.reward, busy, playing, judging)

    def _tick(self) -> None:
        self.now_s += TICK_S
        lucky = self.rng.uniform(1 - self.noise, 1 + self.noise)
        played = min(self.playing, min(self.playing, self.rollout) / self.play_s * lucky * TICK_S)
        judged = min(self.judging, min(self.judging, self.reward) / self.judge_s * lucky * TICK_S)
        self.playing -= played
        self.judging += played - judged
        self.ready += judged
        if self.learning_s > 0:
            self.learning_s -= TICK_S
            if self.learning_s <= 0:
                self.playing += PER_STEP  # slots are free, prompts are admitted
                self.num_steps += 1
        if self.learning_s <= 0 and self.ready >= PER_STEP:
            self.ready -= PER_STEP
            self.learning_s = self.learn_s

    def busy_share(self, looks: int) -> float:
        last = list(self.looks)[-looks:]
        return sum(look.learner_busy for look in last) / len(last)

    def changes_of(self, pool: str) -> list[int]:
        return [change.size for _, change in self.changes if change.pool == pool]


def settings(rollout: tuple[int, int] = (1, 16), reward: tuple[int, int] | None = None) -> AutoscaleSettings:
    return AutoscaleSettings(rollout=list(rollout), reward=list(reward or ()), look_s=30.0, cooldown_s=180.0)


@pytest.mark.parametrize("play_s", [10.0, 40.0, 90.0])
@pytest.mark.parametrize("start", [1, 12])
@pytest.mark.parametrize("seed", range(2))
def test_the_learner_is_kept_busy_and_sizes_come_to_rest(play_s: float, start: int, seed: int) -> None:
    """A learner that takes 8 groups a minute needs `8 * play_s / 60` actors."""
    run = SimulatedRun(settings(), play_s=play_s, rollout=start, seed=seed)
    run.run(6 * 3600)
    needed = PER_STEP * play_s / run.learn_s
    num_changes = len(run.changes)
    run.run(6 * 3600)
    # What was too small is tried again every few hours: the dialogues may have become shorter.
    assert len(run.changes) - num_changes <= 6, f"it goes on changing: {run.changes_of('rollout')}"
    assert run.busy_share(100) >= 0.65
    assert needed * 0.65 <= run.rollout <= max(needed * 2.1, 1)


def test_growth_is_at_most_twofold_and_changes_keep_their_distance() -> None:
    run = SimulatedRun(settings(), play_s=90.0)
    run.run(8 * 3600)
    sizes = [1, *run.changes_of("rollout")]
    assert all(after <= 2 * before for before, after in pairwise(sizes)) and len(sizes) > 3
    times = [at_s for at_s, _ in run.changes]
    assert all(after - before >= 180.0 for before, after in pairwise(times))


def test_limits_hold() -> None:
    run = SimulatedRun(settings(rollout=(2, 3)), play_s=90.0, rollout=2)
    run.run(4 * 3600)
    assert run.rollout == 3
    run.play_s = 1.0
    run.run(4 * 3600)
    assert run.rollout == 2
    assert {change.pool for _, change in run.changes} == {"rollout"}, "a pool without limits stays"


def test_dialogues_that_grow_longer_get_more_actors_and_shorter_ones_fewer() -> None:
    run = SimulatedRun(settings(), play_s=20.0)
    run.run(3 * 3600)
    short = run.rollout
    run.play_s = 80.0
    run.run(3 * 3600)
    long = run.rollout
    run.play_s = 20.0
    run.run(12 * 3600)
    assert short < long and run.rollout < long


def test_judges_that_are_late_get_more_of_them_and_players_do_not() -> None:
    run = SimulatedRun(settings(rollout=(4, 8), reward=(1, 8)), play_s=20.0, judge_s=20.0, rollout=4)
    run.run(4 * 3600)
    assert run.reward >= 2 and run.rollout == 4
    assert run.busy_share(100) >= 0.65


def test_actors_that_would_have_nothing_to_play_are_not_asked_for() -> None:
    """One dialogue that takes for ever: the learner waits, but more actors would not play it faster."""
    waiting = [Look(30.0 * i, 4, 1, learner_busy=0.1, playing=1.0, judging=0.0) for i in range(20)]
    assert next_change(waiting, settings(), num_slots=NUM_SLOTS) is None
    crowded = [Look(30.0 * i, 4, 1, learner_busy=0.1, playing=20.0, judging=0.0) for i in range(20)]
    change = next_change(crowded, settings(), num_slots=NUM_SLOTS)
    assert change is not None and (change.pool, change.size) == ("rollout", 8)
    assert change.why == "the learner waited 90% of the time with 20.0 groups being played"
    few_slots = next_change(crowded, settings(), num_slots=6)
    assert few_slots is not None and few_slots.size == 6


def test_between_waiting_and_never_waiting_nothing_is_done() -> None:
    for busy in (0.72, 0.8, 0.9, 0.94):
        looks = [Look(30.0 * i, 4, 2, learner_busy=busy, playing=6.0, judging=0.0) for i in range(40)]
        assert next_change(looks, settings(reward=(1, 4)), num_slots=NUM_SLOTS) is None


def test_a_size_that_was_too_small_lately_is_not_gone_back_to() -> None:
    full = [Look(30.0 * i, 4, 1, learner_busy=1.0, playing=1.0, judging=0.0) for i in range(100, 120)]
    change = next_change(full, settings(), num_slots=NUM_SLOTS)
    assert change is not None and change.size == 3
    starved = [Look(30.0 * i, 3, 1, learner_busy=0.3, playing=9.0, judging=0.0) for i in range(90, 100)]
    assert next_change([*starved, *full], settings(), num_slots=NUM_SLOTS) is None
    long_ago = [Look(30.0 * i - 1e5, 3, 1, learner_busy=0.3, playing=9.0, judging=0.0) for i in range(90, 100)]
    assert next_change([*long_ago, *full], settings(), num_slots=NUM_SLOTS) is not None


def test_one_look_is_not_enough() -> None:
    look = Look(0.0, 1, 1, learner_busy=0.0, playing=20.0, judging=0.0)
    assert next_change([], settings(), num_slots=NUM_SLOTS) is None
    assert next_change([look], settings(), num_slots=NUM_SLOTS) is None
