"""SIGTERM ends a run as Ctrl-C does: what is under way is ended and saved, once, and not for ever."""

import asyncio
import os
import signal
import threading

import pytest

from rlaudio.aio import StopsOnSigterm, Terminated, undisturbed


def never() -> None:
    raise AssertionError("it was in time")


async def raise_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.sleep(30)


def test_what_runs_may_save_and_a_second_signal_does_not_stop_that() -> None:
    did: list[str] = []

    async def run() -> None:
        try:
            await raise_sigterm()
        except asyncio.CancelledError:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.05)
            did.append("saved")
            raise

    before = signal.getsignal(signal.SIGTERM)
    with StopsOnSigterm(deadline_s=60, late=never) as stopping, pytest.raises(Terminated):
        stopping.run(run())
    assert did == ["saved"] and signal.getsignal(signal.SIGTERM) == before
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer) and thread.is_alive()]


def test_the_step_under_way_is_ended_first() -> None:
    did: list[str] = []

    async def step() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        did.append("stepped")

    async def run() -> None:
        await undisturbed(step())
        await asyncio.sleep(30)
        did.append("too far")

    with StopsOnSigterm(deadline_s=60, late=never) as stopping, pytest.raises(Terminated):
        stopping.run(run())
    assert did == ["stepped"]


def test_saving_that_hangs_is_not_waited_for() -> None:
    """`late` ends the process; here it lets the hanging save go, so that the test sees it was called."""
    given_up = threading.Event()

    async def run() -> None:
        try:
            await raise_sigterm()
        finally:
            await asyncio.to_thread(given_up.wait, 30)
            assert given_up.is_set()

    with StopsOnSigterm(deadline_s=0.1, late=given_up.set) as stopping, pytest.raises(Terminated):
        stopping.run(run())


def test_without_a_signal_it_is_asyncio_run() -> None:
    async def answer() -> int:
        return 7

    with StopsOnSigterm(deadline_s=0.01, late=never) as stopping:
        assert stopping.run(answer()) == 7


def test_ctrl_c_is_told_apart() -> None:
    """Ctrl-C stays what it was."""

    async def run() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(30)

    with StopsOnSigterm(deadline_s=60, late=never) as stopping, pytest.raises(KeyboardInterrupt) as caught:
        stopping.run(run())
    assert not isinstance(caught.value, Terminated)
