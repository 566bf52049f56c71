"""The sizes of a run's pools while it goes on: who looks after each pool, and who may ask for another size."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol

import ray
from ray.actor import ActorHandle

from rlaudio.actors.autoscale import NUM_LOOKS, Look, next_change
from rlaudio.actors.members import ActorPool
from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.actors.supervisor import Hiring, PoolSize, Supervisor
from rlaudio.config import RunConfig
from rlaudio.errors import ConfigError, ResourceError
from rlaudio.types import WeightVersion
from rlaudio.weights.joining import JoinableWeights


class Scaling:
    """What a command or a policy asks for, carried out by the pools' supervisors.

    Args:
        supervisors: by the name that a person calls the pool: rollout, reward.
        needs: (CPUs, GPUs) of one actor of each.
        new_nodes: Ray's autoscaler finds room for what there is no room for.
        free: the cluster's free resources, by Ray's names.
    """

    def __init__(
        self,
        supervisors: Mapping[str, Supervisor],
        needs: Mapping[str, tuple[float, float]],
        *,
        new_nodes: bool = False,
        free: Callable[[], Mapping[str, float]] = ray.available_resources,
    ) -> None:
        self.supervisors = supervisors
        self._needs, self._new_nodes, self._free = needs, new_nodes, free

    def sizes(self) -> dict[str, PoolSize]:
        return {name: supervisor.size for name, supervisor in self.supervisors.items()}

    def ask(self, wanted: Mapping[str, int]) -> None:
        """Ask for sizes, all or none of them; see `Supervisor.resize`.

        Raises:
            ConfigError: a size is below 1, or there is no such pool.
            ResourceError: the cluster has no room, and no way to get some; says what is missing.
        """
        for name, size in wanted.items():
            if name not in self.supervisors or size < 1:
                raise ConfigError(f"{name}={size}: a run has pools {', '.join(self.supervisors)} of 1 actor or more")
        if not self._new_nodes:
            self._require_room(wanted)
        for name, size in wanted.items():
            self.supervisors[name].resize(size)

    def _require_room(self, wanted: Mapping[str, int]) -> None:
        more = {name: size - self._held(name) for name, size in wanted.items()}
        if all(number <= 0 for number in more.values()):
            return
        free = self._free()
        for index, kind in enumerate(("CPU", "GPU")):
            missing = sum(number * self._needs[name][index] for name, number in more.items()) - free.get(kind, 0.0)
            if missing > 1e-6:
                asked = ", ".join(f"{name}={size} ({self._needs[name][index]:g} each)" for name, size in wanted.items())
                raise ResourceError(
                    f"{asked}: {missing:g} {kind}s are missing, the cluster has {free.get(kind, 0.0):g} free: add "
                    "nodes or ask for less; where Ray's autoscaler adds nodes, set supervision.new_nodes=true"
                )

    def _held(self, name: str) -> int:
        size = self.supervisors[name].size
        return size.serving + size.coming


@asynccontextmanager
async def supervised(
    config: RunConfig,
    *,
    rollouts: RolloutPool,
    rewards: RewardPool,
    weights: JoinableWeights,
    version: WeightVersion,
    told: Callable[[str], None],
) -> AsyncIterator[Scaling]:
    """Look after both pools until the block ends.

    Args:
        version: what the checkpoint's weights count as in an actor that starts.
    """

    async def join_rollout(name: str, handle: ActorHandle[Any], take_in: Callable[[], None]) -> None:
        await weights.join(name, handle, take_in=take_in)

    async def join_reward(name: str, handle: ActorHandle[Any], take_in: Callable[[], None]) -> None:
        take_in()

    rollout, reward = config.rollout, config.rewards
    hirings = {
        "rollout": Hiring(
            lambda name: rollouts.make(), rollouts.starting(version), rollout.start_deadline_s, join_rollout
        ),
        "reward": Hiring(lambda name: rewards.make(), rewards.starting(), reward.start_deadline_s, join_reward),
    }
    pools = {"rollout": rollouts.pool, "reward": rewards.pool}
    supervisors = {
        name: Supervisor(pools[name], hiring, settings=config.supervision, seed=config.run.seed, told=told)
        for name, hiring in hirings.items()
    }
    needs = {
        "rollout": (rollout.num_cpus, rollout.num_gpus),
        "reward": (reward.num_cpus, reward.num_gpus),
    }
    try:
        yield Scaling(supervisors, needs, new_nodes=config.supervision.new_nodes)
    finally:
        for supervisor in supervisors.values():
            await supervisor.stop()


class Busy(Protocol):
    """Something that works, or waits for work."""

    @property
    def is_busy(self) -> bool: ...


LOOKS_PER_INTERVAL = 20


@asynccontextmanager
async def autoscaling(
    config: RunConfig,
    scaling: Scaling,
    *,
    rollouts: ActorPool,
    rewards: ActorPool,
    learner: Busy,
    told: Callable[[str], None],
) -> AsyncIterator[None]:
    """Follow the queue until the block ends, where `autoscale` gives limits; see `rlaudio.actors.autoscale`."""
    settings = config.autoscale
    if not settings.rollout and not settings.reward:
        yield
        return
    num_slots = (config.algorithm.max_staleness + 1) * config.algorithm.groups_per_step
    following = asyncio.create_task(_follow(config, scaling, rollouts, rewards, learner, num_slots, told))
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait([following])
        if not following.cancelled() and (error := following.exception()) is not None:
            raise error


async def _follow(
    config: RunConfig,
    scaling: Scaling,
    rollouts: ActorPool,
    rewards: ActorPool,
    learner: Busy,
    num_slots: int,
    told: Callable[[str], None],
) -> None:
    settings = config.autoscale
    looks: deque[Look] = deque(maxlen=NUM_LOOKS)
    refused = ""
    while True:
        looks.append(await _look(rollouts, rewards, learner, look_s=settings.look_s))
        change = next_change(list(looks), settings, num_slots=num_slots)
        # While somebody comes or goes, nobody knows yet what that will do.
        if change is None or not all(size.settled for size in scaling.sizes().values()):
            continue
        try:
            scaling.ask({change.pool: change.size})
        except ResourceError as error:
            if str(error) != refused:
                refused = str(error)
                told(f"autoscale would ask for {change.pool}={change.size} ({change.why}), but {error}")
            continue
        told(f"autoscale: {change.pool}={change.size}, {change.why}")


async def _look(rollouts: ActorPool, rewards: ActorPool, learner: Busy, *, look_s: float) -> Look:
    """One interval, looked at in `LOOKS_PER_INTERVAL` moments."""
    busy = playing = judging = 0.0
    for _ in range(LOOKS_PER_INTERVAL):
        await asyncio.sleep(look_s / LOOKS_PER_INTERVAL)
        busy += learner.is_busy / LOOKS_PER_INTERVAL
        playing += rollouts.num_calls / LOOKS_PER_INTERVAL
        judging += rewards.num_calls / LOOKS_PER_INTERVAL
    now_s = asyncio.get_running_loop().time()
    return Look(now_s, max(1, rollouts.num_alive), max(1, rewards.num_alive), busy, playing, judging)
