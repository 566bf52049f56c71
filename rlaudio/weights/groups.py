"""One member's end of a process group that exists for weights alone, and threads that can be left behind.

The group is built beside `torch.distributed`'s default group, never in it: training collectives of the learner, and
vLLM's own group in a rollout actor, do not know of it. gloo and NCCL calls cannot be interrupted from Python and gloo's
`abort` does not end a call under way (torch 2.13), so each call runs in a daemon thread with a time-out of its own, and
whoever waits for it may walk away.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from rlaudio.weights.deadline import Deadline

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

Address = tuple[str, int]


class WeightGroup:
    """A sender (place 0) and its receivers. Building it blocks until all are there, or raises.

    Args:
        store: of the meeting place, see `open_store`.
        name: of the group; never used twice.
        place, size: in the group.
        host: under which the others reach this process.
        on_gpu: NCCL instead of gloo; values then pass through this process's device.
        timeout_s: for all to be there.
    """

    def __init__(
        self, address: Address, *, name: str, place: int, size: int, host: str, on_gpu: bool, timeout_s: float
    ) -> None:
        import torch.distributed as dist

        c10d: Any = import_module("torch._C._distributed_c10d")  # whose stubs lack half of what is used here
        deadline = Deadline(timeout_s)
        timeout = timedelta(seconds=timeout_s)
        client = dist.TCPStore(address[0], address[1], None, False, timeout, False)  # type: ignore[attr-defined]
        timeout = timedelta(seconds=max(0.001, deadline.left_s))
        store = dist.PrefixStore(name, client)  # type: ignore[attr-defined]
        self._on_gpu = on_gpu
        if on_gpu:
            options = c10d.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group: Any = c10d.ProcessGroupNCCL(store, place, size, options)
        else:
            options = c10d.ProcessGroupGloo._Options()
            options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
            options._timeout, options._threads = timeout, 1
            self._group = c10d.ProcessGroupGloo(store, place, size, options)

    def broadcast(self, values: np.ndarray, *, timeout_s: float) -> None:
        """Bytes from place 0 into `values` ([N] uint8) of everybody else; at place 0 they are only read.

        Raises:
            RuntimeError: a member is gone, or did not take part in time; the group is of no more use.
        """
        import torch

        c10d: Any = import_module("torch._C._distributed_c10d")
        options = c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=timeout_s)
        if not self._on_gpu:
            self._group.broadcast([torch.from_numpy(values)], options).wait(options.timeout)
            return
        buffer = torch.from_numpy(values).cuda()
        self._group.broadcast([buffer], options).wait(options.timeout)
        torch.cuda.synchronize()
        if self._group.rank() > 0:
            torch.from_numpy(values).copy_(buffer)

    def leave(self) -> None:
        """Let go of the group, in the background: gloo waits for what is under way before it does."""
        # Whoever drops the last reference waits. A thread may be through before its starter goes on, so the starter,
        # which may be an actor's event loop, must hold none: it passes the list that holds the only one.
        held, self._group = [self._group], None
        if held[0] is not None:
            threading.Thread(target=_end, args=(held,), name="rlaudio-leave", daemon=True).start()


def _end(held: list[Any]) -> None:
    # NCCL ends what is under way; gloo 2.13 only marks the group, and its destructor waits for the calls' time-outs.
    held[0].abort()
    held.clear()


def open_store(host: str) -> tuple[Any, Address]:
    """A meeting place on a port the system picks, for as long as the first value is kept."""
    import torch.distributed as dist

    store = dist.TCPStore(host, 0, None, True, timedelta(seconds=60), False)  # type: ignore[attr-defined]
    return store, (host, store.port)


async def in_daemon(function: Callable[[], T]) -> T:
    """Await `function` in a thread of its own. Whoever stops waiting leaves the thread behind; it holds nothing up."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[], None]) -> None:
        if not future.done():
            set_it()

    def run() -> None:
        try:
            result = function()
        except Exception as error:
            failure = error
            tell(lambda: future.set_exception(failure))
        else:
            tell(lambda: future.set_result(result))

    def tell(set_it: Callable[[], None]) -> None:
        if not loop.is_closed():  # nobody is left who waits
            loop.call_soon_threadsafe(settle, set_it)

    threading.Thread(target=run, name="rlaudio-weights", daemon=True).start()
    return await future
