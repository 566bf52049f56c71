"""`rlaudio replay RUN [key=value ...]`: a run's experience to a learner again, in a run folder of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from rlaudio.config import RunConfig
from rlaudio.config_loader import load_config, to_yaml
from rlaudio.preflight import check_platform, check_shm, check_versions, check_writable
from rlaudio.runs import create_run, find_run, write_text_atomic

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def replay_command(run: str, overrides: Sequence[str], *, first_step: int, last_step: int | None) -> int:
    """Replay steps [first_step, last_step) of a run. Returns the exit code; raises RlaudioError on failures.

    Args:
        overrides: of the learner, its algorithm, `run.name` and `run.root`; where the run's experience lies is its own
            configuration's.
    """
    check_platform()
    check_versions()
    source = find_run(run)
    own: RunConfig = load_config(RunConfig, source.config_yaml)
    config: RunConfig = load_config(RunConfig, source.config_yaml, [f"run.name={own.run.name}-replay", *overrides])
    check_writable(config.run.root, setting="run.root")
    check_shm()

    from rlaudio.observe.progress import Progress
    from rlaudio.observe.tracker import JsonlTracker, Status
    from rlaudio.recipes.cluster import joined_ray
    from rlaudio.recipes.replay import batches_to_replay, run_replay
    from rlaudio.recipes.restoring import spool_root

    batches = batches_to_replay(own, run=source, first_step=first_step, last_step=last_step)
    learner = config.learner
    with create_run(config.run.root, name=config.run.name, seed=config.run.seed) as folder:
        write_text_atomic(folder.config_yaml, to_yaml(config))
        tracker = JsonlTracker(folder.metrics / "metrics.jsonl")
        status: Status = "FAILED"
        try:
            with (
                Progress() as progress,
                joined_ray({"learner": (learner.ranks * learner.num_cpus, learner.ranks * learner.num_gpus)}),
            ):
                replayed = asyncio.run(
                    run_replay(
                        config,
                        batches,
                        root=spool_root(own, source),
                        run=source,
                        folder=folder,
                        tracker=tracker,
                        progress=progress,
                    )
                )
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            print(f"stopped: {folder.path} holds curves and no model", file=sys.stderr)
            return INTERRUPTED
        finally:
            tracker.finish(status)
        left_out = f", {len(replayed.diverged)} steps left out" if replayed.diverged else ""
        print(
            f"replayed: {replayed.groups} groups of steps {replayed.first_step} to {replayed.last_step - 1}{left_out}"
        )
        print(f"checkpoint: {folder.path / 'model'}")
        print(f"run: {folder.path}")
    return 0
