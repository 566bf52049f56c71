"""A supervised run that is killed or stopped anywhere and resumed gives what one in one go gives. No Ray in here."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from rlaudio.config import LearnerSettings, MixtureSettings, ModelSettings, PhaseSettings, SftConfig, SftRunSettings
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import JsonlTracker, read_curves
from rlaudio.recipes import sft


class Killed(BaseException):
    """SIGKILL: nothing of the driver runs after it, but what lies on the disk stays."""


class FakeLearner:
    """Its weights are a hash over every step that it took; a loss of its own per step."""

    def __init__(self, *, dies_at: int | None = None, waits_at: int | None = None) -> None:
        self.weights, self.num_steps = "start", 0
        self._dies_at, self._waits_at = dies_at, waits_at
        self.waiting = asyncio.Event()

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def supervised_step(self, batches: Sequence[pa.RecordBatch], phase: PhaseSettings) -> Any:
        (rows,) = batches
        self.num_steps += 1
        if self.num_steps == self._waits_at:
            self.waiting.set()
            await asyncio.sleep(0.01)
        if self.num_steps == self._dies_at:
            raise Killed
        ids = ",".join(rows.column("prompt_id").to_pylist())
        self.weights = hashlib.sha256(f"{self.weights}|{phase.name}|{ids}".encode()).hexdigest()
        return SimpleNamespace(values={"loss": 4.0 - 0.5 * self.num_steps + int(self.weights[:4], 16) / 65536})

    async def save(self, path: Path) -> None:
        (path / "weights").write_text(json.dumps([self.weights, self.num_steps]))

    async def load(self, path: Path) -> Any:
        self.weights, self.num_steps = json.loads((path / "weights").read_text())

    async def export(self, path: Path) -> None:
        await asyncio.to_thread(path.mkdir)
        (path / "model").write_text(self.weights)


def rows_of(name: str) -> pa.RecordBatch:
    ids = [[1] * (1 + number % 3) for number in range(7)]
    return pa.RecordBatch.from_pydict(
        {"prompt_id": [f"{name}{number}" for number in range(7)], "prompt_ids": ids, "response_ids": ids}
    )


ROWS = {name: rows_of(name) for name in ("a", "b")}
HALVES = [MixtureSettings("a", 0.5), MixtureSettings("b", 0.5)]
PHASES = [
    PhaseSettings(name="mixed", mixture=HALVES, steps=5, rows_per_step=3),
    PhaseSettings(name="low", data="a", steps=20, rows_per_step=2, stop_at_loss=1.3),
    PhaseSettings(name="last", data="b", steps=2, rows_per_step=2),
]


async def attempt(folder: Path, learner: FakeLearner, monkeypatch: pytest.MonkeyPatch, *, resume: bool) -> None:
    config = SftConfig(
        run=SftRunSettings(name="sft", output=str(folder / "out"), checkpoint_every=2),
        model=ModelSettings(path="none"),
        phases=PHASES,
        learner=LearnerSettings(),
    )
    await asyncio.to_thread((folder / "checkpoints").mkdir, parents=True, exist_ok=True)
    monkeypatch.setattr(sft, "LearnerGroup", lambda *_, **__: learner)
    monkeypatch.setattr(sft.ray, "put", lambda rows: rows)
    with Progress() as progress:
        await sft.run_sft(
            config,
            tracker=JsonlTracker(folder / "metrics.jsonl"),
            progress=progress,
            stopped=folder / "stopped",
            rows=ROWS,
            checkpoints=folder / "checkpoints",
            resume=resume,
        )


async def in_one_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    learner = FakeLearner()
    await attempt(folder, learner, monkeypatch, resume=False)
    return (folder / "out" / "model").read_text(), learner.num_steps


async def test_killed_at_any_step_and_resumed_the_result_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, num_steps = await in_one_go(tmp_path / "whole", monkeypatch)
    assert 5 + 2 < num_steps < 5 + 20 + 2, "one phase ended by its loss"
    whole = read_curves(tmp_path / "whole" / "metrics.jsonl")
    for dies_at in range(1, num_steps + 1):
        folder = tmp_path / f"killed-{dies_at}"
        with pytest.raises(Killed):
            await attempt(folder, FakeLearner(dies_at=dies_at), monkeypatch, resume=False)
        assert not await asyncio.to_thread((folder / "out").exists)
        second = FakeLearner()
        await attempt(folder, second, monkeypatch, resume=True)
        assert (folder / "out" / "model").read_text() == wanted, dies_at
        assert read_curves(folder / "metrics.jsonl") == whole, dies_at


async def test_a_stop_in_the_middle_of_a_step_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = await in_one_go(tmp_path / "whole", monkeypatch)
    folder, learner = tmp_path / "stopped", FakeLearner(waits_at=5)
    running = asyncio.create_task(attempt(folder, learner, monkeypatch, resume=False))
    await learner.waiting.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (folder / "stopped" / "model").read_text() == learner.weights
    assert sft.CheckpointStore(folder / "checkpoints").holds(5) and learner.num_steps == 5
    second = FakeLearner()
    taken: list[str] = []
    monkeypatch.setattr(JsonlTracker, "log", lambda *_, **__: taken.append("step"))
    await attempt(folder, second, monkeypatch, resume=True)
    assert (folder / "out" / "model").read_text() == wanted
    assert len(taken) == second.num_steps - 5, "the step that was under way is not taken twice"
