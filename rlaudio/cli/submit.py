"""`rlaudio submit CONFIG --address http://HEAD:8265 [key=value ...]`, and what one wants to know of jobs afterwards."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlaudio.errors import ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from rlaudio.jobs.package import Package

INTERRUPTED = 130


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options besides CONFIG and key=value."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    command.add_argument("--address", default=address, metavar="URL", help=f"the head's dashboard (default {address})")
    command.add_argument("--resume", metavar="RUN", help="go on with this run folder, given as the nodes see it")
    command.add_argument("--no-follow", action="store_true", help="return when the job is submitted")
    command.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="pass this variable on, for example OPENAI_API_KEY; NAME=value if it is no secret",
    )
    command.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these files here")
    command.add_argument("--python", default="", metavar="PATH", help="interpreter on the nodes that has rlaudio")
    command.add_argument("--stop", metavar="ID", help="stop a job; it saves a checkpoint first")
    command.add_argument("--logs", metavar="ID", help="print a job's log, and follow it")
    command.add_argument("--list", action="store_true", help="list the jobs of the cluster")


def submit_command(arguments: argparse.Namespace) -> int:
    """Submit a run, or stop, follow, list jobs. Returns the exit code; raises RlaudioError on expected failures.

    Exit codes: 0 submitted or ended well, 1 the job failed, 130 it was stopped, or following it was.
    """
    asked = [arguments.config is not None, bool(arguments.stop), bool(arguments.logs), arguments.list]
    if sum(asked) != 1:
        raise ConfigError("give either a CONFIG to submit, or one of --stop ID, --logs ID, --list")
    from rlaudio.jobs.head import connect

    if arguments.config is not None:
        return _submit(arguments, arguments.overrides)
    client = connect(arguments.address)
    if arguments.stop:
        return _stop(client, arguments.stop)
    if arguments.logs:
        return _follow(client, arguments.logs, address=arguments.address)
    return _list(client)


def _submit(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from rlaudio.config import RunConfig
    from rlaudio.config_checks import run_problems
    from rlaudio.config_loader import load_config
    from rlaudio.jobs.head import connect
    from rlaudio.jobs.package import pack
    from rlaudio.jobs.submission import order, send

    # Values only: the classes that are named, and what they import, need to be on the nodes and not here.
    config: RunConfig = load_config(RunConfig, arguments.config, overrides, check=run_problems)
    package = pack(config, arguments.config, excludes=arguments.exclude)
    asked = order(
        name=config.run.name,
        config_path=arguments.config,
        resume=arguments.resume,
        passed=arguments.env,
        python=arguments.python,
        environment=os.environ,
    )
    client = connect(arguments.address)
    _say(_summary(package))
    send(client, package, asked, told=_say)
    _say(f"job: {asked.job_id}")
    again = shlex.join(["rlaudio", "submit", arguments.config, "--address", arguments.address, *overrides])
    if arguments.no_follow:
        _say(f"follow it: {_command('--logs', asked.job_id, arguments.address)}")
        _say(f"stop it:   {_command('--stop', asked.job_id, arguments.address)}")
        return 0
    return _follow(client, asked.job_id, address=arguments.address, again=again)


def _follow(client: JobSubmissionClient, job_id: str, *, address: str, again: str = "") -> int:
    from rlaudio.jobs.follow import Reported, follow

    reported = Reported()

    def write(text: str) -> None:
        reported.take(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        details = asyncio.run(follow(client, job_id, write=write))
    except KeyboardInterrupt:
        _say(f"\njob {job_id} goes on; follow it: {_command('--logs', job_id, address)}")
        _say(f"stop it: {_command('--stop', job_id, address)}")
        return INTERRUPTED
    status = str(details.status.value)
    if reported.mlflow:
        _say(f"curves: {reported.mlflow}")
    _say(f"job {job_id} {status.lower()}" + (f": {_why(details.message)}" if status == "FAILED" else ""))
    if status == "SUCCEEDED":
        return 0
    if reported.run_folder:
        begin = again or "rlaudio submit CONFIG"
        _say(f"go on with: {begin} --resume {shlex.quote(reported.run_folder)}")
    return INTERRUPTED if status == "STOPPED" else 1


def _stop(client: JobSubmissionClient, job_id: str) -> int:
    from rlaudio.jobs.follow import ENDED, job_details, wait_for_end
    from rlaudio.jobs.submission import STOP_WAIT_S

    details = job_details(client, job_id)
    if details.status.value in ENDED:
        _say(f"job {job_id} has ended already: {details.status.value.lower()}")
        return 0
    client.stop_job(job_id)
    _say(f"job {job_id} was told to stop; it may save a checkpoint for up to {STOP_WAIT_S} s")
    try:
        details = asyncio.run(wait_for_end(client, job_id, deadline_s=STOP_WAIT_S + 30.0))
    except KeyboardInterrupt:
        _say("it goes on stopping")
        return INTERRUPTED
    _say(f"job {job_id} {details.status.value.lower()}")
    return 0


def _list(client: JobSubmissionClient) -> int:
    from rlaudio.secrets import masked

    jobs = [job for job in client.list_jobs() if job.submission_id]
    for job in sorted(jobs, key=lambda one: one.start_time or 0):
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
        run = (job.metadata or {}).get("run", "")
        print(f"{started}  {job.status.value:<9}  {job.submission_id}  {masked(run)}")
    if not jobs:
        print("no jobs were submitted to this cluster")
    return 0


def _summary(package: Package) -> str:
    megabytes = package.size_bytes / 1e6
    lines = [f"sending {len(package.files) + 1} files, {megabytes:.2f} MB: the configuration and its code"]
    lines += [f"  every node reads {setting} at {path}" for setting, path in package.left_behind]
    return "\n".join(lines)


def _why(message: str | None) -> str:
    text = " ".join((message or "no reason given").split())
    if "127" in text:
        text += "; the head has no `rlaudio` on its path: start Ray from its environment, or pass --python PATH"
    return text[-600:]


def _command(option: str, job_id: str, address: str) -> str:
    return shlex.join(["rlaudio", "submit", option, job_id, "--address", address])


def _say(text: str) -> None:
    print(text, flush=True)
