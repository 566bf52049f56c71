"""`rlaudio judge CONFIG [key=value ...]`: measure a judge."""

import asyncio
from collections.abc import Sequence

from rlaudio.config_checks_judges import judge_problems
from rlaudio.config_judges import JudgeConfig
from rlaudio.config_loader import code_path, load_config, to_yaml
from rlaudio.preflight import check_platform, check_shm, check_versions, check_writable
from rlaudio.runs import create_run, write_text_atomic


def judge_command(config_path: str, overrides: Sequence[str]) -> int:
    """Ask the judge about every set and print the figures. Returns the exit code; raises RlaudioError on failures."""
    check_platform()
    check_versions()
    code_path(config_path)
    config: JudgeConfig = load_config(JudgeConfig, config_path, overrides, check=judge_problems)
    check_writable(config.run.root, setting="run.root")
    check_shm()

    from rlaudio.observe.progress import Progress
    from rlaudio.recipes.cluster import joined_ray
    from rlaudio.recipes.judges import measure_judge, read_sets, tables

    sets = read_sets(config)
    needs = {"calibration": (config.calibration.num_cpus, config.calibration.num_gpus)}
    with create_run(config.run.root, name=config.run.name, seed=config.run.seed, config=config_path) as folder:
        write_text_atomic(folder.config_yaml, to_yaml(config))
        with Progress() as progress, joined_ray(needs):
            found = asyncio.run(measure_judge(config, sets, folder=folder.path, progress=progress))
        print(tables(found))
        print(f"run: {folder.path}")
    return 0
