"""Joining Ray, and what every actor of a run must find in its environment."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import ray

from rlaudio.errors import ResourceError

_PASSED_ON = ("PYTHONPATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "RLAUDIO_MODELS", "PYTHONDONTWRITEBYTECODE")


def actor_environment() -> dict[str, str]:
    """Variables for every actor: what this process has set of those that matter, after `config_loader.code_path`."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return {"OMP_NUM_THREADS": "1", **passed}


class Waiting(Protocol):
    """Actors that may wait for the next run; see `recipes/kept.py`."""

    @property
    def waits(self) -> bool: ...


@contextmanager
def joined_ray(
    needs: Mapping[str, tuple[float, float]], *, waits: bool = False, kept: Waiting | None = None
) -> Iterator[None]:
    """Join the cluster that `RAY_ADDRESS` or `ray job submit` names, else start a private one and end it afterwards.

    Args:
        needs: role -> (CPUs, GPUs) that all its actors together ask for.
        waits: whoever joins waits for room in a cluster (`recipes/places.py`), whose nodes may still have to start.
        kept: what an earlier run left for this one, in a Ray that is joined already, or this one leaves for the next.

    Raises:
        ResourceError: the cluster is smaller than the run, or cannot be joined.
    """
    if kept is None or not kept.waits:
        _join(needs, waits=waits)
    try:
        yield
    finally:
        if kept is None or not kept.waits:
            ray.shutdown()


def _join(needs: Mapping[str, tuple[float, float]], *, waits: bool) -> None:
    address = os.environ.get("RAY_ADDRESS")
    # A failed call has two return values here and only its header is fetched: the other is not an unseen error.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        else:
            # The dashboard needs ports and memory that a laptop's first run does not have to spend.
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                num_cpus=_private_cpus(needs),
            )
    except Exception as error:  # Ray 2.60 raises its very base where a node does not come up in time
        where = f"the Ray cluster at {address}" if address else "a private Ray cluster"
        raise ResourceError(
            f"cannot start on {where}: {error}; check RAY_ADDRESS, or unset it to run on this machine alone"
        ) from error
    if address and waits:
        return
    try:
        _require_resources(needs)
    except ResourceError:
        ray.shutdown()
        raise


def num_nodes() -> int:
    """Living nodes of the cluster that was joined."""
    return sum(bool(node["Alive"]) for node in ray.nodes())


def _private_cpus(needs: Mapping[str, tuple[float, float]]) -> int:
    # A private cluster takes the run's word for its size: two cores share three roles well enough to try it.
    wanted = sum(cpus for cpus, _ in needs.values())
    return max(os.cpu_count() or 1, int(-(-wanted // 1)))


def _require_resources(needs: Mapping[str, tuple[float, float]]) -> None:
    have = ray.cluster_resources()
    for index, kind in enumerate(("CPU", "GPU")):
        wanted = sum(need[index] for need in needs.values())
        if wanted > have.get(kind, 0.0) + 1e-6:
            parts = ", ".join(f"{role} {need[index]:g}" for role, need in needs.items())
            raise ResourceError(
                f"the run asks for {wanted:g} {kind}s ({parts}) and the cluster has {have.get(kind, 0.0):g}: "
                "lower the actor counts or their num_cpus/num_gpus, or join a bigger cluster"
            )
