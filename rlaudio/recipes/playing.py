"""Actors that play and judge, without a learner: one checkpoint's weights for as long as they live."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.config import RunConfig
from rlaudio.errors import WeightSyncError
from rlaudio.recipes.cluster import actor_environment
from rlaudio.recipes.places import reserve
from rlaudio.recipes.scaling import supervised
from rlaudio.types import WeightVersion
from rlaudio.weights.base import Broadcast, Receivers, SnapshotRef
from rlaudio.weights.joining import JoinableWeights

_START = WeightVersion(0, 0)


@dataclass(frozen=True, slots=True)
class PlayingActors:
    rollouts: RolloutPool
    rewards: RewardPool


@asynccontextmanager
async def playing_actors(config: RunConfig, *, told: Callable[[str], None]) -> AsyncIterator[PlayingActors]:
    """The engines and judges of `config` with the weights of `model.path`, supervised; ended on the way out.

    Args:
        told: hears of actors that are left out.
    """
    environment = actor_environment()
    # A learner that reserves nothing is not waited for.
    unlearned = dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_cpus=0.0, num_gpus=0.0))
    places = await reserve(unlearned, told=told)
    rollouts = RolloutPool(config, environment=environment, told=told, place=places.options)
    rewards = RewardPool(config, environment=environment, told=told, place=places.options)
    weights = JoinableWeights(_NeverMoving(), receivers=rollouts.pool, version=_START)
    try:
        await asyncio.gather(rollouts.start(_START), rewards.start())
        async with supervised(config, rollouts=rollouts, rewards=rewards, weights=weights, version=_START, told=told):
            yield PlayingActors(rollouts, rewards)
    finally:
        rollouts.pool.stop()
        rewards.pool.stop()
        places.release()


class _NeverMoving:
    """A `WeightTransport` with nothing to carry: whoever starts holds the checkpoint, and that is all there is."""

    async def broadcast(self, snapshot: SnapshotRef, *, to: Receivers | None = None) -> Broadcast:
        raise WeightSyncError(f"weights {snapshot.version} cannot be sent: nothing is trained beside these actors")


def playing_needs(config: RunConfig) -> dict[str, tuple[float, float]]:
    """role -> (CPUs, GPUs) of all its actors together."""
    rollout, rewards = config.rollout, config.rewards
    return {
        "rollout": (rollout.actors * rollout.num_cpus, rollout.actors * rollout.num_gpus),
        "rewards": (rewards.actors * rewards.num_cpus, rewards.actors * rewards.num_gpus),
    }
