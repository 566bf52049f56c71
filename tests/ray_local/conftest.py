"""Shared by the learner's tests. Heavy imports stay inside: other tests of this folder do not need them."""

import asyncio
import subprocess
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"

if TYPE_CHECKING:
    from rlaudio.engines.async_llm import AsyncLLMEngine
    from rlaudio.learner.group import LearnerGroup
    from tests.ray_local.engine_world import Worlds
    from tests.ray_local.learner_world import World


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's world with a few records."""
    out = tmp_path_factory.mktemp("small_world") / "data"
    counts = ["--train", "12", "--heldout", "6", "--heldout-voices", "6"]
    command = [sys.executable, "-m", "spoken_world.make", "--out", str(out), *counts]
    subprocess.run(command, cwd=QUICKSTART, check=True, timeout=300, stdout=subprocess.DEVNULL)
    return out


@pytest.fixture(scope="session")
def learner_world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> "World":
    from tests.ray_local.learner_world import World

    return World(tiny_checkpoint, tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """This process is a learner of one rank."""
    import torch.distributed as dist

    from rlaudio.learner.optimization import join_ranks, leave_ranks

    store = dist.HashStore()  # type: ignore[attr-defined]
    join_ranks(rank=0, world_size=1, store=store, on_gpu=False, timeout_s=60.0)
    yield
    leave_ranks()


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> "Worlds":
    from tests.ray_local.engine_world import Worlds

    return Worlds.create(tmp_path_factory.mktemp("worlds"))


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def async_llm(worlds: "Worlds") -> AsyncIterator["AsyncLLMEngine"]:
    """`AsyncLLM` with the weights of `worlds.start`, as version `OLD`. It takes about a minute to start: one for all.

    It lives in the session's event loop (`pytest.mark.asyncio(loop_scope="session")`), and whoever moves its weights
    puts `worlds.start` back as version `OLD`.
    """
    from rlaudio.engines.async_llm import AsyncLLMEngine
    from tests.ray_local.engine_world import OLD

    engine = AsyncLLMEngine(worlds.start.settings(), version=OLD)
    yield engine
    with warnings.catch_warnings(action="ignore"):  # vLLM's own, when it ends
        async with asyncio.timeout(60):
            await engine.close()


@pytest.fixture(scope="session")
def ranks(learner_world: "World", ray_session: None) -> "Iterator[LearnerGroup]":
    """Two learner processes for all of test_zero*.py; `zero_world.rebuild` makes other ranks in them.

    They train in the thread that ranks with a collective transport train in.
    """
    import dataclasses

    from rlaudio.learner.group import LearnerGroup
    from tests.ray_local.zero_world import COLLECTIVE, NO_REFERENCE

    spec = dataclasses.replace(learner_world.spec(ranks=2, step_deadline_s=180.0), sync=COLLECTIVE)
    group = LearnerGroup(spec, algorithm=NO_REFERENCE)
    try:
        asyncio.run(group.start())
        yield group
    finally:
        asyncio.run(group.stop())
