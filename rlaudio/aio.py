"""Small habits of asyncio that the standard library leaves to its users."""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


async def all_or_first_error(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all at once; the first error cancels the rest and is raised bare, not inside an ExceptionGroup."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as group:
        raise first_error(group) from None
    return [task.result() for task in running]


async def undisturbed(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await to the end: a cancellation that comes meanwhile takes effect at the caller's next await.

    For what must not be half done. The coroutine must have its own deadline.
    """
    task, current = asyncio.ensure_future(coroutine), asyncio.current_task()
    assert current is not None, "a coroutine runs in a task"
    num_cancelled = 0
    while not task.done():
        try:
            await asyncio.wait([task])  # does not hand the cancellation on
        except asyncio.CancelledError:
            # Taken back and given again: a TaskGroup counts whether all cancellations were its own.
            current.uncancel()
            num_cancelled += 1
    for _ in range(num_cancelled):
        current.cancel()
    return task.result()


async def started(tasks: asyncio.TaskGroup, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task in the group that the caller's task holds open, or end with the group if that is ending.

    A group that ends cancels its holder and takes no new task. The cancellation takes effect here: Python 3.11 would
    keep one that `create_task`'s error overtook, and deliver it to whoever awaits next, outside of the group.
    """
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        coroutine.close()
        raise
    return tasks.create_task(coroutine)


class Terminated(KeyboardInterrupt):
    """SIGTERM came, and what ran has been stopped as Ctrl-C stops it."""


class StopsOnSigterm:
    """Runs a coroutine that SIGTERM ends as Ctrl-C does: it is cancelled, and may save what it has.

    Use as a context manager around everything that the process still does after that: whoever sent the signal waits.

    Args:
        deadline_s: for all of it, from the signal on.
        late: called in a thread when that is over; ends the process.
    """

    def __init__(self, *, deadline_s: float, late: Callable[[], None]) -> None:
        self._timer = threading.Timer(deadline_s, late)
        self._timer.daemon = True
        self._came = False

    def __enter__(self) -> "StopsOnSigterm":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._timer.is_alive():
            self._timer.join(1.0)

    def run(self, main: Coroutine[Any, Any, T]) -> T:
        """As `asyncio.run`, in the main thread. Raises Terminated when SIGTERM ended it."""
        # Ray has a handler of its own, which leaves no time to save; it is put back afterwards.
        before = signal.getsignal(signal.SIGTERM)
        try:
            return asyncio.run(self._stoppable(main))
        except asyncio.CancelledError:
            if self._came:
                raise Terminated from None
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    async def _stoppable(self, main: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None, "asyncio.run makes a task"

        def stop() -> None:
            if not self._came:  # once: a second one must not cancel the saving
                self._came = True
                self._timer.start()
                task.cancel()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
        return await main


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first leaf of a nested exception group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
