"""`rlaudio cluster CONFIG --kind rayjob|raycluster|autoscaler-aws|autoscaler-local|slurm [key=value ...]`."""

from __future__ import annotations

import argparse
import posixpath
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlaudio.manifests.places import Places
    from rlaudio.manifests.shape import Shape

KINDS = ("rayjob", "raycluster", "autoscaler-aws", "autoscaler-local", "slurm")
IMAGE = "rlaudio:gpu"
SHARED = "/shared"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options besides CONFIG and key=value."""
    command.add_argument("--kind", required=True, choices=KINDS)
    command.add_argument("--image", default=IMAGE, help=f"container image with rlaudio (default {IMAGE})")
    command.add_argument("--shared", default=SHARED, metavar="PATH", help=f"what every node sees (default {SHARED})")
    command.add_argument(
        "--config-path", default="", metavar="PATH", help="the configuration on the nodes (default SHARED/FOLDER/FILE)"
    )


def cluster_command(arguments: argparse.Namespace) -> int:
    """Print a manifest. Raises ConfigError: the configuration does not describe machines, or does not fit them."""
    sys.stdout.write(
        manifest(
            arguments.config,
            arguments.overrides,
            kind=arguments.kind,
            image=arguments.image,
            shared=arguments.shared,
            config_path=arguments.config_path,
        )
    )
    return 0


def manifest(
    config: str,
    overrides: Sequence[str] = (),
    *,
    kind: str,
    image: str = IMAGE,
    shared: str = SHARED,
    config_path: str = "",
) -> str:
    """The manifest's text.

    Raises:
        ConfigError: the configuration does not describe machines, or its actors do not fit into them.
    """
    from rlaudio.config import RunConfig
    from rlaudio.config_checks import run_problems
    from rlaudio.config_loader import load_config
    from rlaudio.manifests.places import Places
    from rlaudio.manifests.shape import shape_of

    run: RunConfig = load_config(RunConfig, config, overrides, check=run_problems)
    shape = shape_of(run)
    file = Path(config).absolute()
    places = Places(
        image=image,
        shared=shared.rstrip("/"),
        config=config_path or posixpath.join(shared, file.parent.name, file.name),
    )
    typed = shlex.join(["rlaudio", "cluster", config, "--kind", kind, *overrides])
    head = "".join(
        f"# {line}\n"
        for line in (
            f"Made by: {typed}",
            f"{shape.nodes} worker nodes of {shape.gpus} GPUs and {shape.cpus} CPUs, packed as:",
            *shape.describe().splitlines(),
        )
    )
    return _written(kind, shape, places, head=head)


def _written(kind: str, shape: Shape, places: Places, *, head: str) -> str:
    import yaml

    from rlaudio.manifests import autoscaler, kuberay, slurm

    if kind == "slurm":
        return f"#!/bin/bash\n{head}{slurm.slurm(shape, places)}"
    makers: dict[str, Callable[[Shape, Places], dict[str, Any]]] = {
        "rayjob": kuberay.ray_job,
        "raycluster": kuberay.ray_cluster,
        "autoscaler-aws": autoscaler.aws,
        "autoscaler-local": autoscaler.own_machines,
    }
    text: str = yaml.dump(makers[kind](shape, places), Dumper=_dumper(), sort_keys=False, width=120)
    return head + text


def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Texts of several lines as blocks; nothing by reference."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper
