"""Sizes that follow the queue, as a pure function of what was seen lately.

A group is at a rollout actor, at a reward actor, or in the window and at the learner. Where they pile up says what is
too slow:

    the learner waits, groups are played     more rollout actors: as many as would keep it busy, twice as many at most
    the learner waits, groups are judged     more reward actors, likewise
    the learner never waits, most slots are  one actor fewer of the pool that is least busy; the window would only
    filled with finished groups              hold what they make

Between two changes lies the cool-down, in which a change shows. Between "waits" and "never waits" nothing is done
(hysteresis), and a size at which the learner was seen waiting lately is not gone back to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlaudio.config import AutoscaleSettings

WAITS, KEPT_BUSY = 0.7, 0.95
"""Of its time a learner is busy: below the first it waits, above the second it never does."""
AIM = 0.9
"""How busy growth is to make it."""
FILLED = 0.5
"""Share of the slots that hold finished groups, above which more is made than is used."""
MEMORY_COOLDOWNS = 20
"""How long a size that was too small is remembered; longer when it was tried again, four times as long at most."""
NUM_LOOKS = 3000
"""How many are worth keeping: a day and a night of half minutes."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen during one interval: means over its time.

    Attributes:
        at_s: when it ended.
        rollout, reward: actors that worked.
        learner_busy: share of the time, in [0, 1].
        playing, judging: groups at rollout actors, at reward actors.
    """

    at_s: float
    rollout: int
    reward: int
    learner_busy: float
    playing: float
    judging: float

    @property
    def learner_waits(self) -> bool:
        return self.learner_busy < WAITS


@dataclass(frozen=True, slots=True)
class Change:
    """A size to ask for.

    Attributes:
        pool: "rollout" or "reward".
    """

    pool: str
    size: int
    why: str


def next_change(looks: Sequence[Look], settings: AutoscaleSettings, *, num_slots: int) -> Change | None:
    """What to ask for now; None where everything may stay.

    Args:
        looks: the last `NUM_LOOKS`, oldest first.
        settings: limits and cool-down.
        num_slots: groups that the window admits: more rollout actors than those would have nothing to play.
    """
    if not looks:
        return None
    now, steady = looks[-1], _since_the_last_change(looks)
    if now.at_s - steady[0].at_s < settings.cooldown_s:
        return None
    late = [look for look in steady if look.at_s > now.at_s - max(settings.cooldown_s, settings.look_s)]
    seen = replace(
        now,
        learner_busy=_mean([look.learner_busy for look in late]),
        playing=_mean([look.playing for look in late]),
        judging=_mean([look.judging for look in late]),
    )
    return _growth(seen, settings, num_slots=num_slots) or _shrinkage(seen, looks, settings, num_slots=num_slots)


def _growth(seen: Look, settings: AutoscaleSettings, *, num_slots: int) -> Change | None:
    if not seen.learner_waits:
        return None
    judges_are_late = seen.judging > seen.playing
    pool = "reward" if judges_are_late else "rollout"
    size, waiting = getattr(seen, pool), seen.judging if judges_are_late else seen.playing
    limits: list[int] = getattr(settings, pool)
    if not limits or waiting < size:  # some have nothing to do already: others would not help
        return None
    enough = math.ceil(size * AIM / max(seen.learner_busy, 0.01))
    wanted = min(max(size + 1, min(2 * size, enough)), limits[1], num_slots)
    if wanted <= size:
        return None
    where = "judged" if judges_are_late else "played"
    why = f"the learner waited {1 - seen.learner_busy:.0%} of the time with {waiting:.1f} groups being {where}"
    return Change(pool, wanted, why)


def _shrinkage(seen: Look, looks: Sequence[Look], settings: AutoscaleSettings, *, num_slots: int) -> Change | None:
    filled = 1 - (seen.playing + seen.judging) / num_slots
    if seen.learner_busy < KEPT_BUSY or filled < FILLED:
        return None
    # The pool whose actors have the least to do each.
    load = {"rollout": seen.playing / seen.rollout, "reward": seen.judging / seen.reward}
    for pool in sorted(load, key=lambda name: load[name]):
        limits: list[int] = getattr(settings, pool)
        size = getattr(seen, pool) - 1
        if limits and size >= limits[0] and not _was_too_small(pool, size, looks, settings):
            return Change(pool, size, f"the learner never waited, {filled:.0%} of the window lay ready")
    return None


def _was_too_small(pool: str, size: int, looks: Sequence[Look], settings: AutoscaleSettings) -> bool:
    """Whether the learner waited at that size, or a smaller one, and not too long ago to try it again."""
    num_times, last_s, waited = 0, 0.0, False
    for look in looks:
        waits = look.learner_waits and getattr(look, pool) <= size
        num_times += waits and not waited
        last_s = look.at_s if waits else last_s
        waited = waits
    memory_s = MEMORY_COOLDOWNS * settings.cooldown_s * min(num_times, 4)
    return num_times > 0 and looks[-1].at_s - last_s < memory_s


def _since_the_last_change(looks: Sequence[Look]) -> Sequence[Look]:
    now = (looks[-1].rollout, looks[-1].reward)
    start = len(looks)
    while start and (looks[start - 1].rollout, looks[start - 1].reward) == now:
        start -= 1
    return looks[start:]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
