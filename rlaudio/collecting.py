"""How often Python's cyclic collector walks a driver that holds thousands of groups.

A full collection walks every object that lives. A group in flight is a task, a dozen coroutines, futures and timers,
and lives through several of them: with 10,000 groups in flight that was more than half of what the driver did for each.
Hardly anything of it is garbage: what a group leaves behind dies with its last reference.
"""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_NEVER = 1 << 30
_OLDEST = 2


class _Pace:
    """A callback of `gc`: puts full collections off until those before have been paid for."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._thresholds = gc.get_threshold()
        self._began_cpu_s = 0.0
        self._due_s = 0.0

    def __call__(self, phase: str, info: Mapping[str, int]) -> None:
        if info["generation"] != _OLDEST:
            if phase == "stop" and time.monotonic() >= self._due_s:
                gc.set_threshold(*self._thresholds)
        elif phase == "start":
            self._began_cpu_s = time.thread_time()
        else:
            took_s = time.thread_time() - self._began_cpu_s
            self._due_s = time.monotonic() + took_s / self._share
            youngest, younger, _ = self._thresholds
            gc.set_threshold(youngest, younger, _NEVER)

    def end(self) -> None:
        gc.set_threshold(*self._thresholds)


@contextmanager
def rare_full_collections(share: float = 0.01) -> Iterator[None]:
    """Full collections take at most this share of the time, however much lives. Younger generations as ever.

    Cycles that outlived the younger generations wait for the next full one: for a hundred times its duration.
    """
    pace = _Pace(share)
    gc.callbacks.append(pace)
    try:
        yield
    finally:
        gc.callbacks.remove(pace)
        pace.end()
