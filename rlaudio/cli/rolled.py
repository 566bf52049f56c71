"""What `curate` and `distil` share at the command line: a run folder, actors, a way to stop and to go on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from rlaudio.aio import StopsOnSigterm, Terminated
from rlaudio.cli.train import INTERRUPTED, TERMINATED
from rlaudio.config import RunConfig
from rlaudio.errors import RlaudioError
from rlaudio.runs import RunFolder

if TYPE_CHECKING:
    from rlaudio.observe.progress import Progress
    from rlaudio.observe.tracker import Tracker

Run = Callable[["Tracker", "Progress"], Coroutine[Any, Any, dict[str, Any]]]


def roll(config: RunConfig, folder: RunFolder, run: Run, *, again: str) -> dict[str, Any] | int:
    """Run a recipe that rolls out on actors: its report, or the exit code of a stop. Raises what it raises.

    Args:
        again: what to type to go on with it.
    """
    from rlaudio.cli.trackers import open_trackers
    from rlaudio.observe.progress import Progress
    from rlaudio.observe.tracker import Status
    from rlaudio.recipes.cluster import joined_ray
    from rlaudio.recipes.playing import playing_needs

    def late() -> None:
        print(f"stopped by SIGTERM; go on with: {again}", file=sys.stderr, flush=True)
        os._exit(TERMINATED)  # whatever hangs must not keep whoever waits for the process

    trackers = open_trackers(folder, config.tracking)
    status: Status = "FAILED"
    try:
        with (
            StopsOnSigterm(deadline_s=config.run.stop_deadline_s, late=late) as stopping,
            Progress() as progress,
            joined_ray(playing_needs(config), waits=True),
        ):
            report: dict[str, Any] = stopping.run(run(trackers.all, progress))
        for path in (folder.report_json, folder.report_html):
            if path.is_file():
                trackers.all.log_artifact(path)
        status = "FINISHED"
        return report
    except KeyboardInterrupt as stop:
        status = "KILLED"
        by_signal = isinstance(stop, Terminated)
        print(f"stopped{' by SIGTERM' * by_signal}; go on with: {again}", file=sys.stderr)
        return TERMINATED if by_signal else INTERRUPTED
    except RlaudioError:
        print(f"the run folder keeps what was rolled out; go on with: {again}", file=sys.stderr)
        raise
    finally:
        trackers.all.finish(status)
