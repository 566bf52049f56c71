"""A real `ray start --head` with a token, on ports and in a folder of its own; only its own processes are ended."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

START_DEADLINE_S = 300.0
_PORT_OPTIONS = (
    "--port",
    "--dashboard-port",
    "--dashboard-agent-listen-port",
    "--dashboard-agent-grpc-port",
    "--runtime-env-agent-port",
    "--metrics-export-port",
    "--ray-client-server-port",
    "--node-manager-port",
    "--object-manager-port",
)


@dataclass(frozen=True)
class Head:
    """`folder` holds its logs; `token` is asked of everybody."""

    folder: Path
    token: str = field(repr=False)
    ports: dict[str, int]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.ports['--dashboard-port']}"


@contextmanager
def running_head(*, num_cpus: int = 4) -> Iterator[Head]:
    """Start a head, wait until it takes jobs, end it and everything that it started."""
    folder = Path(tempfile.mkdtemp(prefix="rlh", dir="/tmp"))  # Ray's sockets have names of at most 107 characters
    head = Head(folder, os.urandom(24).hex(), free_ports())
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--include-dashboard", "true"),
                # 0: every worker binds a port that is free.
                *("--min-worker-port", "0", "--max-worker-port", "0"),
                *(word for option, port in head.ports.items() for word in (option, str(port))),
                *("--num-cpus", str(num_cpus), "--num-gpus", "0", "--object-store-memory", str(256 << 20)),
                *("--temp-dir", str(folder / "ray"), "--disable-usage-stats"),
            ],
            env=head_environment(head),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_ready(head, process)
        yield head
    finally:
        end_tree(process)
        shutil.rmtree(folder, ignore_errors=True)


def head_environment(head: Head) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    patience = {
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": str(int(START_DEADLINE_S)),  # 60 by default: ten processes import Ray
        "RAY_raylet_start_wait_time_s": "200",
        "RAY_agent_register_timeout_ms": "200000",
        "RAY_gcs_server_request_timeout_seconds": "200",
    }
    return {**kept, **patience, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": head.token, "HOME": str(head.folder)}


def free_ports() -> dict[str, int]:
    with ExitStack() as held:
        sockets = {option: held.enter_context(socket.socket()) for option in _PORT_OPTIONS}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        return {option: one.getsockname()[1] for option, one in sockets.items()}


def wait_until_ready(head: Head, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            answer = requests.get(
                f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}, timeout=5
            )
            if answer.status_code == 200:
                return
            last = f"{answer.status_code}: {answer.text}"
        except requests.RequestException as error:
            last = str(error)
        if process.poll() is not None or time.monotonic() > until:
            log = (head.folder / "head.log").read_text()
            raise AssertionError(f"the head did not come up ({last}); its log:\n{log}")
        time.sleep(0.2)


def end_tree(process: "subprocess.Popen[bytes]") -> None:
    """Ray gives its workers process groups of their own, so they are found as descendants before the head ends."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for one in tree:
        if one.is_running():  # compares start times: never another process with the same number
            one.kill()
    psutil.wait_procs(tree, timeout=20)
    process.wait(timeout=20)
