"""A Ray cluster of a head and two nodes on this machine; nodes that are killed are replaced."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.chaos.faults import Node

CPUS = {"pool": 1, "learner": 4}
"""Nodes by name. The head has none: what asks for CPUs goes where it fits (`real.py`)."""
ATTEMPTS = 4
# Ray 2.60: a node that is killed is noticed after five health checks in a row, of 3 s each unless told otherwise.
_HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_timeout_ms": 10_000}
_PATIENCE = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Nodes:
    """Every node but the head has a directory of its own, where its object store spills, and a name as a resource.

    Args:
        folder: of the directories, and of the file that says which process each node is.
    """

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        self.file = folder / "nodes.json"
        self._made = 0
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": _HEALTH}
        self._cluster = started(lambda: Cluster(initialize_head=True, head_node_args=head))
        self._nodes: dict[str, Any] = {}
        self._said: dict[str, Node] = {}
        for name in CPUS:
            self._add(name)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def node(self, name: str) -> Node:
        return self._said[name]

    def replace(self, name: str) -> None:
        """What is left of a killed node goes, another one comes."""
        self._cluster.remove_node(self._nodes[name], allow_graceful=False)
        self._add(name)

    def stop(self) -> None:
        self._cluster.shutdown()

    def _add(self, name: str) -> None:
        self._made += 1
        directory = self._folder / f"{name}-{self._made}"
        directory.mkdir(parents=True)
        node = started(
            lambda: self._cluster.add_node(
                num_cpus=CPUS[name],
                resources={name: 100},
                object_spilling_directory=str(directory),
                include_dashboard=False,
            )
        )
        self._nodes[name] = node
        (raylet,) = node.all_processes["raylet"]
        self._said[name] = Node(raylet.process.pid, str(directory))
        written = self.file.with_suffix(".new")
        written.write_text(json.dumps({each: asdict(one) for each, one in self._said.items()}))
        written.rename(self.file)


@contextmanager
def cluster_of_nodes(folder: Path) -> Iterator[Nodes]:
    """Nodes until the block ends."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(_PATIENCE)
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.stop()


def started(start: Callable[[], Any]) -> Any:
    """Ray 2.60 gives a node's agents 15 s to import and ends the node after: a busy machine takes another go."""
    for _ in range(ATTEMPTS - 1):
        with suppress(Exception):
            return start()
    return start()
