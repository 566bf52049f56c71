"""The short form of `make chaos`: a fault per role in one run, in a process of its own, for it has its own cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(1500)
def test_a_kill_of_every_role_loses_nothing_and_trains_nothing_twice() -> None:
    command = [sys.executable, "-m", "tests.chaos", "--short"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1400)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "short: 6 faults, 2 drivers" in result.stdout, result.stdout
    print(result.stdout)
