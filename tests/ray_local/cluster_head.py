"""A real `ray start --head` with a token, on ports and in a folder of its own; only its own processes are ended."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

START_DEADLINE_S = 300.0
ATTEMPTS = 4
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
    for attempt in range(1, ATTEMPTS + 1):
        folder = Path(tempfile.mkdtemp(prefix="rlh", dir="/tmp"))  # Ray's sockets have names of at most 107 characters
        head = Head(folder, os.urandom(24).hex(), free_ports())
        process = start(head, num_cpus=num_cpus)
        try:
            try:
                wait_until_ready(head, process)
            except StillbornError:
                if attempt == ATTEMPTS:
                    raise
                continue
            yield head
            return
        finally:
            end_tree(process, folder)
            shutil.rmtree(folder, ignore_errors=True)


class StillbornError(Exception):
    """The head's raylet gave up. Ray 2.60 gives its agents 15 s to import, with no setting for it, and dies after."""


def start(head: Head, *, num_cpus: int) -> "subprocess.Popen[bytes]":
    with (head.folder / "head.log").open("w") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *("--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--include-dashboard", "true"),
                # 0: every worker binds a port that is free.
                *("--min-worker-port", "0", "--max-worker-port", "0"),
                *(word for option, port in head.ports.items() for word in (option, str(port))),
                *("--num-cpus", str(num_cpus), "--num-gpus", "0", "--object-store-memory", str(256 << 20)),
                *("--temp-dir", str(head.folder / "ray"), "--disable-usage-stats"),
            ],
            env=head_environment(head),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


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
    """Return when the node has joined and its dashboard answers.

    Raises:
        StillbornError: the raylet gave up, so another start may do better.
    """
    until = time.monotonic() + START_DEADLINE_S
    log = head.folder / "head.log"
    while True:
        last = "the node has not joined yet"
        if "Ray runtime started" in log.read_text():
            try:
                header = {"Authorization": f"Bearer {head.token}"}
                answer = requests.get(f"{head.address}/api/jobs/", headers=header, timeout=5)
                if answer.status_code == 200:
                    return
                last = f"{answer.status_code}: {answer.text}"
            except requests.RequestException as error:
                last = str(error)
        for raylet in (head.folder / "ray").glob("session_2*/logs/raylet.out"):
            if "Check failed" in (told := raylet.read_text(errors="replace")):
                raise StillbornError(told[told.index("Check failed") :][:500])
        if process.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"the head did not come up ({last}); its log:\n{log.read_text()}")
        time.sleep(0.2)


def end_tree(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Ray gives its workers process groups of their own, so they are found as descendants before the head ends.

    What a raylet that died has left is nobody's descendant any more, and is known by this head's folder.
    """
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in one.cmdline()):
                tree.append(one)
    for one in tree:
        with suppress(psutil.NoSuchProcess):
            one.kill()  # compares start times: never another process with the same number
    psutil.wait_procs(tree, timeout=20)
    process.wait(timeout=20)
