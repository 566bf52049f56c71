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

from rlaudio.cli.main import main as rlaudio
from trap_arms.data import make_data
from trap_arms.experiment import HERE, JUDGE_PIPELINE, PIPELINE, WORLD, Plan, report
from trap_arms.measures import MAX_SEEDS, MEASURES
from trap_arms.page import between, number
from trap_arms.verdict import ARMS, Claim, Results, headline

JUDGE = "judge"


def main() -> int:
    given = _arguments()
    seeds = (given.seed,) if given.seed is not None else tuple(range(given.seeds))
    plan = Plan(seeds, tiny=given.tiny)
    os.chdir(HERE)
    make_data(HERE / "data", world=WORLD)
    if not plan.tiny:
        code = rlaudio(["train", JUDGE_PIPELINE, *plan.judge()])
        if code or given.until == JUDGE:
            return code
    for seed in seeds:
        code = rlaudio(["train", PIPELINE, *plan.arms(seed, until=given.until)])
        if code:
            return code
    if given.until:
        return 0
    results, found, page = report(plan)
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
