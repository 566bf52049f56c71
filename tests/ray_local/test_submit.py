"""`rlaudio submit` against a real head with a token: package, log, stop, going on, and what is said when it fails.

The program in the job is `stand_in_run.py`; the real trainer is submitted and stopped in `test_main_job.py`.
"""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaudio.errors import ClusterError
from rlaudio.jobs.head import connect
from tests.ray_local.cluster_head import Head, head_environment, running_head

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("stand_in_run.py")
KEY = "sk-" + "7" * 29
DEADLINE_S = 500

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head() as one:
        yield one


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A configuration with code beside it, data that is not there (only nodes would need it), and an interpreter."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "config.yaml").write_text(
        f"""
run: {{name: submitted, root: {tmp_path}/runs, steps: 5}}
model: {{path: /nodes/only/model}}
data: {{train: data/train.jsonl, clips: data}}
dialogue: {{user: "beside:User"}}
rewards: {{sources: [{{name: verified, judge: "rlaudio.rewards.verified:VerifiedReward"}}]}}
"""
    )
    (folder / "beside.py").write_text("def User():\n    return 'hello from the package'\n")
    python = tmp_path / "python"
    # Instead of `-m rlaudio.cli.main` it runs the stand-in.
    python.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{STAND_IN}" "$@"\n')
    python.chmod(0o755)
    return folder


def command(head: Head, *arguments: str) -> "subprocess.Popen[str]":
    """`rlaudio submit ARGUMENTS`, with the token."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlaudio.cli.main", "submit", "--address", head.address, *arguments],
        cwd=ROOT,
        env={**head_environment(head), "JUDGE_API_KEY": KEY},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=hear_ctrl_c,
    )


def hear_ctrl_c() -> None:
    """Where the tests themselves were started in a script's background, SIGINT is ignored, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finished(process: "subprocess.Popen[str]", *, code: int) -> str:
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == code, output
    return output


def read_until(process: "subprocess.Popen[str]", wanted: str) -> str:
    """Lines up to the first that holds `wanted`; the process goes on. The test's time-out is the deadline."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if wanted in line:
            return "".join(lines)
    raise AssertionError(f"{wanted!r} never came: {''.join(lines)}")


def test_submit_follow_stop_and_go_on(head: Head, job: Path, tmp_path: Path) -> None:
    config, python = str(job / "config.yaml"), str(tmp_path / "python")
    first = command(head, config, "--python", python, "--env", "JUDGE_API_KEY", "run.steps=100000")
    seen = read_until(first, "step 2")
    assert "the package says hello from the package, the key has 32 letters" in seen
    (job_id,) = re.findall(r"^job: (\S+)$", seen, re.MULTILINE)

    # Ctrl-C ends the following and not the job.
    first.send_signal(signal.SIGINT)
    rest = finished(first, code=130)
    assert f"job {job_id} goes on" in rest and f"--stop {job_id}" in rest
    client = connect(head.address, environment={"RAY_AUTH_TOKEN": head.token})
    assert client.get_job_status(job_id) == "RUNNING"
    metadata = client.get_job_info(job_id).metadata
    assert metadata is not None and metadata["run"] == "submitted" and metadata["config"] == "config.yaml"
    assert KEY not in json.dumps(metadata) and KEY not in client.get_job_info(job_id).entrypoint
    assert job_id in finished(command(head, "--list"), code=0)

    # A stop lets the run save, and the log says how to go on.
    assert f"job {job_id} stopped" in finished(command(head, "--stop", job_id), code=0)
    (run,) = (tmp_path / "runs").iterdir()
    saved = json.loads((run / "checkpoints" / "saved.json").read_text())["step"]
    assert saved >= 2
    log = finished(command(head, "--logs", job_id), code=130)
    assert "stopped; go on with: rlaudio train" in log and f"--resume {run}" in log
    assert log.count("step 1\n") == 1

    again = command(head, config, "--python", python, "--resume", str(run), f"run.steps={saved + 3}")
    output = finished(again, code=0)
    assert f"step {saved + 1}\n" in output and "step 1\n" not in output
    assert f"run: {run}\n" in output
    assert f"curves: http://tracker.invalid/#/experiments/1/runs/{run.name}" in output
    assert json.loads((run / "report.json").read_text())["step"] == saved + 3
    for secret in (KEY, head.token):
        assert secret not in seen + rest + log + output
        logs = [file for file in (head.folder / "ray").rglob("logs/**/*") if file.is_file()]
        assert any(job_id.encode() in file.read_bytes() for file in logs)
        assert not [file for file in logs if secret.encode() in file.read_bytes()]


def test_a_job_that_fails_says_why(head: Head, job: Path) -> None:
    output = finished(command(head, str(job / "config.yaml"), "--python", "/nowhere/python"), code=1)
    assert "failed" in output and "/nowhere/python" in output
    output = finished(command(head, "--stop", "nobody"), code=2)
    assert "ClusterError" in output and "--list" in output and "Traceback" not in output


def test_a_wrong_or_missing_token_and_a_wrong_port(head: Head, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="asks for a token and none was found.*RAY_AUTH_TOKEN"):
        connect(head.address, environment={"HOME": str(tmp_path)})
    with pytest.raises(ClusterError, match="refuses the token.*RAY_AUTH_TOKEN") as caught:
        connect(head.address, environment={"RAY_AUTH_TOKEN": "0" * 48})
    assert "0" * 48 not in str(caught.value)
    joining = f"http://127.0.0.1:{head.ports['--port']}"
    with pytest.raises(ClusterError, match="dashboard"):
        connect(joining, environment={"RAY_AUTH_TOKEN": head.token}, deadline_s=5)
