"""Encoder states survive Arrow bit for bit, once per clip, without a stranger's bytes; damage is refused."""

import pickle
import weakref

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlaudio.errors import DataError
from rlaudio.experience.schema import STATES
from rlaudio.experience.states import SharedStates, ShippedStates, read_states, states_batch
from rlaudio.types import EncodedClip

DTYPES = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}
HELD_AS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@st.composite
def clips(draw: st.DrawFn) -> EncodedClip:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
    # Every bit pattern, NaNs with their payloads and negative zeros included.
    bits = draw(hnp.arrays(DTYPES[dtype], shape, elements=st.integers(0, np.iinfo(DTYPES[dtype]).max)))
    name = draw(st.text("0123456789abcdef", min_size=8, max_size=8))
    return EncodedClip(name, bits.view(HELD_AS[dtype]), dtype, "e1")


def over_the_wire(batch: pa.RecordBatch) -> pa.RecordBatch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


@given(st.lists(clips(), max_size=5, unique_by=lambda clip: clip.sha256))
def test_states_survive_arrow_bit_for_bit(sent: list[EncodedClip]) -> None:
    batch = over_the_wire(states_batch(sent))
    assert batch.schema.equals(STATES, check_metadata=True)
    read = read_states(batch)
    assert [(clip.sha256, clip.dtype, clip.encoder) for clip in read] == [(c.sha256, c.dtype, c.encoder) for c in sent]
    for before, after in zip(sent, read, strict=True):
        assert after.states.dtype == before.states.dtype
        assert after.states.shape == before.states.shape
        assert after.states.tobytes() == before.states.tobytes()


def states(name: str, *, rows: int = 3, encoder: str = "e1") -> EncodedClip:
    return EncodedClip(name, np.full((rows, 2), ord(name), np.float32), "float32", encoder)


def test_siblings_and_turns_share_one_row_and_nothing_else_travels() -> None:
    big = states("z", rows=100_000)
    wide = EncodedClip("v", big.states[10:12], "float32", "e1")  # a view of something big
    batch = states_batch([states("a"), states("b"), states("a"), wide])
    assert batch.column("sha256").to_pylist() == ["a", "b", "v"]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert sink.getvalue().size < 5_000


def test_a_slice_of_a_batch_reads_its_own_rows() -> None:
    batch = states_batch([states("a"), states("b", rows=5), states("c")])
    (found,) = read_states(batch.slice(1, 1))
    assert (found.sha256, found.states.shape, found.states[0, 0]) == ("b", (5, 2), ord("b"))


def test_what_cannot_be_states_is_refused() -> None:
    with pytest.raises(DataError, match="expected \\[S, width\\] bfloat16"):
        states_batch([EncodedClip("a", np.zeros((2, 2), np.float32), "bfloat16", "e1")])
    with pytest.raises(DataError, match="encoders e1 and e2"):
        states_batch([states("a"), states("a", encoder="e2")])
    whole = states_batch([states("a")])
    other_dtype = whole.set_column(2, STATES.field("dtype"), pa.array(["float16"]))
    with pytest.raises(DataError, match="24 bytes are not \\[3, 2\\] states of float16"):
        read_states(other_dtype)
    unknown = whole.set_column(2, STATES.field("dtype"), pa.array(["float8"]))
    with pytest.raises(DataError, match="'float8'"):
        read_states(unknown)
    with pytest.raises(DataError, match="schema none"):
        read_states(whole.replace_schema_metadata({}))


class Ref:
    """What Ray's reference is here: something that is there or gone."""


def test_a_sound_of_two_groups_is_shipped_once() -> None:
    shared = SharedStates()
    first = shared.add(["a", "b"], Ref(), known=())
    known = shared.find(["b", "c"])
    assert known.keys() == {"b"}
    second = shared.add(["c"], Ref(), known=known.values())
    assert {one.names for one in second} == {("a", "b"), ("c",)}
    assert shared.find(["a", "b", "c"]).keys() == {"a", "b", "c"}
    assert first[0] in second, "the second group was given another batch for the shared sound"


def test_the_slower_of_two_groups_takes_what_the_faster_one_shipped() -> None:
    shared = SharedStates()
    faster = shared.add(["a", "b"], Ref(), known=())
    late = Ref()
    gone = weakref.ref(late)
    slower = shared.add(["b", "a"], late, known=())
    del late
    assert slower == faster
    assert gone() is None, "states that nobody needs are kept"
    half = shared.add(["b", "c"], Ref(), known=())
    assert {name for one in half for name in one.names} == {"a", "b", "c"}


def test_states_are_let_go_with_the_last_group_that_needs_them() -> None:
    shared = SharedStates()
    first = shared.add(["a"], Ref(), known=())
    second = shared.add([], Ref(), known=shared.find(["a"]).values())
    del first
    assert shared.find(["a"])["a"] in second
    del second
    assert not shared.find(["a"])


def test_shipped_states_are_pickled_with_their_names() -> None:
    """They go to the ranks inside a list: their reference is not fetched on the way."""
    found = pickle.loads(pickle.dumps(ShippedStates(("a",), "ref")))
    assert (found.names, found.ref) == (("a",), "ref")
