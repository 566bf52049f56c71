"""KubeRay's RayCluster and RayJob (apiVersion ray.io/v1, KubeRay 1.6 and later), with token authentication on."""

from __future__ import annotations

import shlex
from typing import Any

from rlaudio.jobs.passed import IN_JOB
from rlaudio.jobs.submission import STOP_WAIT_S
from rlaudio.manifests.places import Places
from rlaudio.manifests.shape import Shape
from rlaudio.preflight import PACKAGES

HEAD_CPUS = 4
HEAD_MEMORY_GB = 32
_SECRET = "rlaudio-secrets"
"""Kubernetes secret whose keys become variables of every pod: OPENAI_API_KEY and the like. It may be missing."""


def ray_cluster(shape: Shape, places: Places) -> dict[str, Any]:
    """A cluster that stays, for `rlaudio submit` through a forwarded port."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(shape),
        "spec": _cluster_spec(shape, places),
    }


def ray_job(shape: Shape, places: Places) -> dict[str, Any]:
    """A cluster for one run, gone when the run has ended."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(shape),
        "spec": {
            "entrypoint": f"rlaudio train {shlex.quote(places.config)}",
            "runtimeEnvYAML": "".join(
                f"{line}\n"
                for line in (
                    "env_vars:",
                    f"  {IN_JOB}: {shape.name}",
                    "  RAY_JOB_STOP_SIGNAL: SIGINT",
                    f'  RAY_JOB_STOP_WAIT_TIME_S: "{STOP_WAIT_S}"',
                )
            ),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 300,
            # A repetition would begin a new run: going on needs `--resume RUN`.
            "backoffLimit": 0,
            "rayClusterSpec": _cluster_spec(shape, places),
        },
    }


def _metadata(shape: Shape) -> dict[str, Any]:
    return {"name": shape.name, "labels": {"app.kubernetes.io/name": "rlaudio", "rlaudio/run": shape.name}}


def _cluster_spec(shape: Shape, places: Places) -> dict[str, Any]:
    return {
        "rayVersion": PACKAGES["ray"].pin,
        # The operator makes the token and gives it to every pod, as secret NAME-of-the-cluster, key auth_token.
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": 300},
        "headGroupSpec": {
            # The driver runs here; no actor does.
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
            "template": _pod(
                "ray-head",
                places,
                cpus=HEAD_CPUS,
                memory_gb=HEAD_MEMORY_GB,
                gpus=0,
                store_bytes=HEAD_MEMORY_GB * 10**9 // 4,
                ports={"gcs": 6379, "dashboard": 8265},
            ),
        },
        "workerGroupSpecs": [
            {
                "groupName": "workers",
                "replicas": shape.nodes,
                "minReplicas": 0,
                "maxReplicas": shape.nodes,
                "rayStartParams": {"object-store-memory": str(shape.store_bytes)},
                "template": _pod(
                    "ray-worker",
                    places,
                    cpus=shape.cpus,
                    memory_gb=shape.memory_gb,
                    gpus=shape.gpus,
                    store_bytes=shape.store_bytes,
                ),
            }
        ],
    }


def _pod(
    name: str,
    places: Places,
    *,
    cpus: int,
    memory_gb: int,
    gpus: int,
    store_bytes: int,
    ports: dict[str, int] | None = None,
) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": cpus, "memory": f"{memory_gb}G", **({"nvidia.com/gpu": gpus} if gpus else {})}
    container: dict[str, Any] = {
        "name": name,
        "image": places.image,
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        "envFrom": [{"secretRef": {"name": _SECRET, "optional": True}}],
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [
            {"name": "shared", "mountPath": places.shared},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if ports:
        container["ports"] = [{"containerPort": port, "name": label} for label, port in ports.items()]
    return {
        "spec": {
            "containers": [container],
            # A node that goes may take a checkpoint's time to do so.
            "terminationGracePeriodSeconds": STOP_WAIT_S,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
            **({"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}]} if gpus else {}),
            "volumes": [
                {"name": "shared", "persistentVolumeClaim": {"claimName": places.claim}},
                # Ray's object store, and NCCL's rings.
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{store_bytes // 10**9 + 8}G"}},
            ],
        }
    }
