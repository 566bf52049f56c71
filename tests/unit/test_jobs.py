"""What a submitted run takes along, and how the head is found: no Ray runs here."""

import asyncio
import os
import socket
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaudio.config import RunConfig
from rlaudio.config_loader import load_config
from rlaudio.errors import ClusterError, ConfigError
from rlaudio.jobs import follow as following
from rlaudio.jobs import package as packaging
from rlaudio.jobs import passed
from rlaudio.jobs.follow import Reported, follow
from rlaudio.jobs.head import connect, dashboard_url, find_token
from rlaudio.jobs.package import pack
from rlaudio.jobs.submission import order, send
from rlaudio.runs import create_run

CONFIG = """
run: {name: mine, root: ../runs}
model: {path: weights}
data: {train: data2/train.jsonl, clips: data2, heldout: {held: elsewhere/held.jsonl}}
rewards: {sources: [{name: short, judge: "my_rewards:Short"}]}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "mine"
    for name, text in {
        "config.yaml": CONFIG,
        "my_rewards.py": "class Short: ...\n",
        "rules/rubric.yaml": "a: 1\n",
        "weights/model.safetensors": "w" * 1000,
        "data2/train.jsonl": "{}\n",
        "elsewhere/held.jsonl": "{}\n",
        "runs/old/run.json": "{}\n",
        ".venv/lib/x.py": "",
        ".env": "OPENAI_API_KEY=x",
        "server.pem": "key",
        "__pycache__/x.pyc": "",
    }.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    (tmp_path / "private.txt").write_text("not yours")
    (home / "linked.txt").symlink_to(tmp_path / "private.txt")
    return home


def test_code_comes_along_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    config = load_config(RunConfig, folder / "config.yaml", ["run.steps=7"])
    package = pack(config, folder / "config.yaml")
    assert sorted(package.files) == ["my_rewards.py", "rules/rubric.yaml"]

    package.write(tmp_path / "one.zip")
    package.write(tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        archive.extractall(tmp_path / "node")
    there = load_config(RunConfig, tmp_path / "node" / "config.yaml")
    assert there == config  # overrides included, and no path has moved with the folder


def test_what_stays_is_told_with_its_setting(folder: Path) -> None:
    package = pack(load_config(RunConfig, folder / "config.yaml"), folder / "config.yaml")
    assert dict(package.left_behind) == {
        "run.root": str(folder.parent / "runs"),
        "model.path": str(folder / "weights"),
        "data.train": str(folder / "data2" / "train.jsonl"),
        "data.clips": str(folder / "data2"),
        "data.heldout.held": str(folder / "elsewhere" / "held.jsonl"),
    }


def test_excluded_patterns_stay(folder: Path) -> None:
    config = load_config(RunConfig, folder / "config.yaml")
    assert sorted(pack(config, folder / "config.yaml", excludes=["rules"]).files) == ["my_rewards.py"]
    assert sorted(pack(config, folder / "config.yaml", excludes=["*.py"]).files) == ["rules/rubric.yaml"]


def test_too_much_names_the_biggest_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "MAX_PACKAGE_BYTES", 50_000)
    (folder / "noise.bin").write_bytes(b"x" * 60_000)
    config = load_config(RunConfig, folder / "config.yaml")
    with pytest.raises(ConfigError, match=r"noise\.bin \(0\.1 MB\).*--exclude"):
        pack(config, folder / "config.yaml")
    pack(config, folder / "config.yaml", excludes=["noise.bin"])


def test_too_many_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaging, "MAX_PACKAGE_FILES", 1)
    with pytest.raises(ConfigError, match="more than 1 files"):
        pack(load_config(RunConfig, folder / "config.yaml"), folder / "config.yaml")


def test_of_a_run_folder_only_the_first_code_comes_along(folder: Path) -> None:
    with create_run(folder.parent / "runs", name="mine", seed=0, config=folder / "config.yaml") as run:
        run.config_yaml.write_text(CONFIG)
        (run.path / "report.json").write_text("{}")
        package = pack(load_config(RunConfig, run.config_yaml), run.config_yaml)
        assert "my_rewards.py" in package.files and "report.json" not in package.files
        (folder / "config.yaml").unlink()
        assert pack(load_config(RunConfig, run.config_yaml), run.config_yaml).files == {}


# ---- the order ----------------------------------------------------------------------------------------------------


def made(folder: Path, **options: Any) -> Any:
    return order(name="mine", config_path=folder / "config.yaml", **{"environment": {}, **options})


def test_the_signal_of_a_stop_reaches_the_driver_and_it_has_time(folder: Path) -> None:
    asked = made(folder, resume="/shared/runs/a b", python="/opt/x/python")
    assert asked.entrypoint == "exec /opt/x/python -m rlaudio.cli.main train config.yaml --resume '/shared/runs/a b'"
    assert asked.env_vars["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert int(asked.env_vars["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert asked.metadata["run"] == "mine" and asked.metadata["resume"] == "/shared/runs/a b"


def test_job_ids_differ(folder: Path) -> None:
    assert made(folder).job_id != made(folder).job_id


def test_secrets_are_passed_by_name_only(folder: Path) -> None:
    environment = {"OPENAI_API_KEY": "sk-123456", "OTHER": "x", "HF_TOKEN": "not asked for"}
    asked = made(folder, passed=["OPENAI_API_KEY", "MODE=fast"], environment=environment)
    assert asked.secrets == {"OPENAI_API_KEY": "sk-123456"} and asked.env_vars["MODE"] == "fast"
    assert not {"HF_TOKEN", "OTHER"} & set(asked.env_vars)
    assert "sk-123456" not in repr(asked)
    with pytest.raises(ConfigError, match="shell's history"):
        made(folder, passed=["OPENAI_API_KEY=sk-123456"])
    with pytest.raises(ConfigError, match="not set here"):
        made(folder, passed=["OPENAI_API_KEY"])
    with pytest.raises(ConfigError, match="no name of a variable"):
        made(folder, passed=["A B"])


def test_secrets_travel_in_a_file_of_their_owner(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pack(load_config(RunConfig, folder / "config.yaml"), folder / "config.yaml")
    replace(package, secrets={"JUDGE_API_KEY": "sk-123456"}).write(tmp_path / "package.zip")
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        assert archive.getinfo(passed.FILE).external_attr >> 16 == 0o600
        archive.extract(passed.FILE, tmp_path)
    monkeypatch.setenv("JUDGE_API_KEY", "")
    monkeypatch.chdir(tmp_path)
    passed.take()
    assert os.environ["JUDGE_API_KEY"] == "sk-123456"
    monkeypatch.chdir(folder)
    passed.take()  # where nothing was passed


def test_a_run_is_resumed_by_an_absolute_path(folder: Path) -> None:
    with pytest.raises(ConfigError, match="absolute"):
        made(folder, resume="runs/mine")


class NewHead:
    """Takes jobs at the third time of asking, or refuses."""

    def __init__(self, refusal: str) -> None:
        self.refusal, self.asked = refusal, 0

    def submit_job(self, **order: Any) -> None:
        self.asked += 1
        assert Path(order["runtime_env"]["working_dir"]).is_file()
        if self.asked < 3:
            raise RuntimeError(f"Request failed with status code 500: {self.refusal}")


def test_a_head_that_comes_up_is_asked_again_and_one_that_refuses_is_not(folder: Path) -> None:
    package = pack(load_config(RunConfig, folder / "config.yaml"), folder / "config.yaml")
    new: Any = NewHead("No available agent to submit job, please try again later.")
    send(new, package, made(folder), pause_s=0)
    assert new.asked == 3
    refusing: Any = NewHead("Submission id exists")
    with pytest.raises(ClusterError, match="refuses the job.*Submission id exists"):
        send(refusing, package, made(folder), pause_s=0)
    assert refusing.asked == 1
    late: Any = NewHead("No available agent to submit job")
    with pytest.raises(ClusterError, match="No available agent"):
        send(late, package, made(folder), pause_s=0, deadline_s=-1)


# ---- the head -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("head", "http://head:8265"),
        ("head:9000", "http://head:9000"),
        ("http://head/", "http://head:8265"),
        ("https://ray.example.org/head", "https://ray.example.org/head"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_addresses(address: str, url: str) -> None:
    assert dashboard_url(address) == url


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "Ray Client's address"),
        ("http://me:pw@head:8265", "user or password"),
        ("http://head:port", "no dashboard's address"),
        ("", "no dashboard's address"),
    ],
)
def test_addresses_of_something_else(address: str, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as caught:
        dashboard_url(address)
    assert "pw@" not in str(caught.value)


def test_the_token_is_found_where_ray_looks(tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("from home\n")
    (tmp_path / "named").write_text("named\n")
    home = {"HOME": str(tmp_path)}
    named = {**home, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "named")}
    assert find_token(home) == "from home"
    assert find_token(named) == "named"
    assert find_token({**named, "RAY_AUTH_TOKEN": "direct"}) == "direct"
    assert find_token({**named, "RAY_AUTH_MODE": "disabled"}) is None
    assert find_token({"HOME": str(tmp_path / "nobody")}) is None
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})


@pytest.fixture
def answering() -> Iterator[Any]:
    """A server that answers every connection with given bytes; with None it never answers."""
    stop = threading.Event()
    threads = []

    def start(answer: bytes | None) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        server.settimeout(0.1)

        def serve() -> None:
            held = []
            while not stop.is_set():
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                held.append(connection)
                if answer is not None:
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()
            for one in [*held, server]:
                one.close()

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    stop.set()
    for thread in threads:
        thread.join(10)


def http(status: str, body: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "no answer in 0.5 s.*--address http://HOST:8265"),
        (b"\x00\x00\x12\x04 not http\r\n", "cannot be asked"),
        (http("200 OK", "<html>hello</html>"), "not as Ray's dashboard"),
        (http("404 Not Found", "nothing"), "not as Ray's dashboard"),
        (http("401 Unauthorized", "Unauthorized"), "refuses the token.*RAY_AUTH_TOKEN"),
        (http("403 Forbidden", "Forbidden"), "refuses the token.*RAY_AUTH_TOKEN"),
    ],
)
def test_what_is_no_head_is_told_in_time(answering: Any, answer: bytes | None, message: str) -> None:
    with pytest.raises(ClusterError, match=message) as caught:
        connect(answering(answer), environment={"RAY_AUTH_TOKEN": "very-secret"}, deadline_s=0.5)
    assert "very-secret" not in str(caught.value)


def test_without_a_token_it_is_said_that_there_is_none(answering: Any, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="none was found.*RAY_AUTH_TOKEN"):
        connect(answering(http("401 Unauthorized", "")), environment={"HOME": str(tmp_path)}, deadline_s=0.5)


def test_an_unreachable_head(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray would take this one instead
    with pytest.raises(ClusterError, match=f"127.0.0.1:{port} cannot be asked .*refused"):
        connect(f"127.0.0.1:{port}", environment={}, deadline_s=0.5)


def test_another_ray_is_named_with_both_versions(answering: Any) -> None:
    with pytest.raises(ClusterError, match=r"runs Ray 2\.9\.0, and rlaudio works with >=2\.60"):
        connect(answering(http("200 OK", '{"ray_version": "2.9.0"}')), environment={}, deadline_s=2)


# ---- following ----------------------------------------------------------------------------------------------------


class FakeClient:
    """A job whose log comes over connections that drop.

    Args:
        connections: what each connection brings before it ends; an exception is raised there.
        ended: how many connections it takes until the job has ended.
    """

    def __init__(self, *connections: list[str | Exception], log: str, ended: int) -> None:
        self.connections, self.log, self.ended, self.made = list(connections), log, ended, 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.made += 1
        for piece in self.connections[min(self.made, len(self.connections)) - 1]:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_logs(self, job_id: str) -> str:
        return self.log

    def get_job_info(self, job_id: str) -> Any:
        status = "SUCCEEDED" if self.made >= self.ended else "RUNNING"
        return SimpleNamespace(status=SimpleNamespace(value=status), message="")


async def followed(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> str:
    real_sleep = asyncio.sleep
    monkeypatch.setattr(following.asyncio, "sleep", lambda _: real_sleep(0))
    written: list[str] = []
    client_: Any = client
    await follow(client_, "job", write=written.append)
    return "".join(written)


async def test_a_dropped_connection_writes_nothing_twice_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(
        ["one\ntw", RuntimeError("closed")],
        [OSError("gone")],
        ["one\n", "two\nthr"],
        log="one\ntwo\nthree\n",
        ended=3,
    )
    assert await followed(client, monkeypatch) == "one\ntwo\nthree\n"


async def test_a_lost_head_ends_following_and_says_that_the_job_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient(["one\n", RuntimeError("closed")], [OSError("gone")], log="", ended=99)
    with pytest.raises(ClusterError, match="may go on.*--logs job"):
        await followed(client, monkeypatch)
    assert client.made <= 2 * following.MAX_FAILURES_IN_A_ROW


def test_what_a_run_reports_is_read_in_any_pieces() -> None:
    text = "starting\nrun folder: /shared/runs/mine-1\nmlflow: http://host/#/experiments/1/runs/2\nrun: /shared/end\nx"
    for size in (1, 3, 1000):
        reported = Reported()
        for start in range(0, len(text), size):
            reported.take(text[start : start + size])
        assert reported.mlflow == "http://host/#/experiments/1/runs/2"
        assert reported.run_folder == "/shared/end"
