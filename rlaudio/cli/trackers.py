"""Where a command's curves go: the run folder's own copy, and MLflow where `tracking` says so."""

from collections.abc import Callable
from dataclasses import dataclass

from rlaudio.config import TrackingSettings
from rlaudio.observe.tracker import JsonlTracker, MlflowTracker, Tracker, Trackers
from rlaudio.runs import RunFolder


@dataclass(frozen=True, slots=True)
class RunTrackers:
    """All trackers of a run as one; `mlflow` by itself, if there is one."""

    all: Tracker
    mlflow: MlflowTracker | None


def open_trackers(
    folder: RunFolder, tracking: TrackingSettings, *, linked: Callable[[str], None] | None = None
) -> RunTrackers:
    """The trackers of a run in its folder.

    Args:
        linked: see `MlflowTracker`.
    """
    mlflow = None
    if tracking.mlflow:
        mlflow = MlflowTracker(
            run_root=folder.path.parent,
            run_folder=folder.path,
            experiment=tracking.experiment,
            uri=tracking.uri,
            parent=tracking.parent,
            linked=linked,
        )
    own = JsonlTracker(folder.metrics / "metrics.jsonl")
    return RunTrackers(Trackers(own, *([mlflow] if mlflow else [])), mlflow)
