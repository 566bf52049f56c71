"""Runs `places_on_nodes.py` in a process of its own: a process has one Ray, and other tests of this folder have it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("places_on_nodes.py")


@pytest.mark.timeout(1500)
def test_places_on_two_nodes() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    # 30 s by default: a second node is one more crowd of processes that import Ray.
    patience = {"RAY_raylet_start_wait_time_s": "60", "RAY_gcs_server_request_timeout_seconds": "200"}
    result = subprocess.run(
        command, cwd=CASES.parents[2], env=os.environ | patience, capture_output=True, text=True, timeout=1400
    )
    assert result.returncode == 0, result.stdout + result.stderr
