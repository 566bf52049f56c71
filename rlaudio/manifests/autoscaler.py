"""Ray's own cluster launcher and autoscaler (`ray up`): virtual machines, or machines that one has already."""

from __future__ import annotations

from typing import Any

from rlaudio.errors import ConfigError
from rlaudio.manifests.places import Places
from rlaudio.manifests.shape import Shape

_INSTANCES = {
    ("H100", 8): "p5.48xlarge",
    ("H200", 8): "p5en.48xlarge",
    ("A100", 8): "p4d.24xlarge",
    ("L40S", 8): "g6e.48xlarge",
    ("L40S", 1): "g6e.16xlarge",
    ("L4", 1): "g6.16xlarge",
}
"""AWS instance types by GPU and number; a cluster without GPUs takes `_CPU_INSTANCE`."""
_CPU_INSTANCE = "m7i.24xlarge"
_TOKEN = "/home/ray/.ray/auth_token"


def aws(shape: Shape, places: Places) -> dict[str, Any]:
    """Instances on AWS, started when actors ask for them and ended when they idle.

    Raises:
        ConfigError: no instance type is known for the GPUs.
    """
    return {
        **_common(shape, places),
        "provider": {"type": "aws", "region": "us-east-1", "use_internal_ips": True},
        "auth": {"ssh_user": "ubuntu"},
        "available_node_types": {
            "head": {
                "resources": {"CPU": 0},  # the driver runs here; no actor does
                "node_config": {"InstanceType": "m7i.2xlarge"},
                "min_workers": 0,
                "max_workers": 0,
            },
            "worker": {
                "resources": {"CPU": shape.cpus, **({"GPU": shape.gpus} if shape.gpus else {})},
                "node_config": {"InstanceType": _instance(shape)},
                "min_workers": 0,
                "max_workers": shape.nodes,
            },
        },
        "head_node_type": "head",
    }


def own_machines(shape: Shape, places: Places) -> dict[str, Any]:
    """Machines reached over ssh; their addresses are to be filled in."""
    return {
        **_common(shape, places),
        "provider": {
            "type": "local",
            "head_ip": "head.example.org",
            "worker_ips": [f"worker{index}.example.org" for index in range(1, shape.nodes + 1)],
        },
        "auth": {"ssh_user": "ray", "ssh_private_key": "~/.ssh/id_ed25519"},
    }


def _common(shape: Shape, places: Places) -> dict[str, Any]:
    run_options = [f"--volume={places.shared}:{places.shared}", "--ulimit=nofile=65536:65536"]
    gpus = ["--gpus=all"] if shape.gpus else []
    start = "ulimit -n 65536; RAY_AUTH_MODE=token ray start"
    store = f"--object-store-memory={shape.store_bytes}"
    return {
        "cluster_name": shape.name,
        "max_workers": shape.nodes,
        "idle_timeout_minutes": 10,
        "docker": {
            "image": places.image,
            "container_name": "rlaudio",
            "run_options": [*run_options, f"--shm-size={shape.store_bytes // 10**9 + 8}g"],
            "worker_run_options": gpus,
        },
        # `ray get-auth-token --generate` makes it on the machine that runs `ray up`.
        "file_mounts": {_TOKEN: "~/.ray/auth_token"},
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1"
            " --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            "ray stop",
            f"{start} --address=$RAY_HEAD_IP:6379 --num-cpus={shape.cpus} --num-gpus={shape.gpus} {store}",
        ],
    }


def _instance(shape: Shape) -> str:
    if not shape.gpus:
        return _CPU_INSTANCE
    for (gpu, count), name in _INSTANCES.items():
        if shape.gpu.upper().startswith(gpu) and count >= shape.gpus:
            return name
    known = ", ".join(f"{count} {gpu}" for gpu, count in _INSTANCES)
    raise ConfigError(
        f"no AWS instance type is known for {shape.gpus} {shape.gpu or 'GPUs of no name'} a node (cluster.gpu): there "
        f"are {known}; or use --kind autoscaler-local"
    )
