"""Full collections of the cyclic collector: rare where much lives, not abolished, and as before afterwards."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from rlaudio.collecting import rare_full_collections

YEARS = 1e-15
"""A share of the time that puts the next full collection off for years, however short the last one was."""


class Knot:
    """Only a collection frees it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Every generation is collected as soon as may be; what lives before the test is left out of it."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.collect()  # counts what lives: a full collection waits until a quarter of that has come to it
    gc.set_threshold(10, 1, 1)
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def full_collections(num_objects: int) -> int:
    """How many of them happen while so many objects come to live."""
    before = gc.get_stats()[2]["collections"]
    kept = [[number] for number in range(num_objects)]
    del kept
    return gc.get_stats()[2]["collections"] - before


def test_after_one_the_next_waits_until_it_is_paid_for() -> None:
    usual = full_collections(20_000)
    with rare_full_collections(YEARS):
        assert full_collections(20_000) == 1
        assert full_collections(20_000) == 0
    assert usual > 2
    assert full_collections(20_000) > 2


def test_they_go_on_and_free_what_only_they_can() -> None:
    knot = Knot()
    gone = weakref.ref(knot)
    gc.collect()  # among the oldest now
    del knot
    with rare_full_collections(1.0):
        kept = []
        for number in range(2_000_000):
            kept.append([number])
            if gone() is None:
                break
    assert gone() is None


def test_thresholds_and_callbacks_are_left_as_they_were_also_by_an_error() -> None:
    before, callbacks = gc.get_threshold(), list(gc.callbacks)

    def fail() -> None:
        with rare_full_collections(YEARS):
            gc.collect()
            assert gc.get_threshold() != before
            raise RuntimeError("ended")

    with pytest.raises(RuntimeError, match="ended"):
        fail()
    assert gc.get_threshold() == before and gc.callbacks == callbacks
