"""`rlaudio train` with `recipe: distil`: the policy's own answers that pass every filter, to fine-tune it on."""

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
from rlaudio.config_checks_stages import distil_problems
from rlaudio.config_loader import load_config, to_yaml
from rlaudio.config_objects import object_problems
from rlaudio.config_stages import DistilConfig
from rlaudio.data.distil import select
from rlaudio.data.problems import MAX_PROBLEMS
from rlaudio.data.run_data import read_data
from rlaudio.preflight import check_platform, check_shm, check_versions, check_writable
from rlaudio.runs import create_run, open_run, write_text_atomic


def distil_command(config_path: str, overrides: Sequence[str], *, resume: str | None) -> int:
    """Check everything that can be checked, then roll out. Returns the exit code; raises RlaudioError on failures."""
    check_platform()
    check_versions()
    make_importable(config_path, resume=resume)  # before the check, which loads the classes that are named
    config: DistilConfig = load_config(DistilConfig, config_path, overrides, check=_problems)
    check_shm()
    check_writable(config.run.root, setting="run.root")
    if config.distil.output:
        check_writable(str(Path(config.distil.output).parent), setting="distil.output")

    from rlaudio.models.families import open_family
    from rlaudio.recipes.distil import RECORDS, filtering, require_judged, run_distil, writable_by

    data = read_data(config.data)  # refuses sounds that are held out, before one of them is learned
    for warning in data.warnings[:MAX_PROBLEMS]:
        print(f"warning: {warning}", file=sys.stderr)
    records = select(data.train, config.distil)
    config = filtering(config)
    require_judged(config, records)
    writable = writable_by(open_family(config.model))
    if resume:
        folder = open_run(resume)
    else:
        folder = create_run(config.run.root, name=config.run.name, seed=config.run.seed, config=config_path)
    with folder:
        write_text_atomic(folder.config_yaml, to_yaml(config))
        report = roll(
            config,
            folder,
            lambda tracker, progress: run_distil(
                config, records=records, writable=writable, folder=folder, tracker=tracker, progress=progress
            ),
            again=shlex.join(["rlaudio", "train", str(folder.config_yaml), "--resume", str(folder.path)]),
        )
    if isinstance(report, int):
        return report
    Console(width=None if sys.stdout.isatty() else 110).print(distil_table(report))
    print(f"records: {config.distil.output or folder.path / RECORDS}")
    print(f"run: {folder.path}")
    return 0


def _problems(config: DistilConfig) -> list[str]:
    return [*distil_problems(config), *object_problems(config)]


def distil_table(report: Mapping[str, Any]) -> Table:
    """What became of the sampled turns of each task, for a terminal."""
    total = sum(report["turns"].values())
    table = Table(title=f"{report['answers']} answers to {report['records']['answered']} records, of {total} turns")
    table.add_column("what became of turns")
    tasks = report["tasks"]
    for column in (*tasks, "all"):
        table.add_column(column, justify="right")
    for fate, number in report["turns"].items():
        table.add_row(fate, *(str(counts[fate]) for counts in tasks.values()), str(number))
    return table
