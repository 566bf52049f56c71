"""`python -m mgrd_study`, in the folder of the example: data, the start, every seed's pipeline, the table.

Started again it goes on where it was. `--seeds 3` is seeds 0, 1 and 2; `--seed 1 --until sft_1` runs one seed up to one
stage and reports nothing, for whoever has half an hour at a time.
"""

from __future__ import annotations

import argparse
import os
import sys

from mgrd_study.data import make_data
from mgrd_study.experiment import HERE, Plan, report, run, tables, verdict
from rlaudio.cli.main import main as rlaudio
from rlaudio.evals.stats import MAX_SEEDS


def main() -> int:
    given = _arguments()
    seeds = (given.seed,) if given.seed is not None else tuple(range(given.seeds))
    plan = Plan(seeds, tiny=given.tiny)
    os.chdir(HERE)
    make_data(HERE / "data")
    code = run(plan, train=rlaudio, until=given.until)
    if code or given.until:
        return code
    results, page = report(plan)
    outcome, words = verdict(results)
    print(f"{tables(results)}\n{outcome}: {words}\nreport: {page}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mgrd_study", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help=f"how many, from 0 on; at most {MAX_SEEDS}")
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--until", default="", help="cold_start, or a stage of pipeline.yaml: the last one to run")
    parser.add_argument("--tiny", action="store_true", help="two steps per stage, few questions: the mechanics alone")
    given = parser.parse_args()
    if not 1 <= given.seeds <= MAX_SEEDS:
        parser.error(f"--seeds is {given.seeds}: give 1 to {MAX_SEEDS}")
    return given


if __name__ == "__main__":
    sys.exit(main())
