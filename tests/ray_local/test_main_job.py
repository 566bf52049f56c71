"""The main job as a user runs it: real Ray, vLLM, DeepSpeed (two ranks), MLflow, sound; stopped and gone on with."""

import contextlib
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
STEPS = 3


def start(world: Path, root: Path, *arguments: str, steps: int = STEPS) -> "subprocess.Popen[str]":
    return launch(
        root,
        *("train", str(QUICKSTART / "config.yaml")),
        *of_world(world),
        *(f"run.root={root}", f"run.steps={steps}", "run.checkpoint_every=1"),
        *("algorithm.groups_per_step=2", "algorithm.group_size=4"),
        *("learner.ranks=2", "learner.num_cpus=0.3", "evaluation.examples=2"),
        *arguments,
    )


def of_world(world: Path) -> tuple[str, ...]:
    heldout = [f"data.heldout.{name}={world}/{name}.jsonl" for name in ("heldout", "heldout_voices")]
    return (f"data.train={world}/train.jsonl", f"data.clips={world}", *heldout)


def launch(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    """`rlaudio ARGUMENTS`, typed in `folder`."""
    command = [sys.executable, "-m", "rlaudio.cli.main", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_checkpoint(root: Path, process: "subprocess.Popen[str]", *, deadline_s: float) -> None:
    until = time.monotonic() + deadline_s
    while not list(root.glob("*/checkpoints/step-*/manifest.json")):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"no checkpoint came: {process.communicate()[0]}")
        time.sleep(0.2)


@pytest.mark.timeout(1800)
def test_a_run_is_stopped_resumed_and_reported(small_world: Path, tmp_path: Path) -> None:
    first = start(small_world, tmp_path, steps=400)
    wait_for_checkpoint(tmp_path, first, deadline_s=600)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 130, output
    (run,) = tmp_path.glob("quickstart-*")
    printed = re.search(r"^stopped; go on with: rlaudio (train .*)$", output, re.MULTILINE)
    assert printed is not None, output

    stopped_at = max(int(path.parent.name.split("-")[1]) for path in run.glob("checkpoints/*/manifest.json"))
    before = (run / "evaluation-before-heldout.json").read_bytes()
    steps = stopped_at + 2
    resumed = launch(tmp_path, *shlex.split(printed[1]), f"run.steps={steps}")
    output, _ = resumed.communicate(timeout=800)
    assert resumed.returncode == 0, output
    assert output.rstrip().splitlines()[-1] == f"run: {run}"
    assert (run / "evaluation-before-heldout.json").read_bytes() == before

    assert json.loads((run / "doctor.json").read_text())["verdict"] == "pass"
    report = json.loads((run / "report.json").read_text())
    for name in ("heldout", "heldout_voices"):
        assert report[name]["before"]["num_dialogues"] == 6
        assert set(report[name]["delta"]) == {"accuracy", "reward"}
        low, high = report[name]["delta"]["accuracy"]["ci95"]
        assert low <= report[name]["delta"]["accuracy"]["mean"] <= high
        assert 0.0 <= report[name]["after"]["parsable"] <= 1.0
    assert report["timings_s"]["train"] > 0
    assert report["throughput"]["dialogues_per_s"] > 0

    lines = [json.loads(line) for line in (run / "metrics" / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("doctor/logprobs/max_nats", 1.0) < 1e-4 for line in lines)
    assert any(line.get("sync/paused_s", 0.0) > 0 for line in lines)
    rows = [line for line in lines if "reward/verified" in line]
    steps_seen = [row["step"] for row in rows]
    assert set(range(steps)) <= set(steps_seen)
    assert all(row["age/max"] <= 1 for row in rows)
    reused = re.search(r"groups that come back (\d+) are ready", output)
    assert reused is not None, output
    # Encoder states of reused groups are gone: the ranks encode those clips, and nobody else's.
    shipped = [row for row in rows if row["step"] < stopped_at or reused[1] == "0"]
    assert shipped and all(row["encoder_forwards"] == 0 and row["rollout/clips"] > 0 for row in shipped)
    for name in ("reward/verified", "reward/judge", "kl", "entropy", "length/response", "throughput/tokens_per_s"):
        assert any(name in row for row in rows), name
    page = (run / "report.html").read_text()
    assert page.count("<audio") > 0
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=[\"']https?:", page)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        stored = {name for (name,) in database.execute("select distinct key from metrics")}
    for source in ("verified", "judge"):
        assert {f"reward/{source}", f"share/{source}"} <= stored, "each source has curves of its own in MLflow"
    assert {"detail/verified/correct", "detail/judge/consistent", "style/warm", "judge/asked"} <= stored
    assert report["groups"]["trained"] == 2 * 2
    assert (run / "model" / "model.safetensors").is_file()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algorithm.group_sise=4", "group_size"),
        ("data.train=/nowhere/train.jsonl", "/nowhere/train.jsonl"),
        ("rewards.sources=[]", "rewards.sources is empty"),
        ("dialogue.user=rlaudio.dialogue.users:ScriptedUsr", "ScriptedUser"),
        ("run.root=/proc/nowhere", "/proc/nowhere"),
    ],
)
def test_bad_settings_end_in_one_line_and_leave_nothing(
    small_world: Path, tmp_path: Path, override: str, message: str
) -> None:
    process = start(small_world, tmp_path, override)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    assert message in output
    assert "Traceback" not in output
    assert not list(tmp_path.glob("quickstart-*"))
