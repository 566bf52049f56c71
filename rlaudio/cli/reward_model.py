"""`rlaudio train CONFIG` with `recipe: reward_model`: supervised phases, RL on agreement if asked, figures."""

import asyncio
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rlaudio.cli.train import INTERRUPTED, make_importable, resume_command, train_command
from rlaudio.config import RunConfig
from rlaudio.config_checks import run_problems
from rlaudio.config_checks_judges import reward_model_problems
from rlaudio.config_judges import RewardModelConfig
from rlaudio.config_loader import load_config, to_yaml
from rlaudio.config_objects import family_problems
from rlaudio.errors import RlaudioError
from rlaudio.preflight import check_platform, check_shm, check_versions, check_writable
from rlaudio.runs import RunFolder, create_run, open_run, write_text_atomic


def reward_model_command(
    config_path: str, overrides: Sequence[str], *, resume: str | None = None, tiny: bool = False
) -> int:
    """Train a judge and measure it. Returns the exit code; raises RlaudioError on expected failures."""
    check_platform()
    check_versions()
    make_importable(config_path, resume=resume)
    config: RewardModelConfig = load_config(RewardModelConfig, config_path, overrides, check=_problems)
    check_writable(config.run.root, setting="run.root")
    check_writable(config.run.output, setting="run.output")
    check_shm()
    if tiny:
        from rlaudio.cli.tiny import tiny_run

        config, folder = tiny_run(config, overrides, config_path=config_path, check=_problems)
    elif resume:
        folder = open_run(resume)
    else:
        folder = create_run(config.run.root, name=config.run.name, seed=config.run.seed, config=config_path)
    with folder:
        write_text_atomic(folder.config_yaml, to_yaml(config))
        return _run(config, folder, resume=resume is not None)


def _run(config: RewardModelConfig, folder: RunFolder, *, resume: bool) -> int:
    from rlaudio.cli.trackers import open_trackers
    from rlaudio.observe.progress import Progress
    from rlaudio.observe.tracker import Status
    from rlaudio.recipes.cluster import joined_ray
    from rlaudio.recipes.judges import measure_judge, tables
    from rlaudio.recipes.reward_model import (
        judge_config,
        read_judge_data,
        resource_needs,
        sft_config,
        trained_policy,
        write_agreement,
    )
    from rlaudio.recipes.sft import run_sft
    from rlaudio.rewards.judged_sets import Figures

    data = read_judge_data(config)
    print(f"{sum(rows.num_rows for rows in data.rows.values())} rows to learn from, {len(data.heldout)} held out")
    supervised, agreement = sft_config(config), None
    if config.agreement.steps:
        output = folder.path / "supervised"
        supervised = dataclasses.replace(supervised, run=dataclasses.replace(config.run, output=str(output)))
        agreement = write_agreement(config, data, folder=folder.path, policy=str(output))
        load_config(RunConfig, agreement, check=run_problems)  # an hour of training later would be late

    tracker = open_trackers(folder, config.tracking).all

    async def measured(progress: Progress) -> dict[str, Figures]:
        return await measure_judge(judge_config(config), data.sets, folder=folder.path, progress=progress)

    status: Status = "FAILED"
    stopped = folder.path / "stopped"
    try:
        needs = resource_needs(config)
        with Progress() as progress, joined_ray(needs):
            asyncio.run(
                run_sft(
                    supervised,
                    tracker=tracker,
                    progress=progress,
                    stopped=stopped,
                    rows=data.rows,
                    checkpoints=folder.checkpoints,
                    resume=resume,
                )
            )
            if agreement is None:
                found = asyncio.run(measured(progress))
        if agreement is not None:  # it joins Ray by itself
            if code := train_command(str(agreement), (), resume=_begun(folder.path / "agreement") if resume else None):
                return code
            shutil.copytree(trained_policy(folder.path), config.run.output, dirs_exist_ok=True)
            with Progress() as progress, joined_ray(needs):
                found = asyncio.run(measured(progress))
        for name, figures in found.items():
            tracker.log({f"calibration/{name}/{key}": value for key, value in _numbers(figures.to_json())}, step=0)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        left = f"the weights so far are in {stopped}; " if stopped.is_dir() else ""
        print(f"stopped; {left}go on with: {resume_command(folder)}", file=sys.stderr)
        return INTERRUPTED
    except RlaudioError:
        print(f"the run folder keeps what was done: {folder.path}", file=sys.stderr)
        raise
    finally:
        tracker.finish(status)
    print(tables(found))
    print(f"checkpoint: {config.run.output}")
    print(f"run: {folder.path}")
    return 0


def _begun(root: Path) -> str | None:
    """The run that an earlier attempt began below `root`."""
    found = [path.parent for path in root.glob("*/run.json")]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None


def _numbers(figures: dict[str, object]) -> list[tuple[str, float]]:
    return [(key, float(value)) for key, value in figures.items() if isinstance(value, int | float)]


def _problems(config: RewardModelConfig) -> list[str]:
    return [*reward_model_problems(config), *family_problems(config.model, key="model")]
