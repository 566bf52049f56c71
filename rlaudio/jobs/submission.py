"""One run as a job: its environment, its command, and what Ray shows of it beside its state."""

from __future__ import annotations

import re
import secrets
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rlaudio
from rlaudio.errors import ClusterError, ConfigError
from rlaudio.jobs.package import CONFIG_NAME, Package
from rlaudio.jobs.passed import HOOK, IN_JOB
from rlaudio.secrets import is_secret_name, masked

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

STOP_WAIT_S = 600
"""How long a stopped job may take for its checkpoint before it is killed; Ray 2.60 gives 3 s unless told."""
READY_DEADLINE_S = 180.0
"""Between a dashboard that answers and one that takes jobs lie seconds, on a busy machine a minute."""
_NOT_READY = "No available agent to submit job"
"""What Ray 2.60 says meanwhile, with status 500."""
_ALWAYS_PASSED = ("RLAUDIO_MODELS", "HF_HUB_OFFLINE")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked of the cluster.

    Attributes:
        job_id: the job's name in Ray, unique.
        entrypoint: shell command, run on the head in the package's folder.
        env_vars: of the driver and of every actor, no secrets: Ray writes them into its logs.
        secrets: variables that travel inside the package.
        metadata: shown by Ray beside the job.
    """

    job_id: str
    entrypoint: str
    env_vars: dict[str, str]
    secrets: dict[str, str] = field(repr=False)
    metadata: dict[str, str]


def order(
    *,
    name: str,
    config_path: str | Path,
    resume: str | None = None,
    passed: Sequence[str] = (),
    python: str = "",
    environment: Mapping[str, str],
) -> Order:
    """Put an order together.

    Args:
        name: the run's.
        resume: run folder, as the nodes see it.
        passed: `NAME` takes the variable from `environment`, `NAME=value` sets it; a secret only by its name.
        python: interpreter on the nodes; empty: the `rlaudio` on the path that Ray was started with there.

    Raises:
        ConfigError: a variable is misnamed, not set here, or a secret written out; `resume` is no absolute path.
    """
    if resume is not None and not Path(resume).is_absolute():
        raise ConfigError(f"--resume {resume!r}: give the run's folder as an absolute path, as the nodes see it")
    job_id = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    program = [python, "-m", "rlaudio.cli.main"] if python else ["rlaudio"]
    words = [*program, "train", CONFIG_NAME, *(["--resume", resume] if resume is not None else [])]
    metadata = {
        "run": name,
        "config": Path(config_path).name,
        "rlaudio": rlaudio.__version__,
        "git_commit": git_commit(Path(config_path).absolute().parent),
        **({"resume": resume} if resume is not None else {}),
    }
    variables = _variables(passed, environment)
    return Order(
        job_id=job_id,
        # exec: the signal of a stop must reach the driver and no shell in front of it.
        entrypoint=f"exec {shlex.join(words)}",
        env_vars={
            **{variable: value for variable, value in variables.items() if not is_secret_name(variable)},
            IN_JOB: job_id,
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S),
        },
        secrets={variable: value for variable, value in variables.items() if is_secret_name(variable)},
        metadata={key: masked(value, environment=environment) for key, value in metadata.items() if value},
    )


def send(
    client: JobSubmissionClient,
    package: Package,
    asked: Order,
    *,
    deadline_s: float = READY_DEADLINE_S,
    pause_s: float = 2.0,
    told: Callable[[str], None] = lambda text: None,
) -> None:
    """Upload the package and start the job. A head that has just come up is asked again until it takes jobs.

    Raises:
        ClusterError: the head refuses the job, or takes none within `deadline_s`.
    """
    until = time.monotonic() + deadline_s
    with tempfile.TemporaryDirectory(prefix="rlaudio-") as folder:
        path = Path(folder) / "package.zip"
        replace(package, secrets=asked.secrets).write(path)
        path.chmod(0o600)
        runtime_env: dict[str, Any] = {"working_dir": str(path), "env_vars": asked.env_vars}
        if asked.secrets:
            runtime_env["worker_process_setup_hook"] = HOOK
        while True:
            try:
                client.submit_job(
                    entrypoint=asked.entrypoint,
                    submission_id=asked.job_id,
                    runtime_env=runtime_env,
                    metadata=asked.metadata,
                )
            except (RuntimeError, ValueError) as error:
                if _NOT_READY not in str(error) or time.monotonic() > until:
                    raise ClusterError(f"the head refuses the job: {masked(str(error))}") from error
                told("the head takes no jobs yet, asking again")
                time.sleep(pause_s)
            else:
                return


def git_commit(folder: Path) -> str:
    """The commit of `folder`'s repository, `-dirty` behind it when something differs; empty without one."""
    try:
        asked = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        result = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def _variables(passed: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    variables = {name: environment[name] for name in _ALWAYS_PASSED if name in environment}
    for entry in passed:
        name, given, value = entry.partition("=")
        if not _NAME.fullmatch(name):
            raise ConfigError(f"--env {name!r} is no name of a variable: write NAME, or NAME=value")
        if given and is_secret_name(name):
            raise ConfigError(
                f"--env {name}=... would leave a secret in the shell's history: set {name} in the environment, and "
                f"pass it with --env {name}"
            )
        if not given and name not in environment:
            raise ConfigError(f"--env {name}: it is not set here; set it, or leave it out if the nodes have it")
        variables[name] = value if given else environment[name]
    return variables
