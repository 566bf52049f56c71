"""A weight group between two processes: over NCCL with a GPU for each, and the same over gloo wherever there is none.

NCCL refuses two members on one GPU ("Duplicate GPU detected"): the row needs two.
"""

import multiprocessing
import os
import queue
import time
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
import pytest
import torch

from rlaudio.weights.groups import Address, WeightGroup, open_store
from rlaudio.weights.snapshot import checksum

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(400)]

NUM_BYTES = 48 << 20
CHUNK = 16 << 20
DEADLINE_S = 120.0
HOST = "127.0.0.1"
NEEDS_TWO = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2,
        reason=f"needs 2 NVIDIA GPUs, found {torch.cuda.device_count()}: NCCL refuses two members on one",
    ),
]


def group_of(address: Address, *, name: str, place: int, on_gpu: bool) -> WeightGroup:
    return WeightGroup(address, name=name, place=place, size=2, host=HOST, on_gpu=on_gpu, timeout_s=DEADLINE_S)


def transfer(group: WeightGroup, values: np.ndarray) -> None:
    for start in range(0, values.nbytes, CHUNK):
        group.broadcast(values[start : start + CHUNK], timeout_s=DEADLINE_S)


def receive(address: Address, on_gpu: bool, told: "Queue[Any]") -> None:
    """The other process: one good group, then one whose sender never sends."""
    values = np.zeros(NUM_BYTES, np.uint8)
    group = group_of(address, name="good", place=1, on_gpu=on_gpu)
    transfer(group, values)
    group.leave()
    told.put(checksum(values))
    silent = group_of(address, name="silent", place=1, on_gpu=on_gpu)
    try:
        silent.broadcast(values[:CHUNK], timeout_s=2.0)
    except RuntimeError as error:
        told.put(type(error).__name__)
    else:
        told.put("it came, though nobody sent it")
    told.close()
    told.join_thread()
    os._exit(0)  # NCCL's own threads may hold an ordinary end up


@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=NEEDS_TWO)], ids=["gloo", "nccl"])
def test_bytes_arrive_and_a_silent_sender_is_an_error_in_time(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    store, address = open_store(HOST)
    spawn = multiprocessing.get_context("spawn")
    told: Any = spawn.Queue()
    if on_gpu:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", _second_device())  # of the child; this process has seen its own
    child = spawn.Process(target=receive, args=(address, on_gpu, told))
    child.start()
    try:
        values = np.random.default_rng(0).integers(0, 256, NUM_BYTES, np.uint8)
        group = group_of(address, name="good", place=0, on_gpu=on_gpu)
        began_s = time.perf_counter()
        transfer(group, values)
        assert told.get(timeout=DEADLINE_S) == checksum(values)
        print(f"{NUM_BYTES / 2**20:.0f} MiB in {time.perf_counter() - began_s:.3f} s", "NCCL" if on_gpu else "gloo")
        group.leave()
        silent = group_of(address, name="silent", place=0, on_gpu=on_gpu)
        said = told.get(timeout=DEADLINE_S)
        assert said.endswith("Error"), said
        silent.leave()
        child.join(DEADLINE_S)
        assert child.exitcode == 0
    except queue.Empty:
        pytest.fail(f"the receiver said nothing within {DEADLINE_S:.0f} s; its exit code is {child.exitcode}")
    finally:
        child.kill()
        child.join(10.0)
        del store


def _second_device() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[1] if visible else "1"
