"""Actors that play and judge, without a learner: a checkpoint's weights, and then those of others like it."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.config import ModelSettings, RunConfig
from rlaudio.recipes.cluster import actor_environment
from rlaudio.recipes.places import reserve
from rlaudio.recipes.scaling import supervised
from rlaudio.recipes.stored_weights import StoredTransport, StoredWeights
from rlaudio.types import WeightVersion
from rlaudio.weights.joining import JoinableWeights

_START = WeightVersion(0, 0)


@dataclass(frozen=True, slots=True)
class PlayingActors:
    """What runs.

    Attributes:
        model: what the actors were started with.
        weights: brings engines, of actors that come later too, the weights of another checkpoint.
    """

    rollouts: RolloutPool
    rewards: RewardPool
    model: ModelSettings
    weights: JoinableWeights

    async def load(self, path: str, *, number: int) -> None:
        """Go on with the weights of another checkpoint; see `differ_in_weights_alone`.

        Args:
            number: another one for other weights, from 1 on.

        Raises:
            WeightSyncError: no engine took them.
        """
        stored = dataclasses.replace(self.model, path=path)
        await self.weights.broadcast(StoredWeights(stored, dataclasses.replace(_START, number=number)))


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
    transport = StoredTransport(rollouts.pool, deadline_s=config.sync.deadline_s)
    weights = JoinableWeights(transport, receivers=rollouts.pool, version=_START)
    try:
        await asyncio.gather(rollouts.start(_START), rewards.start())
        async with supervised(config, rollouts=rollouts, rewards=rewards, weights=weights, version=_START, told=told):
            yield PlayingActors(rollouts, rewards, config.model, weights)
    finally:
        rollouts.pool.stop()
        rewards.pool.stop()
        places.release()


def playing_needs(config: RunConfig) -> dict[str, tuple[float, float]]:
    """role -> (CPUs, GPUs) of all its actors together."""
    rollout, rewards = config.rollout, config.rewards
    return {
        "rollout": (rollout.actors * rollout.num_cpus, rollout.actors * rollout.num_gpus),
        "rewards": (rewards.actors * rewards.num_cpus, rewards.actors * rewards.num_gpus),
    }
