"""A run that fails never looks like one that went well: its error comes out, MLflow says FAILED, there is no report."""

import asyncio
import os
import signal
import sqlite3
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest

from rlaudio.aio import Terminated
from rlaudio.cli import main as command
from rlaudio.cli import train
from rlaudio.config import RunConfig
from rlaudio.data.run_data import RunData
from rlaudio.errors import WeightSyncError
from rlaudio.observe.tracker import MlflowTracker
from rlaudio.recipes import cluster, rl
from rlaudio.runs import create_run

# SQLAlchemy 2.1 deprecates a loader that MLflow 3.17 still uses; Python hides such warnings outside of tests.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.timeout(300)]

FAILURES = [
    WeightSyncError("weights 0.3 reached no engine"),
    OSError(28, "No space left on device"),
    KeyboardInterrupt(),
    Terminated(),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run root with its tracking store: making that can take longer than a run waits for it at its end."""
    root = tmp_path_factory.mktemp("runs")
    with create_run(root, name="first", seed=0) as folder:
        MlflowTracker(run_root=root, run_folder=folder.path, experiment="rlaudio").finish("FINISHED", deadline_s=200)
    return root


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_a_failed_run_says_so_everywhere(
    failure: BaseException, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = type(failure).__name__

    async def fails(config: RunConfig, *, folder: Any, **_: object) -> None:
        checkpoint = folder.checkpoints / "step-000020"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
        if isinstance(failure, Terminated):  # as a job that is stopped meets it
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(60)
        raise failure

    def train_command(*_: object, **__: object) -> int:
        config = RunConfig()
        config.run.name, config.run.root = name, str(root)
        with create_run(root, name=name, seed=0) as folder:
            return train._run(config, RunData(train=[], heldout={}), folder, resume=False)

    monkeypatch.setattr(cluster, "joined_ray", lambda needs, **_: nullcontext())
    monkeypatch.setattr(rl, "run_rl", fails)
    monkeypatch.setattr(train, "train_command", train_command)
    monkeypatch.setattr(train, "to_yaml", lambda config: f"run: {{name: {name}}}")
    (root / "config.yaml").write_text("")  # the command looks for the recipe in it
    if isinstance(failure, OSError):  # not ours: the traceback is the last thing said, and Python's exit code is 1
        with pytest.raises(OSError, match="No space left"):
            command.main(["train", str(root / "config.yaml")])
        code, last = 1, f"OSError: {failure}"
    else:
        code = command.main(["train", str(root / "config.yaml")])
        last = capsys.readouterr().err.rstrip().splitlines()[-1]
    (run,) = root.glob(f"{name}-*")
    stopped = isinstance(failure, KeyboardInterrupt)
    codes = {"KeyboardInterrupt": 130, "Terminated": 143, "OSError": 1}
    assert code == codes.get(name, 2)
    said = {"KeyboardInterrupt": "stopped; go on with: ", "Terminated": "stopped by SIGTERM; go on with: "}
    assert last.startswith(said.get(name, f"{name}: {failure}"))
    assert not (run / "report.json").exists()
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        found = database.execute("select status from runs where name = ?", (run.name,)).fetchall()
    assert found == [("KILLED" if stopped else "FAILED",)]
