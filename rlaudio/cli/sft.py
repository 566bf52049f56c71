"""`rlaudio sft CONFIG [key=value ...] [--resume RUN]`."""

import asyncio
import sys
from collections.abc import Sequence

from rlaudio.cli.train import INTERRUPTED, make_importable, resume_command
from rlaudio.config import SftConfig
from rlaudio.config_checks import sft_problems
from rlaudio.config_loader import load_config, to_yaml
from rlaudio.config_objects import object_problems
from rlaudio.preflight import check_platform, check_shm, check_versions, check_writable
from rlaudio.runs import create_run, open_run, write_text_atomic


def sft_command(config_path: str, overrides: Sequence[str], *, resume: str | None = None, tiny: bool = False) -> int:
    """Train in phases and export a checkpoint. Returns the exit code; raises RlaudioError on expected failures."""
    check_platform()
    check_versions()
    make_importable(config_path, resume=resume)  # before the check, which loads the classes that are named
    config: SftConfig = load_config(SftConfig, config_path, overrides, check=_problems)
    check_writable(config.run.root, setting="run.root")
    check_writable(config.run.output, setting="run.output")
    check_shm()

    from rlaudio.cli.trackers import open_trackers
    from rlaudio.observe.progress import Progress
    from rlaudio.observe.tracker import Status
    from rlaudio.recipes.cluster import joined_ray
    from rlaudio.recipes.sft import run_sft

    if tiny:
        from rlaudio.cli.tiny import tiny_run

        config, folder = tiny_run(config, overrides, config_path=config_path, check=_problems)
    elif resume:
        folder = open_run(resume)
    else:
        folder = create_run(config.run.root, name=config.run.name, seed=config.run.seed, config=config_path)
    with folder:
        write_text_atomic(folder.config_yaml, to_yaml(config))
        tracker = open_trackers(folder, config.tracking).all
        needs = {
            "learner": (config.learner.ranks * config.learner.num_cpus, config.learner.ranks * config.learner.num_gpus)
        }
        status: Status = "FAILED"
        stopped = folder.path / "stopped"
        try:
            with Progress() as progress, joined_ray(needs):
                asyncio.run(
                    run_sft(
                        config,
                        tracker=tracker,
                        progress=progress,
                        stopped=stopped,
                        checkpoints=folder.checkpoints,
                        resume=resume is not None,
                    )
                )
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            left = f"the weights so far are in {stopped}; " if stopped.is_dir() else ""
            print(f"stopped; {left}go on with: {resume_command(folder)}", file=sys.stderr)
            return INTERRUPTED
        finally:
            tracker.finish(status)
        print(f"checkpoint: {config.run.output}")
        print(f"run: {folder.path}")
    return 0


def _problems(config: SftConfig) -> list[str]:
    return [*sft_problems(config), *object_problems(config)]
