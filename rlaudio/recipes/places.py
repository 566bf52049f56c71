"""Room for a run on a cluster: placement groups made before any actor. A run has all its room, or says what is missing.

- **Learner ranks** are packed: as many on a node as fit, so that gradients cross as few cables as can be.
- **Engines** are packed too; one engine's GPUs are one bundle, which Ray never divides between nodes.
- **Judges** are spread over nodes, apart from each other.

A private Ray is as big as its run and needs none of this.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlaudio.config import RunConfig
from rlaudio.errors import ClusterError

_SLICE_S = 5.0
"""Ray's wait blocks a thread: it is asked in slices, so that a stop is not waited for."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a role asks for: `count` bundles of `cpus` and `gpus`. `setting` says how many there are."""

    role: str
    setting: str
    count: int
    cpus: float
    gpus: float
    strategy: str

    @property
    def bundle(self) -> dict[str, float]:
        return {kind: value for kind, value in (("CPU", self.cpus), ("GPU", self.gpus)) if value > 0}

    def __str__(self) -> str:
        total = " and ".join(f"{self.count * value:g} {kind}s" for kind, value in reversed(self.bundle.items()))
        each = ", ".join(f"{value:g} {kind}s" for kind, value in reversed(self.bundle.items()))
        return f"{total} for {self.role} ({self.setting}={self.count}, each {each} on one node)"


def wishes(config: RunConfig) -> list[Wish]:
    """What a run asks for, in the order in which it is reserved: what is packed goes before what is spread."""
    rollout, rewards, learner = config.rollout, config.rewards, config.learner
    found = [
        Wish("learner", "learner.ranks", learner.ranks, learner.num_cpus, learner.num_gpus, "PACK"),
        Wish("rollout", "rollout.actors", rollout.actors, rollout.num_cpus, rollout.num_gpus, "PACK"),
        Wish("rewards", "rewards.actors", rewards.actors, rewards.num_cpus, rewards.num_gpus, "SPREAD"),
    ]
    return [wish for wish in found if wish.bundle]


class Places:
    """The room that a run has. `options` is asked once for each actor that is made."""

    def __init__(self) -> None:
        self._groups: dict[str, tuple[Wish, PlacementGroup]] = {}
        self._num_given: dict[str, int] = {}

    def options(self, role: str) -> dict[str, Any]:
        """Options for the next actor of `role`: a reserved place, or none when all are taken and Ray finds another.

        A place is free again when the actor in it has died, so a restarted actor comes back to it. One whose node died
        is waited for: it takes the room of the next node, where without it there might be none left.
        """
        if role not in self._groups:
            return {}
        wish, group = self._groups[role]
        given = self._num_given.get(role, 0)
        if given >= wish.count and not _is_homeless(group) and not _has_room(wish, group):
            return {}
        self._num_given[role] = given + 1
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group)}

    def own(self, role: str) -> dict[str, Any]:
        """As `options`, for a role that never has more actors than were wished for, and starts all of them anew."""
        if role not in self._groups:
            return {}
        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._groups[role][1])}

    def moved(self) -> Places:
        """The room with all who are in it, for the next run, which says who goes on; none is left here."""
        places = Places()
        places._groups, self._groups = self._groups, {}
        return places

    def taken_over(self, role: str, count: int) -> None:
        """So many actors of `role` go on in their places; whoever is missing gets one, as soon as it is free again."""
        self._num_given[role] = count

    def release(self) -> None:
        """Give all room back; actors in it end. Calling it twice is harmless."""
        while self._groups:
            _, (_, group) = self._groups.popitem()
            remove_placement_group(group)

    async def reserve(self, wish: Wish, *, until_s: float, waited_for: Callable[[str], None]) -> None:
        """Reserve one role's room.

        Raises:
            ClusterError: there was none until `until_s` on the monotonic clock: says what was asked for and is free.
        """
        group = placement_group([wish.bundle] * wish.count, strategy=wish.strategy)
        self._groups[wish.role] = (wish, group)
        started_s = time.monotonic()
        while True:
            left_s = until_s - time.monotonic()
            if await asyncio.to_thread(group.wait, max(0.1, min(left_s, _SLICE_S))):
                return
            if left_s <= _SLICE_S and time.monotonic() >= until_s:
                raise ClusterError(
                    f"{_missing(wish)}; waited {time.monotonic() - started_s:.0f} s (cluster.room_deadline_s): lower "
                    f"{wish.setting} or what each reserves, end another run, or join a bigger cluster"
                )
            waited_for(f"waiting for room: {_missing(wish)}")


async def reserve(config: RunConfig, *, told: Callable[[str], None]) -> Places:
    """Room for a run's actors in the cluster that was joined; nothing is reserved in a private Ray.

    Args:
        told: hears once of each role that is waited for.

    Raises:
        ClusterError: the cluster has no room for a role within `cluster.room_deadline_s`.
    """
    places = Places()
    if not os.environ.get("RAY_ADDRESS"):
        return places
    until_s = time.monotonic() + config.cluster.room_deadline_s
    try:
        for wish in wishes(config):
            heard: list[str] = []

            def once(text: str, heard: list[str] = heard) -> None:
                if not heard:
                    told(text)
                heard.append(text)

            await places.reserve(wish, until_s=until_s, waited_for=once)
    except BaseException:
        places.release()
        raise
    return places


def _is_homeless(group: PlacementGroup) -> bool:
    """Whether Ray looks for a node for some of it."""
    state: str = placement_group_table(group)["state"]
    return state != "CREATED"


def _has_room(wish: Wish, group: PlacementGroup) -> bool:
    free = ray.available_resources()
    return all(free.get(f"{kind}_group_{group.id.hex()}", 0.0) >= value for kind, value in wish.bundle.items())


def _missing(wish: Wish) -> str:
    have, free = ray.cluster_resources(), ray.available_resources()
    kinds = list(reversed(wish.bundle))
    state = " and ".join(f"{free.get(kind, 0.0):g} of {have.get(kind, 0.0):g} {kind}s free" for kind in kinds)
    text = f"the run asks for {wish}, and the cluster has {state}"
    for kind, value in wish.bundle.items():
        biggest = max((node["Resources"].get(kind, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        if biggest < value:
            text += f"; no node has {value:g} {kind}s, the biggest has {biggest:g}"
    if wish.gpus and wish.count * wish.gpus > free.get("GPU", 0.0):
        text += "; each actor keeps its GPUs for the whole run: engines and learner cannot take turns on the same ones"
    return text
