"""`python -m trap_arms`, in the folder of the example: data, judge, every seed's arms, evaluation, report.

Started again it goes on where it was. `--seeds 3` is seeds 0, 1 and 2; `--seed 1 --until rlhf` runs one seed up to one
stage and reports nothing, for whoever has half an hour at a time.
"""

from __future__ import annotations

import argparse
import os
import sys

from rich.console import Console
from rich.table import Table
from spoken_world.voice import EspeakVoice

from rlaudio.cli.main import main as rlaudio
from rlaudio.evals.stats import MAX_SEEDS
from rlaudio.observe.listen import Narrator
from trap_arms.data import make_data
from trap_arms.experiment import HERE, Plan, report, run
from trap_arms.measures import MEASURES
from trap_arms.page import between, number
from trap_arms.verdict import ARMS, Claim, Results, headline


def main() -> int:
    given = _arguments()
    seeds = (given.seed,) if given.seed is not None else tuple(range(given.seeds))
    plan = Plan(seeds, tiny=given.tiny)
    os.chdir(HERE)
    make_data(HERE / "data", world=plan.world)
    code = run(plan, train=rlaudio, until=given.until)
    if code or given.until:
        return code
    results, found, page = report(plan, narrator=Narrator(EspeakVoice()))
    print_results(results, found)
    print(f"report: {page}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trap_arms", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help=f"how many, from 0 on; at most {MAX_SEEDS}")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--until", default="", help="judge, or a stage of pipeline.yaml: the last one to run")
    parser.add_argument("--tiny", action="store_true", help="two steps per arm, few prompts: the mechanics alone")
    given = parser.parse_args()
    if not 1 <= given.seeds <= MAX_SEEDS:
        parser.error(f"--seeds is {given.seeds}: give 1 to {MAX_SEEDS}")
    return given


def print_results(results: Results, found: list[Claim]) -> None:
    arms = [arm for arm in ARMS if arm in results.levels]
    table = Table("measure", *arms)
    for measure in MEASURES:
        cells = []
        for arm in arms:
            level, change = results.levels[arm].get(measure), results.since_start.get(arm, {}).get(measure)
            style = "green" if change and change.rose else "red" if change and change.fell else ""
            text = f"{number(level.mean, measure)}\n{between(level, measure)}" if level else "-"
            cells.append(f"[{style}]{text}[/]" if style else text)
        table.add_row(measure, *cells)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for claim in found:
        console.print(f"[bold]{claim.outcome}[/]: {claim.claim}\n  {claim.words}", highlight=False)
    console.print(f"[bold]{headline(found)}[/]", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
