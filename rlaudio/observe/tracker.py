"""Where metrics go. Training never waits for a tracker and never dies of one.

`MlflowTracker` hands everything to one daemon thread: importing MLflow (4 s) and making its database (3 s) happen there
too, a failure is one warning and a count at the end. `JsonlTracker` is the run folder's own copy, from which the report
draws its curves.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from rlaudio.errors import RunFolderError
from rlaudio.observe.background import Backend, BackgroundTracker, Scalar, Status
from rlaudio.observe.mlflow_backend import MlflowBackend, open_command

__all__ = ["JsonlTracker", "MlflowTracker", "NullTracker", "Scalar", "Status", "Tracker", "Trackers", "read_curves"]


class Tracker(Protocol):
    """Takes what a run wants remembered; every call returns at once."""

    def log(self, metrics: Mapping[str, Scalar], *, step: int) -> None:
        """Numbers of one step."""
        ...

    def log_params(self, params: Mapping[str, object]) -> None:
        """Settings of the run, flat names."""
        ...

    def log_artifact(self, path: Path) -> None:
        """Keep a copy of a finished file."""
        ...

    def finish(self, status: Status, *, deadline_s: float = 20.0) -> None:
        """Send what is queued, mark the run, stop. Waits at most `deadline_s`; a second call does nothing."""
        ...


class NullTracker:
    """Remembers nothing."""

    def log(self, metrics: Mapping[str, Scalar], *, step: int) -> None: ...

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_artifact(self, path: Path) -> None: ...

    def finish(self, status: Status, *, deadline_s: float = 20.0) -> None: ...


class Trackers:
    """Several trackers as one."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers

    def log(self, metrics: Mapping[str, Scalar], *, step: int) -> None:
        for tracker in self._trackers:
            tracker.log(metrics, step=step)

    def log_params(self, params: Mapping[str, object]) -> None:
        for tracker in self._trackers:
            tracker.log_params(params)

    def log_artifact(self, path: Path) -> None:
        for tracker in self._trackers:
            tracker.log_artifact(path)

    def finish(self, status: Status, *, deadline_s: float = 20.0) -> None:
        for tracker in self._trackers:
            tracker.finish(status, deadline_s=deadline_s)


class JsonlTracker(NullTracker):
    """The run folder's own copy: one JSON object per `log`, appended and flushed, so a killed run keeps its curves.

    Raises:
        RunFolderError: the file cannot be written: unlike a tracking server, the run folder is not optional.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if path.exists() and not path.read_bytes().endswith(b"\n"):
            self._append("\n")  # a kill cut the last line: do not join the next one to it

    def log(self, metrics: Mapping[str, Scalar], *, step: int) -> None:
        # JSON has no NaN: what is not finite is kept as null.
        values = {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}
        self._append(json.dumps({"step": step, "time_s": round(time.time(), 3), **values}) + "\n")

    def _append(self, text: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise RunFolderError(
                f"cannot append to {self._path}: {error}; free space or fix the permissions"
            ) from error


def read_curves(path: Path, *, prefix: str = "") -> dict[str, list[tuple[int, float]]]:
    """Curves from a `JsonlTracker` file: name -> (step, value) by rising step.

    A resumed run repeats steps: the later line wins. A line cut off by a kill is left out.
    """
    curves: dict[str, dict[int, float]] = {}
    if not path.exists():
        return {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name, value in row.items():
            if name not in ("step", "time_s") and name.startswith(prefix) and value is not None:
                curves.setdefault(name, {})[row["step"]] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


class MlflowTracker(BackgroundTracker):
    """MLflow without waiting for it.

    Args:
        run_root: holds the database (`mlflow.db`) and the copies of artifacts (`mlflow_artifacts/`) of all its runs.
        run_folder: this run's folder; resuming in the same folder continues the same MLflow run.
        experiment: groups runs.
        uri: another tracking server; empty is the SQLite file of `run_root`.
        parent: id of the run that this one is a part of.
        linked: hears, in the tracker's thread, how the run is opened in a browser as soon as there is one.
    """

    def __init__(
        self,
        *,
        run_root: Path,
        run_folder: Path,
        experiment: str,
        uri: str = "",
        parent: str = "",
        linked: Callable[[str], None] | None = None,
    ) -> None:
        self.uri = uri or f"sqlite:///{(run_root / 'mlflow.db').absolute()}"

        def connect() -> Backend:
            backend = MlflowBackend(
                uri=self.uri,
                experiment=experiment,
                run_name=run_folder.name,
                run_folder=run_folder,
                artifacts=run_root / "mlflow_artifacts",
                parent=parent,
            )
            if linked is not None:
                linked(backend.link())
            return backend

        super().__init__(connect)

    def open_command(self) -> str:
        """The exact command that shows this tracker's runs in a browser; see `open_command`."""
        return open_command(self.uri)
