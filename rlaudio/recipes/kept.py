"""Ray, engines and judges that one stage of a pipeline leaves running for the stage after it.

A big model's engine takes minutes to start: weights are read, graphs are captured. Where two stages of reinforcement
learning follow each other, and nothing that engines and judges were built from differs but the policy's trained
weights, the second takes them over. The first broadcast of its learner brings them its weights, and reward actors build
its sources around the judge model that they serve. Ranks, ledger and prompts are always the stage's own, so a stage can
be killed and resumed by itself: a process that starts anew finds nothing kept, and starts engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle

from rlaudio.actors.members import DEATHS, ActorPool
from rlaudio.config import RewardSettings, RunConfig
from rlaudio.errors import EngineError
from rlaudio.recipes.cluster import actor_environment
from rlaudio.recipes.places import Places
from rlaudio.recipes.stored_weights import differ_in_weights_alone

Handles = tuple[ActorHandle[Any], ...]


@dataclass(frozen=True, slots=True)
class Left:
    """What a run leaves.

    Attributes:
        config: the run's.
        environment: variables of its actors.
        places: the room that it has, also for the ranks that are gone.
    """

    config: RunConfig
    environment: Mapping[str, str]
    places: Places
    rollouts: Handles
    rewards: Handles

    async def living(self) -> tuple[Handles, Handles]:
        """Rollout and reward actors, without those that died meanwhile or do not answer."""
        rollouts, rewards = await asyncio.gather(
            _living(self.rollouts, deadline_s=self.config.rollout.alive_deadline_s),
            _living(self.rewards, deadline_s=self.config.rewards.alive_deadline_s),
        )
        return rollouts, rewards


class Kept:
    """A pipeline has one, and says of every stage when it begins and what comes after it."""

    def __init__(self) -> None:
        self._left: Left | None = None
        self._next: object = None

    @property
    def waits(self) -> bool:
        """Whether actors wait for the next run, in a Ray that is joined already."""
        return self._left is not None

    def begin(self, stage: object, *, then: object) -> None:
        """A stage begins; what it cannot take over is ended.

        Args:
            stage, then: its configuration, and that of the stage after it, if there is one.
        """
        self.fit(stage)
        self._next = then

    def fit(self, stage: object) -> None:
        """End what a run of this very configuration cannot take over: its file may have changed since `begin`."""
        if self._left is not None and not _can_go_on(self._left, stage):
            self.close()

    def take(self) -> Left | None:
        """What the stage that began takes over; from now on it ends it, or leaves it."""
        left, self._left = self._left, None
        return left

    def leave(self, config: RunConfig, *, places: Places, rollouts: ActorPool, rewards: ActorPool) -> None:
        """A run ended well: what the next one may need goes on. Pools and places are then empty; else nothing is done.

        Weights are not looked at: the next run's may not be there yet.
        """
        if not isinstance(self._next, RunConfig) or built_from(config) != built_from(self._next):
            return
        self._left = Left(
            config,
            actor_environment(),
            places.moved(),
            rollouts.handed_over(config.rollout.actors),
            rewards.handed_over(config.rewards.actors),
        )

    def close(self) -> None:
        """End whatever waits, and Ray with it. Calling it twice is harmless."""
        left = self.take()
        if left is None:
            return
        for handle in (*left.rollouts, *left.rewards):
            ray.kill(handle)
        left.places.release()
        ray.shutdown()


def built_from(config: RunConfig) -> tuple[object, ...]:
    """What engines, judges and room of a run are built from, the policy's checkpoint apart. Equal: they fit both."""
    rewards, own, learner = config.rewards, RewardSettings(), config.learner
    return (
        config.recipe,
        config.run.seed,
        replace(config.model, path=""),
        (config.data.clips, config.data.augment),
        config.dialogue,
        config.sampling,
        config.rollout,
        replace(rewards, sources=own.sources, shuffle=own.shuffle, min_siblings=own.min_siblings),
        (learner.ranks, learner.num_cpus, learner.num_gpus, learner.train_encoder),
        config.sync,
        config.cluster,
    )


def _can_go_on(left: Left, stage: object) -> bool:
    if not isinstance(stage, RunConfig) or built_from(left.config) != built_from(stage):
        return False
    # Code beside the stage's file is found by a variable that an actor has had since it started.
    if left.environment != actor_environment():
        return False
    model, path = left.config.model, stage.model.path
    return path == model.path or differ_in_weights_alone(model, path)


async def _living(handles: Handles, *, deadline_s: float) -> Handles:
    async def lives(handle: ActorHandle[Any]) -> bool:
        try:
            await asyncio.wait_for(_pinged(handle), deadline_s)
        except (TimeoutError, EngineError, *DEATHS):
            ray.kill(handle)
            return False
        return True

    found = await asyncio.gather(*(lives(handle) for handle in handles))
    return tuple(handle for handle, alive in zip(handles, found, strict=True) if alive)


async def _pinged(handle: ActorHandle[Any]) -> None:
    await handle.ping.remote()
