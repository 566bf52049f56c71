"""The prompt source: fair, seeded, and resumable at exactly the same prompt."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaudio.data.source import PromptSource
from rlaudio.errors import DataError
from rlaudio.types import Message, PromptRecord, TextPart


def records(num: int) -> list[PromptRecord]:
    return [PromptRecord(f"r{i}", "x", (Message("user", (TextPart("hello"),)),)) for i in range(num)]


def ids(source: PromptSource, num: int) -> list[str]:
    return [source.next().id for _ in range(num)]


def test_every_epoch_deals_every_record_once_in_a_new_order() -> None:
    source = PromptSource(records(20), seed=1)
    first, second = ids(source, 20), ids(source, 20)
    everything = {f"r{i}" for i in range(20)}
    assert set(first) == set(second) == everything
    assert first != second
    assert first != sorted(first, key=lambda name: int(name[1:]))


def test_order_depends_on_the_seed_alone() -> None:
    assert ids(PromptSource(records(20), seed=1), 50) == ids(PromptSource(records(20), seed=1), 50)
    assert ids(PromptSource(records(20), seed=1), 20) != ids(PromptSource(records(20), seed=2), 20)


@given(st.integers(1, 7), st.integers(0, 40))
def test_resumes_exactly_anywhere(num: int, taken: int) -> None:
    source = PromptSource(records(num), seed=3)
    ids(source, taken)
    state = json.loads(json.dumps(source.state()))
    resumed = PromptSource(records(num), seed=99)
    resumed.restore(state)
    assert ids(resumed, 3 * num) == ids(source, 3 * num)


def test_state_of_other_data_is_refused_and_changes_nothing() -> None:
    source = PromptSource(records(5), seed=1)
    expected = ids(PromptSource(records(5), seed=1), 5)
    with pytest.raises(DataError, match="records changed"):
        source.restore(PromptSource(records(6), seed=1).state())
    with pytest.raises(DataError, match="records changed"):
        source.restore(PromptSource(records(5)[::-1], seed=1).state())
    with pytest.raises(DataError, match="lacks epoch"):
        source.restore({k: v for k, v in source.state().items() if k != "epoch"})
    with pytest.raises(DataError, match="position 9"):
        source.restore(source.state() | {"position": 9})
    assert ids(source, 5) == expected


def test_no_records() -> None:
    with pytest.raises(DataError, match="no records"):
        PromptSource([], seed=0)


def test_records_are_found_by_their_id() -> None:
    source = PromptSource(records(5), seed=3)
    assert source.find("r2").id == "r2"
    with pytest.raises(DataError, match="no record is called 'r7' any more"):
        source.find("r7")
