"""Secrets on their way to a job's processes: in a file that only their owner reads, never in its `runtime_env`.

Ray 2.60 writes a job's `env_vars` in clear into the nodes' logs. So what `submit --env NAME` takes along for a secret
lies in the package; Ray's setup hook puts it into the environment of each process of the job.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

FILE = ".rlaudio-passed.json"
HOOK = "rlaudio.jobs.passed.take"
IN_JOB = "RLAUDIO_JOB"
"""Set in a submitted run to the job's id: the run then reports its folder and MLflow link in its log."""


def written(variables: Mapping[str, str]) -> bytes:
    """The file's content."""
    return json.dumps(dict(sorted(variables.items()))).encode()


def take() -> None:
    """Put the variables of `FILE`, in the working directory, into this process's environment; none is no error."""
    try:
        variables = json.loads(Path(FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    os.environ.update({str(name): str(value) for name, value in variables.items()})


def enter_job() -> None:
    """In a submitted run: take what was passed, and let a stop be heard.

    A Ray that was started in a script's background has SIGINT ignored, and so have its children.
    """
    if IN_JOB in os.environ:
        take()
        signal.signal(signal.SIGINT, signal.default_int_handler)
