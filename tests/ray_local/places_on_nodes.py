"""Placement groups on a cluster of several nodes with GPUs that are only counted: real Ray, no devices."""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from rlaudio.config import RunConfig
from rlaudio.errors import ClusterError
from rlaudio.recipes.places import Places, reserve, wishes

HEAD = {"num_cpus": 8, "num_gpus": 4, "include_dashboard": False}

pytestmark = pytest.mark.timeout(600)


class Actor:
    """Says where it is."""

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def config_of(**changes: Any) -> RunConfig:
    """Three learner ranks of one GPU, an engine of two, two judges of one: seven of eight GPUs."""
    config = RunConfig()
    config.learner.ranks, config.learner.num_gpus, config.learner.num_cpus = 3, 1.0, 0.5
    config.rollout.actors, config.rollout.num_gpus, config.rollout.num_cpus = 1, 2.0, 0.5
    config.rewards.actors, config.rewards.num_gpus, config.rewards.num_cpus = 2, 1.0, 0.5
    config.cluster.room_deadline_s = 300.0
    for key, value in changes.items():
        section, name = key.split("__")
        setattr(getattr(config, section), name, value)
    return config


def started(start: Callable[[], Any]) -> Any:
    """Ray 2.60 gives a node's agents 15 s to import and ends the node after: a busy machine takes another go."""
    for _ in range(3):
        with suppress(Exception):
            return start()
    return start()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes of four GPUs."""
    assert not ray.is_initialized()
    cluster = started(lambda: Cluster(initialize_head=True, head_node_args=HEAD))
    started(lambda: cluster.add_node(num_cpus=8, num_gpus=4))
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = cluster.address
    try:
        ray.init(address=cluster.address, log_to_driver=False, namespace="places")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


def made(places: Places, config: RunConfig, role: str, count: int) -> list[Any]:
    (wish,) = (one for one in wishes(config) if one.role == role)
    remote = ray.remote(Actor)
    return [
        remote.options(num_cpus=wish.cpus, num_gpus=wish.gpus, **places.options(role)).remote() for _ in range(count)
    ]


def nodes_of(actors: list[Any]) -> list[str]:
    return ray.get([actor.node.remote() for actor in actors], timeout=200)


def groups_left() -> int:
    return sum(row["state"] != "REMOVED" for row in placement_group_table().values())


def wait_until(true: Any, *, deadline_s: float = 100.0) -> None:
    until = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_ranks_are_packed_and_judges_are_apart(cluster: Cluster) -> None:
    config = config_of()
    told: list[str] = []
    places = asyncio.run(reserve(config, told=told.append))
    try:
        learner = made(places, config, "learner", 3)  # kept: an actor that nobody holds ends, and its place is free
        ranks = nodes_of(learner)
        judges = nodes_of(made(places, config, "rewards", 2))
        engines = made(places, config, "rollout", 1)
        assert len(set(ranks)) == 1, "three ranks fit on one node"
        assert len(set(judges)) == 2, "both nodes have room for a judge"
        nodes = nodes_of(engines)
        used = Counter(ranks) + Counter(judges) + Counter({node: 2 * count for node, count in Counter(nodes).items()})
        assert max(used.values()) <= 4
        assert told == []

        # Ranks that start again have the places that they had, whether or not Ray has seen the others end.
        assert len(learner) == 3 and places.options("learner") == {}
        assert "scheduling_strategy" in places.own("learner") and places.own("nobody") == {}
        # A restarted actor comes back to its place; one more than was reserved is left to Ray.
        assert places.options("rollout") == {}
        ray.kill(engines[0])
        wait_until(lambda: places.options("rollout") != {})
        assert places.options("nobody") == {}
    finally:
        places.release()
    wait_until(lambda: groups_left() == 0)
    wait_until(lambda: ray.available_resources().get("GPU") == 8)


def test_who_was_lost_with_a_node_waits_for_the_place_that_it_had(cluster: Cluster) -> None:
    """The place comes back with the next node and takes all of it: beside it there would be no room, ever."""
    big = {"num_cpus": 1, "num_gpus": 8}
    node = started(lambda: cluster.add_node(**big))
    config = config_of(rollout__num_gpus=8.0, rollout__num_cpus=1.0, rewards__actors=1)
    places = asyncio.run(reserve(config, told=print))
    try:
        engines = made(places, config, "rollout", 1)
        (lost,) = nodes_of(engines)
        assert places.options("rollout") == {}
        cluster.remove_node(node)
        wait_until(lambda: lost not in [node["NodeID"] for node in ray.nodes() if node["Alive"]])
        assert places.options("rollout") != {}, "Ray looks for another node for it"
        again = made(places, config, "rollout", 1)
        node = started(lambda: cluster.add_node(**big))
        assert nodes_of(again) != [lost]
        assert places.options("rollout") == {}, "it is taken"
    finally:
        places.release()
    cluster.remove_node(node)
    wait_until(lambda: groups_left() == 0 and len([node for node in ray.nodes() if node["Alive"]]) == 2)


def test_what_is_missing_is_said_and_nothing_is_kept(cluster: Cluster) -> None:
    told: list[str] = []
    config = config_of(rollout__actors=8, cluster__room_deadline_s=1.0)
    with pytest.raises(ClusterError) as caught:
        asyncio.run(reserve(config, told=told.append))
    text = str(caught.value)
    assert "16 GPUs and 4 CPUs for rollout (rollout.actors=8, each 2 GPUs, 0.5 CPUs on one node)" in text
    assert "5 of 8 GPUs free" in text and "cannot take turns" in text and "cluster.room_deadline_s" in text
    wait_until(lambda: groups_left() == 0)

    config = config_of(rollout__num_gpus=8.0, cluster__room_deadline_s=1.0)
    with pytest.raises(ClusterError, match=r"no node has 8 GPUs, the biggest has 4"):
        asyncio.run(reserve(config, told=told.append))
    wait_until(lambda: groups_left() == 0)


def test_room_that_comes_free_is_waited_for(cluster: Cluster) -> None:
    holder = ray.remote(Actor).options(num_gpus=4).remote()
    nodes_of([holder])
    told: list[str] = []

    async def waited() -> Places:
        waiting = asyncio.create_task(reserve(config_of(), told=told.append))
        while not told:
            await asyncio.sleep(0.1)
            assert not waiting.done()
        ray.kill(holder)
        return await waiting

    places = asyncio.run(waited())
    places.release()
    assert len(told) == 1 and told[0].startswith("waiting for room: the run asks for")


def test_a_private_ray_is_left_alone(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    places = asyncio.run(reserve(config_of(), told=print))
    assert places.options("learner") == {} and groups_left() == 0
