"""A tracker never blocks and never kills training; what it was told arrives, in order, once."""

import io
import logging
import shlex
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlaudio.errors import ResourceError, RunFolderError
from rlaudio.experience.window import NO_SIGNAL
from rlaudio.observe.background import BackgroundTracker, Point, Status
from rlaudio.observe.metrics import GroupStats, StepTally
from rlaudio.observe.mlflow_backend import free_port, open_command
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import JsonlTracker, Trackers, read_curves


class Memory:
    """A `Backend` that remembers, and can be told to fail or to hang."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.open = threading.Event()
        self.open.set()
        self.calls: list[object] = []

    def _call(self, value: object) -> None:
        self.open.wait(10)
        if self.fails:
            raise ConnectionError("no server")
        self.calls.append(value)

    def points(self, points: list[Point]) -> None:
        self._call([(p.name, p.value, p.step) for p in points])

    def params(self, params: Mapping[str, str]) -> None:
        self._call(dict(params))

    def artifact(self, path: Path) -> None:
        self._call(path)

    def close(self, status: Status) -> None:
        self._call(status)

    @property
    def all_points(self) -> list[object]:
        return [point for call in self.calls if isinstance(call, list) for point in call]


def test_everything_arrives_in_order_and_in_few_calls(tmp_path: Path) -> None:
    memory = Memory()
    memory.open.clear()
    tracker = BackgroundTracker(lambda: memory)
    tracker.log_params({"lr": 3e-4})
    for step in range(2000):
        tracker.log({"reward/verified": step / 2}, step=step)
    tracker.log_artifact(tmp_path)
    memory.open.set()
    tracker.finish("FINISHED")
    assert memory.all_points == [("reward/verified", step / 2, step) for step in range(2000)]
    assert memory.calls[0] == {"lr": "0.0003"} and memory.calls[-2:] == [tmp_path, "FINISHED"]
    assert len(memory.calls) < 10
    assert max(len(call) for call in memory.calls if isinstance(call, list)) <= 1000


def test_a_failing_backend_costs_one_warning_and_a_count(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    tracker = BackgroundTracker(lambda: Memory(fails=True))
    for step in range(50):
        tracker.log({"kl": 0.1}, step=step)
        time.sleep(0.001)
    tracker.finish("FINISHED")
    assert sum("no server" in message for message in caplog.messages) == 1
    assert "51 records did not reach the tracker" in caplog.text


def test_a_backend_that_cannot_open_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def connect() -> Memory:
        raise OSError("read-only")

    tracker = BackgroundTracker(connect)
    tracker.log({"kl": 0.1}, step=0)
    tracker.finish("FAILED")
    assert sum("read-only" in message for message in caplog.messages) == 1


def test_a_hanging_backend_neither_blocks_logging_nor_the_end(caplog: pytest.LogCaptureFixture) -> None:
    memory = Memory()
    memory.open.clear()
    tracker = BackgroundTracker(lambda: memory, capacity=10)
    start_s = time.monotonic()
    for step in range(100):
        tracker.log({"kl": 0.1}, step=step)
    tracker.finish("FINISHED", deadline_s=0.3)
    assert time.monotonic() - start_s < 30.0
    assert "queue of 10 is full" in caplog.text and "not done after" in caplog.text
    memory.open.set()


def test_finish_twice_and_logging_after_it_do_nothing() -> None:
    memory = Memory()
    tracker = BackgroundTracker(lambda: memory)
    tracker.finish("KILLED")
    tracker.finish("FINISHED")
    tracker.log({"kl": 1.0}, step=1)
    assert memory.calls == ["KILLED"]


def test_the_command_names_the_database_and_a_port_that_is_free() -> None:
    words = shlex.split(open_command("sqlite:////runs/with space/mlflow.db"))
    assert words[words.index("--backend-store-uri") + 1] == "sqlite:////runs/with space/mlflow.db"
    assert words[words.index("--host") + 1] == "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(words[words.index("--port") + 1])))


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=str(port)):
            free_port([port])


def test_jsonl_curves_survive_a_kill_and_a_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tracker = Trackers(JsonlTracker(file))
    for step in range(4):
        tracker.log({"reward/verified": step / 10, "kl": float("nan")}, step=step)
    with file.open("a") as handle:
        handle.write('{"step": 4, "rewa')  # killed here
    resumed = JsonlTracker(file)
    resumed.log({"reward/verified": 9.0}, step=2)
    resumed.log({"reward/verified": 9.5}, step=3)
    curves = read_curves(file, prefix="reward/")
    assert curves == {"reward/verified": [(0, 0.0), (1, 0.1), (2, 9.0), (3, 9.5)]}
    with pytest.raises(RunFolderError, match="missing"):
        JsonlTracker(tmp_path / "missing" / "m.jsonl").log({"kl": 1.0}, step=0)


def group(
    *, turns: int, reward: float, ages: tuple[int, ...] = (0,), sources: tuple[str, ...] = ("verified",)
) -> GroupStats:
    return GroupStats(
        num_dialogues=2,
        num_turns=turns,
        rewards=dict.fromkeys(sources, reward),
        num_response_tokens=10 * turns,
        num_parsable=turns,
        num_correct=0,
        ages=ages,
    )


def test_step_metrics_weigh_turns_and_start_afresh() -> None:
    now = iter([0.0, 2.0, 4.0])
    metrics = StepTally(clock=lambda: next(now))
    metrics.add_group(group(turns=3, reward=1.0, ages=(0, 1)))
    metrics.add_group(group(turns=1, reward=0.0, ages=(1, 1), sources=("verified", "judge")))
    metrics.add_drop("no_signal")
    metrics.gauge("window/ready", 5)
    found = metrics.step({"kl": 0.02})
    assert found["reward/verified"] == pytest.approx(0.75) and found["reward/judge"] == 0.0
    assert found["age/mean"] == pytest.approx(0.75) and found["age/max"] == 1.0
    assert found["throughput/tokens_per_s"] == pytest.approx(40 / 2) and found[
        "throughput/dialogues_per_s"
    ] == pytest.approx(2)
    assert found["length/response"] == pytest.approx(10) and found["kl"] == 0.02 and found["window/ready"] == 5
    assert found["drops/no_signal"] == 1 and found["drops/all"] == 1
    empty = metrics.step({})
    assert empty["drops/all"] == 0 and "reward/verified" not in empty
    assert metrics.totals.num_response_tokens == 40 and metrics.totals.drops == {"no_signal": 1}


def test_drops_are_shares_of_the_groups_that_ended() -> None:
    metrics = StepTally()
    for _ in range(4):
        metrics.add_group(group(turns=1, reward=0.0, ages=()))
    for reason in (NO_SIGNAL, NO_SIGNAL, NO_SIGNAL, "JudgeError"):
        metrics.add_drop(reason)
    found = metrics.step({})
    assert (found["drops/share"], found["drops/filtered_share"]) == (0.5, 0.375)
    assert "drops/share" not in metrics.step({}), "of nothing there is no share"


def test_plain_progress_prints_seldom_but_the_last_state_always() -> None:
    now = [0.0]
    out = io.StringIO()
    with Progress(stream=out, interval_s=10.0, clock=lambda: now[0]) as progress:
        progress.stage("training")
        for step in range(1, 31):
            now[0] = float(step)
            progress.update(step, 40, {"reward": 0.5, "tokens/s": 1234.5})
    lines = out.getvalue().splitlines()
    steps = [word for line in lines for word in line.split() if word.endswith("/40")]
    assert steps == ["10/40", "20/40", "30/40"]
    assert "30s left" in lines[1] and "tokens/s 1,234" in lines[1] and lines[-1].endswith("training: 30s")
