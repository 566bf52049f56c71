"""`rlaudio train CONFIG [key=value ...] [--resume RUN]`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from rlaudio.aio import StopsOnSigterm, Terminated
from rlaudio.audio.voice import Voice
from rlaudio.config import RunConfig
from rlaudio.config_loader import code_path, load_config, to_yaml
from rlaudio.config_objects import require_records
from rlaudio.data.problems import MAX_PROBLEMS
from rlaudio.data.run_data import RunData, read_data
from rlaudio.doctor.static.settings import problems_before_start
from rlaudio.errors import RlaudioError
from rlaudio.jobs.passed import IN_JOB, enter_job
from rlaudio.preflight import (
    check_disk,
    check_memory,
    check_platform,
    check_shm,
    check_versions,
    check_writable,
    installed_in_s,
)
from rlaudio.registry import load_object
from rlaudio.runs import RunFolder, create_run, find_run, open_run, write_json_atomic, write_text_atomic
from rlaudio.secrets import masked

if TYPE_CHECKING:
    from rlaudio.recipes.kept import Kept
    from rlaudio.recipes.rl import RunOutcome

_MEMORY_BYTES = 4 << 30
"""Two vLLM engines, one DeepSpeed rank and the driver at tiny size: about 1 GB each, mostly imports."""
_RANK_BYTES = 1 << 30
_DISK_BYTES = 1 << 30
INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and SIGTERM, as shells have them."""


def train_command(
    config_path: str,
    overrides: Sequence[str],
    *,
    resume: str | None,
    tiny: bool = False,
    kept: Kept | None = None,
) -> int:
    """Check everything that can be checked, then run. Returns the exit code; raises RlaudioError on failures.

    Args:
        kept: what the stages of a pipeline leave each other.
    """
    enter_job()
    check_platform()
    check_versions()
    make_importable(config_path, resume=resume)  # before the check, which loads the classes that are named
    config: RunConfig = load_config(RunConfig, config_path, overrides, check=problems_before_start)
    if kept is not None:
        kept.fit(config)
    if kept is not None and kept.waits:
        check_memory(_RANK_BYTES, what="a run's learner, beside engines that run already")
    else:
        check_memory(_MEMORY_BYTES, what="a run's engines and learner")
        check_shm()
    check_writable(config.run.root, setting="run.root")
    check_disk(config.run.root, _DISK_BYTES, what="a run's checkpoints and report")

    if tiny:
        from rlaudio.cli.tiny import tiny_run

        config, folder = tiny_run(config, overrides, config_path=config_path, check=problems_before_start)
        with folder:
            return _run(config, _checked_data(config), folder, resume=False)
    data = _checked_data(config)
    if resume:
        folder = open_run(resume)
    else:
        folder = create_run(config.run.root, name=config.run.name, seed=config.run.seed, config=config_path)
    with folder:
        write_text_atomic(folder.config_yaml, to_yaml(config))
        return _run(config, data, folder, resume=resume is not None, kept=kept)


def _checked_data(config: RunConfig) -> RunData:
    data = read_data(config.data)
    for warning in data.warnings[:MAX_PROBLEMS]:
        print(f"warning: {warning}", file=sys.stderr)
    require_records(config, data.heldout, data.train)
    return data


def make_importable(config_path: str, *, resume: str | None) -> None:
    """Code beside the configuration file; of a resumed run also that beside the file it was started from.

    Raises:
        RunFolderError: `resume` is not a run.
    """
    code_path(config_path)
    first = find_run(resume).first_config if resume else None
    if first is not None:
        code_path(first)


def resume_command(folder: RunFolder) -> str:
    """What to type, from any folder, to go on with a run."""
    return shlex.join(["rlaudio", "train", str(folder.config_yaml), "--resume", str(folder.path)])


def _run(config: RunConfig, data: RunData, folder: RunFolder, *, resume: bool, kept: Kept | None = None) -> int:
    def late() -> None:
        print(
            f"stopped by SIGTERM, and not done with saving after {config.run.stop_deadline_s:g} s "
            f"(run.stop_deadline_s); go on from the last whole checkpoint with: {resume_command(folder)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(TERMINATED)  # whatever hangs must not keep whoever waits for the process

    with StopsOnSigterm(deadline_s=config.run.stop_deadline_s, late=late) as stopping:
        return _run_whole(config, data, folder, stopping, resume=resume, kept=kept)


def _run_whole(
    config: RunConfig, data: RunData, folder: RunFolder, stopping: StopsOnSigterm, *, resume: bool, kept: Kept | None
) -> int:
    from rlaudio.cli.trackers import open_trackers
    from rlaudio.observe.progress import Progress
    from rlaudio.observe.tracker import Status
    from rlaudio.recipes.cluster import joined_ray
    from rlaudio.recipes.rl import resource_needs, run_rl

    if IN_JOB in os.environ:  # `rlaudio submit` reads these lines in the job's log
        print(f"run folder: {folder.path}", flush=True)
    trackers = open_trackers(
        folder,
        config.tracking,
        linked=(lambda link: print(f"mlflow: {link}", flush=True)) if IN_JOB in os.environ else None,
    )
    tracker, mlflow = trackers.all, trackers.mlflow
    tracker.log_params(_flat(to_yaml(config)))
    status: Status = "FAILED"
    try:
        with Progress() as progress, joined_ray(resource_needs(config), waits=True, kept=kept):
            installed = installed_in_s()
            outcome = stopping.run(
                run_rl(
                    config,
                    data=data,
                    folder=folder,
                    tracker=tracker,
                    progress=progress,
                    resume=resume,
                    timings_s={"install": installed} if installed is not None else {},
                    kept=kept,
                )
            )
            progress.stage("writing the report")
            _write_report(config, folder, outcome, open_command=mlflow.open_command() if mlflow else None)
        tracker.log_artifact(folder.report_json)
        tracker.log_artifact(folder.report_html)
        status = "FINISHED"
    except KeyboardInterrupt as stop:
        status = "KILLED"
        by_signal = isinstance(stop, Terminated)
        print(f"stopped{' by SIGTERM' * by_signal}; go on with: {resume_command(folder)}", file=sys.stderr)
        return TERMINATED if by_signal else INTERRUPTED
    except RlaudioError:
        print(f"the run folder keeps what was done: {folder.path}", file=sys.stderr)
        if any(folder.checkpoints.glob("step-*/manifest.json")):
            print(f"go on with: {resume_command(folder)}", file=sys.stderr)
        raise
    finally:
        tracker.finish(status)
    from rlaudio.evals.summary import summary_table

    # Where there is no terminal rich assumes 80 columns, and the intervals would be cut off.
    Console(width=None if sys.stdout.isatty() else 110).print(summary_table(outcome.report))
    if mlflow is not None:
        print(f"curves:  {mlflow.open_command()}")
    print(f"listen:  {folder.report_html}")
    print(f"run: {folder.path}")
    return 0


def _write_report(config: RunConfig, folder: RunFolder, outcome: RunOutcome, *, open_command: str | None) -> None:
    from rlaudio.audio.store import ClipStore
    from rlaudio.observe.report import write_report

    write_json_atomic(folder.report_json, outcome.report)
    voice: Voice | None = load_object(config.evaluation.voice)() if config.evaluation.voice else None
    write_report(
        folder.report_html,
        report=outcome.report,
        before=outcome.before,
        after=outcome.after,
        curves=folder.metrics / "metrics.jsonl",
        clips=ClipStore(config.data.clips),
        voice=voice,
        examples_per_set=config.evaluation.examples,
        open_command=open_command,
    )


def _flat(text: str) -> dict[str, object]:
    import yaml

    flat: dict[str, object] = {}

    def walk(prefix: str, node: object) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), value)
        else:
            flat[prefix] = masked(node) if isinstance(node, str) else node

    walk("", yaml.safe_load(text))
    return flat
