"""How big a cluster a configuration asks for: the same sums as `rlaudio doctor --static`."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from rlaudio.config import RunConfig
from rlaudio.doctor.static.placement import actors, machines, place
from rlaudio.errors import ConfigError

_MEMORY_SHARE = 0.9
"""Of a node's memory; the rest is the system's."""
_STORE_SHARE = 0.3
"""Of that for Ray's object store: weights under way, experience, encoder states. Ray's own default."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Equal worker nodes, and a head beside them for the driver.

    Attributes:
        name: of the run, fit for a resource's name.
        cpus, gpus: of one worker; no node is asked for more CPUs than its actors reserve.
        memory_gb: of one worker, 10^9 bytes, the object store included.
        layout: (number of nodes, what lies on each), for the manifest's head.
    """

    name: str
    nodes: int
    cpus: int
    gpus: int
    memory_gb: int
    gpu: str
    layout: tuple[tuple[int, str], ...]

    @property
    def store_bytes(self) -> int:
        return int(self.memory_gb * 1e9 * _STORE_SHARE)

    def describe(self) -> str:
        """One line per kind of node."""
        return "\n".join(f"  {count} x {what}" for count, what in self.layout)


def shape_of(config: RunConfig) -> Shape:
    """The cluster that `config` fills.

    Raises:
        ConfigError: the configuration has no `cluster` section, or its actors do not fit into it.
    """
    cluster = config.cluster
    missing = [name for name in ("nodes", "cpus_per_node", "memory_gb") if getattr(cluster, name) <= 0]
    if missing:
        raise ConfigError(
            f"cluster.{missing[0]} is not set, so there is nothing to size by: describe the machines with "
            "cluster.nodes, cpus_per_node, memory_gb, gpus_per_node and gpu_memory_gb"
        )
    placed = place(actors(config), machines(config))
    if placed.left_over:
        wanted = ", ".join(f"{count} of {role}" for role, count in placed.unplaced.items())
        raise ConfigError(
            f"the run does not fit into {cluster.nodes} nodes of {cluster.gpus_per_node} GPUs and "
            f"{cluster.cpus_per_node} CPUs: no place for {wanted}; `rlaudio doctor --static` shows the sums"
        )
    used = [node for node in placed.nodes if node.actors]
    layout = Counter(_on_one_node(Counter(actor.role for actor in node.actors)) for node in used)
    return Shape(
        name=re.sub(r"[^a-z0-9-]+", "-", config.run.name.lower()).strip("-")[:40] or "rlaudio",
        nodes=len(used),
        cpus=max(1, max(math.ceil(sum(actor.cpus for actor in node.actors) - 1e-6) for node in used)),
        gpus=max(math.ceil(sum(actor.gpus for actor in node.actors) - 1e-6) for node in used),
        memory_gb=max(1, int(cluster.memory_gb * _MEMORY_SHARE)),
        gpu=cluster.gpu,
        layout=tuple((count, what) for what, count in layout.items()),
    )


def _on_one_node(roles: Counter[str]) -> str:
    names = {"rollout": "rollout engine", "rewards": "reward actor", "learner": "learner rank"}
    return " + ".join(f"{count} {names[role]}{'s' if count > 1 else ''}" for role, count in sorted(roles.items()))
