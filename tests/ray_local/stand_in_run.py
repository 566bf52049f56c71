"""What the submitted job runs instead of `rlaudio train`, whose engines take a minute to start.

Everything around engines and learner is the real thing: the packed configuration, the cluster that is joined, an actor
that imports code from the package, the run folder and its lock, Ctrl-C, going on with a run.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

import ray

from rlaudio.cli.train import make_importable, resume_command
from rlaudio.config import RunConfig
from rlaudio.config_loader import load_config
from rlaudio.jobs.passed import enter_job
from rlaudio.recipes.cluster import actor_environment, joined_ray
from rlaudio.registry import load_object
from rlaudio.runs import create_run, open_run, write_json_atomic


def ask_code_from_package(name: str) -> tuple[str, str]:
    """In an actor: what the package's code says, and a variable that was passed on."""
    return load_object(name)(), os.environ.get("JUDGE_API_KEY", "")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("config")
    parser.add_argument("--resume")
    arguments = parser.parse_args()
    assert arguments.command == "train"
    enter_job()
    make_importable(arguments.config, resume=arguments.resume)
    config = load_config(RunConfig, arguments.config)
    if arguments.resume:
        folder = open_run(arguments.resume)
    else:
        folder = create_run(config.run.root, name=config.run.name, seed=config.run.seed, config=arguments.config)
    with folder:
        print(f"run folder: {folder.path}", flush=True)
        print(f"mlflow: http://tracker.invalid/#/experiments/1/runs/{folder.path.name}", flush=True)
        state = folder.checkpoints / "step.json"
        step = json.loads(state.read_text())["step"] if state.exists() else 0
        try:
            with joined_ray({"rollout": (0.5, 0.0)}):
                remote = ray.remote(ask_code_from_package).options(
                    num_cpus=0.5, runtime_env={"env_vars": actor_environment()}
                )
                said, key = ray.get(remote.remote(config.dialogue.user), timeout=100)
                print(f"the package says {said}, the key has {len(key)} letters", flush=True)
                while step < config.run.steps:
                    step += 1
                    write_json_atomic(state, {"step": step})
                    print(f"step {step}", flush=True)
                    time.sleep(0.05)
        except KeyboardInterrupt:
            time.sleep(4.0)  # longer than Ray 2.60 waits unless told: a checkpoint takes time
            write_json_atomic(folder.checkpoints / "saved.json", {"step": step})
            print(f"stopped; go on with: {resume_command(folder)}", file=sys.stderr)
            return 130
        write_json_atomic(folder.report_json, {"step": step})
    print(f"run: {folder.path}")
    return 0


if __name__ == "__main__":
    assert Path.cwd().name.startswith("_ray_pkg_"), shlex.quote(str(Path.cwd()))
    sys.exit(main())
