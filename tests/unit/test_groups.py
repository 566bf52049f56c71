"""Leaving a weight group: nobody waits for it but the thread that is there for it."""

import threading
from typing import Any

import pytest

from rlaudio.weights import groups
from rlaudio.weights.groups import WeightGroup


def test_a_group_dies_in_the_thread_that_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo's destructor waits for calls under way. Also when that thread is through before its starter goes on."""
    told: list[str] = []

    class Group:
        def abort(self) -> None:
            told.append("aborted")

        def __del__(self) -> None:
            told.append(threading.current_thread().name)

    class AtOnce(threading.Thread):
        def start(self) -> None:
            super().start()
            self.join(60.0)

    monkeypatch.setattr(groups.threading, "Thread", AtOnce)
    group: Any = WeightGroup.__new__(WeightGroup)
    group._group = Group()
    group.leave()
    assert told == ["aborted", "rlaudio-leave"]
    group.leave()
    assert len(told) == 2
