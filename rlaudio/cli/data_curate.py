"""`rlaudio data curate CONFIG [key=value ...] [--resume RUN]`: keep records that the policy sometimes gets right."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlaudio.cli.rolled import roll
from rlaudio.cli.train import make_importable
from rlaudio.config_checks_stages import curation_problems
from rlaudio.config_loader import load_config, to_yaml
from rlaudio.config_objects import object_problems
from rlaudio.config_stages import CurationConfig
from rlaudio.data.problems import MAX_PROBLEMS
from rlaudio.data.run_data import read_data
from rlaudio.preflight import check_platform, check_shm, check_versions, check_writable
from rlaudio.runs import RunFolder, create_run, open_run, write_text_atomic
from rlaudio.types import PromptRecord


def curate_command(config_path: str, overrides: Sequence[str], *, resume: str | None) -> int:
    """Check everything that can be checked, then roll out. Returns the exit code; raises RlaudioError on failures."""
    check_platform()
    check_versions()
    make_importable(config_path, resume=resume)  # before the check, which loads the classes that are named
    config: CurationConfig = load_config(CurationConfig, config_path, overrides, check=_problems)
    check_shm()
    check_writable(config.run.root, setting="run.root")
    if config.curation.output:
        check_writable(str(Path(config.curation.output).parent), setting="curation.output")

    from rlaudio.recipes.curation import verified_turns, verifying

    data = read_data(config.data)
    for warning in data.warnings[:MAX_PROBLEMS]:
        print(f"warning: {warning}", file=sys.stderr)
    records = data.train[: config.curation.max_records or None]
    config = verifying(config)
    verified_turns(config, records)  # a run folder is made for what can begin
    if resume:
        folder = open_run(resume)
    else:
        folder = create_run(config.run.root, name=config.run.name, seed=config.run.seed, config=config_path)
    with folder:
        write_text_atomic(folder.config_yaml, to_yaml(config))
        return _run(config, records, folder)


def _problems(config: CurationConfig) -> list[str]:
    return [*curation_problems(config), *object_problems(config)]


def _run(config: CurationConfig, records: Sequence[PromptRecord], folder: RunFolder) -> int:
    from rlaudio.recipes.curation import KEPT, run_curation

    report = roll(
        config,
        folder,
        lambda tracker, progress: run_curation(
            config, records=records, folder=folder, tracker=tracker, progress=progress
        ),
        again=shlex.join(["rlaudio", "data", "curate", str(folder.config_yaml), "--resume", str(folder.path)]),
    )
    if isinstance(report, int):
        return report
    Console(width=None if sys.stdout.isatty() else 110).print(curation_table(report))
    print(f"report:  {folder.report_html}")
    print(f"records: {config.curation.output or folder.path / KEPT}")
    print(f"run: {folder.path}")
    return 0


def curation_table(report: Mapping[str, Any]) -> Table:
    """What was kept of each task, for a terminal."""
    low, high = report["keep"]
    table = Table(title=f"records of which {low} to {high} of {report['k']} dialogues are right")
    table.add_column("task")
    for column in ("records", "kept", "too hard", "too easy", "unjudged", "right"):
        table.add_column(column, justify="right")
    for name, counts in [*report["tasks"].items(), ("all", report["all"])]:
        numbers = [str(counts[key]) for key in ("records", "kept", "too_hard", "too_easy", "unjudged")]
        rate = counts["pass_rate"]
        table.add_row(name, *numbers, "-" if rate is None else f"{rate:.0%}")
    return table
