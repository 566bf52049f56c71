"""`rlaudio train CONFIG` with `recipe: evaluate`: checkpoints on the held-out sets, compared in their order."""

import asyncio
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rlaudio.cli.train import INTERRUPTED, make_importable, resume_command
from rlaudio.config_checks_stages import evaluation_problems
from rlaudio.config_loader import load_config, to_yaml
from rlaudio.config_objects import object_problems, require_records
from rlaudio.config_stages import EvaluationConfig
from rlaudio.data.run_data import read_data
from rlaudio.preflight import check_platform, check_shm, check_versions, check_writable
from rlaudio.runs import create_run, open_run, write_text_atomic


def evaluate_command(config_path: str, overrides: Sequence[str], *, resume: str | None) -> int:
    """Evaluate and print a table. Returns the exit code; raises RlaudioError on failures."""
    check_platform()
    check_versions()
    make_importable(config_path, resume=resume)
    config: EvaluationConfig = load_config(EvaluationConfig, config_path, overrides, check=_problems)
    check_shm()
    check_writable(config.run.root, setting="run.root")

    from rlaudio.cli.trackers import open_trackers
    from rlaudio.observe.progress import Progress
    from rlaudio.observe.tracker import Status
    from rlaudio.recipes.cluster import joined_ray
    from rlaudio.recipes.evaluation import run_evaluation
    from rlaudio.recipes.pipeline import points
    from rlaudio.recipes.playing import playing_needs

    data = read_data(config.data)
    require_records(config, data.heldout)
    if resume:
        folder = open_run(resume)
    else:
        folder = create_run(config.run.root, name=config.run.name, seed=config.run.seed, config=config_path)
    with folder:
        write_text_atomic(folder.config_yaml, to_yaml(config))
        tracker = open_trackers(folder, config.tracking).all
        status: Status = "FAILED"
        try:
            with Progress() as progress, joined_ray(playing_needs(config), waits=True):
                report = asyncio.run(
                    run_evaluation(config, data=data, folder=folder, tracker=tracker, progress=progress)
                )
            tracker.log_artifact(folder.report_json)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            print(f"stopped; go on with: {resume_command(folder)}", file=sys.stderr)
            return INTERRUPTED
        finally:
            tracker.finish(status)
        table = Table("policy", "set", "accuracy", "reward", "gain of accuracy")
        for name, levels in report["levels"].items():
            for heldout, side in levels.items():
                gain = report["gains"].get(name, {}).get(heldout)
                change = points(gain["accuracy"]) if gain else ""
                table.add_row(name, heldout, f"{side['accuracy']['all']:.1%}", f"{side['reward']:.3f}", change)
        Console(width=None if sys.stdout.isatty() else 110).print(table)
        print(f"run: {folder.path}")
    return 0


def _problems(config: EvaluationConfig) -> list[str]:
    return [*evaluation_problems(config), *object_problems(config)]
