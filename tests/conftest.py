"""Shared by all tests: deadlines for coroutines, the GPU marker, one tiny checkpoint and one Ray session per run."""

import asyncio
import functools
import inspect
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
COROUTINE_DEADLINE_S = 90.0
"""Shorter than pytest's own time-out, so that a stuck coroutine is cancelled and cleans up after itself."""
SOAK_DEADLINE_S = 24 * 3600.0
TINY_WORDS = "the a is and my your code number word rule one two three four five six seven nine zero".split()

# Before any library reads them. Ray's workers inherit these, and find `tests.fakes` through PYTHONPATH.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# torch looks up the name of every peer it connects to: where a name server is slow, 5 s each time instead of 1 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: beside another job workers miss their deadlines
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


# pytest's time-out bounds a test; a deadline per example would fail on a busy machine. Same examples each run.
settings.register_profile("rlaudio", deadline=None, derandomize=True)
settings.load_profile("rlaudio")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") is not None and not has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, this machine has none (no /dev/nvidia0)"))
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = with_deadline(item.obj, deadline_s=deadline_of(item))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tables that tests made (`record_property("table", text)`), whatever became of the tests."""
    reports = [report for listed in terminalreporter.stats.values() for report in listed]
    for report in reports:
        for name, text in getattr(report, "user_properties", ()):
            if name == "table" and report.when == "call":
                terminalreporter.section(report.nodeid)
                terminalreporter.write_line(text)


def has_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/gpus").exists()


def deadline_of(item: pytest.Item) -> float:
    """What `@pytest.mark.timeout(seconds)` allows, less the time to clean up; the default without a mark."""
    mark = item.get_closest_marker("timeout")
    if mark is None:
        return SOAK_DEADLINE_S if item.get_closest_marker("soak") else COROUTINE_DEADLINE_S
    limit = mark.args[0] if mark.args else mark.kwargs["timeout"]
    return float(limit) * COROUTINE_DEADLINE_S / 120.0


def with_deadline(
    test: Callable[..., Coroutine[Any, Any, None]], *, deadline_s: float
) -> Callable[..., Coroutine[Any, Any, None]]:
    @functools.wraps(test)
    async def bounded(*args: object, **kwargs: object) -> None:
        async with asyncio.timeout(deadline_s):
            await test(*args, **kwargs)

    return bounded


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised policy in the public layout, small enough for every test; do not write into it."""
    from rlaudio.models.step_audio import create_tiny

    return create_tiny(tmp_path_factory.mktemp("tiny") / "policy", words=TINY_WORDS, seed=0).path


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of four logical processors for the whole test run; a test kills the actors that it made."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=256 << 20,
        log_to_driver=False,
        namespace="tests",
    )
    yield
    ray.shutdown()
