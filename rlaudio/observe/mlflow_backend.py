"""One MLflow run, as the background thread sees it, and the command that shows it in a browser."""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlaudio.errors import ResourceError
from rlaudio.observe.background import Point, Status
from rlaudio.secrets import masked

_LOG = logging.getLogger("rlaudio.observe")
_RUN_FILE = "mlflow_run.json"


class MlflowBackend:
    """One MLflow run, made or resumed. Its id lies in the run folder, so the same folder is the same MLflow run."""

    def __init__(
        self, *, uri: str, experiment: str, run_name: str, run_folder: Path, artifacts: Path, parent: str = ""
    ) -> None:
        # Before the import: MLflow reports its use over the network and greets on stderr unless told not to.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        from mlflow.tracking import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        self._uri = uri
        self._client = MlflowClient(tracking_uri=uri)
        self._run_id = self._resume(run_folder / _RUN_FILE, uri) or self._create(
            uri=uri, experiment=experiment, run_name=run_name, run_folder=run_folder, artifacts=artifacts, parent=parent
        )

    @property
    def run_id(self) -> str:
        return self._run_id

    def _resume(self, file: Path, uri: str) -> str | None:
        from mlflow.exceptions import MlflowException

        if not file.exists():
            return None
        known = json.loads(file.read_text(encoding="utf-8"))
        if known.get("uri") != uri:
            return None
        try:
            self._client.update_run(known["run_id"], status="RUNNING")
        except MlflowException as error:
            _LOG.warning("cannot resume the MLflow run %s (%s); a new one is made", known["run_id"], error)
            return None
        return str(known["run_id"])

    def _create(
        self, *, uri: str, experiment: str, run_name: str, run_folder: Path, artifacts: Path, parent: str
    ) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            try:
                found_id = self._client.create_experiment(experiment, artifact_location=artifacts.absolute().as_uri())
            except MlflowException:  # another run made it in between
                found = self._client.get_experiment_by_name(experiment)
                if found is None:
                    raise
        experiment_id = found.experiment_id if found is not None else found_id
        tags = {"rlaudio.run_folder": str(run_folder)} | ({"mlflow.parentRunId": parent} if parent else {})
        run_id = str(self._client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)
        (run_folder / _RUN_FILE).write_text(json.dumps({"uri": uri, "run_id": run_id}) + "\n", encoding="utf-8")
        return run_id

    def link(self) -> str:
        """The run's page on a tracking server; for a database the command that opens it."""
        if not self._uri.startswith(("http://", "https://")):
            return open_command(self._uri)
        experiment = self._client.get_run(self._run_id).info.experiment_id
        return masked(f"{self._uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._run_id}")

    def points(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in points]
        self._client.log_batch(self._run_id, metrics=metrics)

    def params(self, params: Mapping[str, str]) -> None:
        """MLflow's params are written once; what a resumed run changed becomes a tag `changed.NAME`."""
        from mlflow.entities import Param, RunTag

        known: dict[str, str] = dict(self._client.get_run(self._run_id).data.params)
        new = [Param(name, value) for name, value in params.items() if name not in known]
        changed = [RunTag(f"changed.{n}", v) for n, v in params.items() if known.get(n, v) != v]
        for chunk in _chunks(new, 100):  # MLflow's limit for params and tags in one call
            self._client.log_batch(self._run_id, params=chunk)
        for chunk in _chunks(changed, 100):
            self._client.log_batch(self._run_id, tags=chunk)

    def artifact(self, path: Path) -> None:
        self._client.log_artifact(self._run_id, str(path))

    def close(self, status: Status) -> None:
        self._client.set_terminated(self._run_id, status)


def open_command(uri: str) -> str:
    """The exact command that shows the runs of a tracking store in a browser, with a port that is free now.

    Raises:
        ResourceError: no free port from 5000 to 5099.
    """
    if uri.startswith(("http://", "https://")):
        return shlex.join([sys.executable, "-m", "webbrowser", uri])  # a server that runs already
    beside = Path(sys.executable).with_name("mlflow")
    program = str(beside) if beside.exists() else "mlflow"
    # MLflow 3.17 would start four workers and six job consumers: their imports take minutes on two cores.
    words = ["env", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", "MLFLOW_DISABLE_TELEMETRY=true", program, "ui"]
    words += ["--backend-store-uri", uri, "--workers", "1", "--host", "127.0.0.1", "--port"]
    return shlex.join([*words, str(free_port())])


def free_port(candidates: Iterable[int] = range(5000, 5100)) -> int:
    """The first port of 127.0.0.1 that nothing listens on.

    Raises:
        ResourceError: all are taken.
    """
    tried = list(candidates)
    for port in tried:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ResourceError(
        f"no free port on 127.0.0.1 among {tried[0]} to {tried[-1]}; close a program that listens there"
    )


def _chunks(items: list[Any], size: int) -> Iterable[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
