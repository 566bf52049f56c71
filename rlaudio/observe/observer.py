"""What the loop reports to: curves, the run folder's own copy of them, and the bar a person watches. Never steers."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from rlaudio.experience.window import WindowStats
from rlaudio.learner.messages import PublishedSnapshot
from rlaudio.observe.metrics import GroupStats, StepTally, Totals
from rlaudio.observe.progress import Field, Progress
from rlaudio.observe.tracker import Tracker
from rlaudio.observe.trap import TrapMonitor
from rlaudio.types import WeightVersion

_LOG = logging.getLogger("rlaudio.observe")


class Consumed(Protocol):
    """A group that a step was trained on, as far as curves care."""

    @property
    def stats(self) -> GroupStats: ...

    @property
    def oldest_version(self) -> WeightVersion: ...


class Staffed(Protocol):
    """A pool of actors, as far as curves care."""

    role: str

    @property
    def num_alive(self) -> int: ...


class Observer:
    """Turns what happened in a step into one line of metrics; `gauges` are looked up at each step's end."""

    def __init__(
        self,
        *,
        tracker: Tracker,
        progress: Progress,
        num_steps: int,
        pools: Sequence[Staffed] = (),
        gauges: Callable[[], Mapping[str, float]] = dict,
        trap: TrapMonitor | None = None,
    ) -> None:
        self._metrics = StepTally()
        self._tracker = tracker
        self._progress = progress
        self._num_steps = num_steps
        self._pools = pools
        self._gauges = gauges
        self.trap = trap
        self._said_failure = False
        self.steps_done = 0

    @property
    def totals(self) -> Totals:
        return self._metrics.totals

    def dropped(self, reason: str) -> None:
        self._metrics.add_drop(reason)

    def step(
        self,
        step: int,
        *,
        groups: Sequence[Consumed],
        consumed_by: WeightVersion,
        snapshot: PublishedSnapshot,
        window: WindowStats,
    ) -> None:
        """One optimizer step is done.

        Args:
            groups: what it was trained on.
            consumed_by: the weights it was computed with; a group's age is counted from them.
            snapshot: the weights after it, with the learner's own numbers.
        """
        for group in groups:
            age = consumed_by.number - group.oldest_version.number
            self._metrics.add_group(replace(group.stats, ages=(age,)))
            self._say_first_failure(group.stats)
        for name, value in self._gauges().items():
            self._metrics.gauge(name, value)
        for pool in self._pools:
            self._metrics.gauge(f"actors/{pool.role}", pool.num_alive)
        self._metrics.gauge("window/ready", window.ready)
        self._metrics.gauge("window/waiting", window.waiting)
        self._metrics.gauge("window/overtaken", window.overtaken)
        self._metrics.gauge("age/bound", window.bound)
        self._metrics.gauge("time/ready_s", window.ready_s)
        self._metrics.gauge("time/take_s", window.take_s)
        metrics = self._metrics.step(snapshot.metrics.values)
        metrics |= self._watch_for_trap(step, metrics)
        self.steps_done = step + 1
        self._tracker.log(metrics, step=step)
        self._progress.update(step + 1, self._num_steps, _shown(metrics))

    def went_back(self, step: int, *, trap: TrapMonitor | None) -> None:
        """Steps from this one on are taken again; `trap` knows the curves before. Totals keep what was done."""
        self.steps_done = step
        self.trap = trap

    def _watch_for_trap(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        if self.trap is None:
            return {}
        known = self.trap.alert
        curves = self.trap.step(step, metrics)
        if self.trap.alert is not None and known is None:
            self._progress.say(self.trap.alert.in_words())
            _LOG.warning(self.trap.alert.in_words())
        return curves

    def _say_first_failure(self, stats: GroupStats) -> None:
        if stats.failure and not self._said_failure:
            self._said_failure = True
            self._progress.say(f"a sibling left its group, later ones are counted as failures/SOURCE: {stats.failure}")


def _shown(metrics: dict[str, float]) -> dict[str, Field]:
    names = {
        "correct": "correct",
        "reward/judge": "judge",
        "kl": "kl",
        "throughput/dialogues_per_s": "dialogues/s",
        "throughput/tokens_per_s": "tokens/s",
        "age/max": "age",
    }
    return {short: float(metrics[name]) for name, short in names.items() if name in metrics}
