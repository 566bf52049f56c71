"""Where things lie on the nodes: the only part of a manifest that a configuration does not say."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Places:
    """
    Attributes:
        image: container with rlaudio in it.
        shared: folder that every node sees: configurations, data, checkpoints, runs.
        config: the configuration, on the nodes.
        claim: Kubernetes volume claim (ReadWriteMany) behind `shared`.
    """

    image: str
    shared: str
    config: str
    claim: str = "rlaudio-shared"
