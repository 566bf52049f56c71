"""Encoder states into Arrow and back, bit for bit: the second batch of an experience, one row per clip."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa

from rlaudio.errors import DataError
from rlaudio.experience import wire  # noqa: F401 (how a batch is pickled)
from rlaudio.experience.builder import check_schema
from rlaudio.experience.schema import STATES
from rlaudio.types import EncodedClip

_NUMPY_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class ShippedStates:
    """One states batch where it lies: in Ray's object store.

    Attributes:
        names: sha256 of its clips.
        ref: Ray's reference to the batch. The batch is there as long as somebody holds it.
    """

    names: tuple[str, ...]
    ref: Any


class SharedStates:
    """What is shipped already, by clip: groups that hear the same sound hold the same states.

    It keeps nothing alive: states are there as long as a group needs them.
    """

    def __init__(self) -> None:
        self._shipped: WeakValueDictionary[str, ShippedStates] = WeakValueDictionary()

    def find(self, names: Iterable[str]) -> dict[str, ShippedStates]:
        """Where the states of these clips are, of those that are anywhere. Whoever holds the answer keeps them."""
        found = {name: self._shipped.get(name) for name in dict.fromkeys(names)}
        return {name: shipped for name, shipped in found.items() if shipped is not None}

    def add(self, names: Collection[str], ref: Any, *, known: Iterable[ShippedStates]) -> tuple[ShippedStates, ...]:
        """All that a group needs, each once: a new batch, and what was there before it.

        Args:
            names: clips of the new batch. Where another group was faster, its batch is taken; a new batch that has
                nothing of its own is let go.
            known: batches with the other clips of the group.
        """
        before = self.find(names)
        new = ShippedStates(tuple(names), ref)
        for name in names:
            self._shipped.setdefault(name, new)
        own = (new,) if len(before) < len(names) else ()
        return tuple(dict.fromkeys([*known, *before.values(), *own]))


def states_batch(clips: Iterable[EncodedClip]) -> pa.RecordBatch:
    """One row per distinct clip. The batch owns its bytes and nothing else, so it ships no stranger's states.

    Raises:
        DataError: states are not [S, width] of the dtype they claim, or one clip comes with two encoders' states.
    """
    distinct: dict[str, EncodedClip] = {}
    for clip in clips:
        _check(clip)
        known = distinct.setdefault(clip.sha256, clip)
        if known.encoder != clip.encoder:
            raise DataError(f"clip {clip.sha256} comes with states of encoders {known.encoder} and {clip.encoder}")
    rows = list(distinct.values())
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([clip.states.nbytes for clip in rows], out=offsets[1:])
    data = np.empty(int(offsets[-1]), dtype=np.uint8)
    for clip, (start, end) in zip(rows, pairwise(offsets), strict=True):
        data[start:end] = np.ascontiguousarray(clip.states).reshape(-1).view(np.uint8)
    column = pa.Array.from_buffers(
        pa.large_binary(), len(rows), [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(data)]
    )
    arrays = [
        pa.array([clip.sha256 for clip in rows], pa.string()),
        pa.array([clip.encoder for clip in rows], pa.string()),
        pa.array([clip.dtype for clip in rows], pa.string()),
        pa.array([list(clip.states.shape) for clip in rows], STATES.field("shape").type),
        column,
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=STATES)


def read_states(batch: pa.RecordBatch) -> list[EncodedClip]:
    """The clips of a batch, their states as read-only views of its memory.

    Raises:
        DataError: another schema version, an unknown dtype, or bytes that are not shape times dtype.
    """
    check_schema(batch)
    names, encoders, dtypes, shapes = (
        batch.column(name).to_pylist() for name in ("sha256", "encoder", "dtype", "shape")
    )
    column = batch.column("data")
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[column.offset : column.offset + len(column) + 1]
    clips = []
    for row, (start, end) in enumerate(pairwise(offsets.tolist())):
        dtype = _numpy_dtype(names[row], dtypes[row])
        if end - start != int(np.prod(shapes[row])) * dtype.itemsize:
            raise DataError(
                f"clip {names[row]}: {end - start} bytes are not {shapes[row]} states of {dtypes[row]}; the batch was "
                "damaged or written by something else"
            )
        values = np.frombuffer(data, dtype=dtype, count=(end - start) // dtype.itemsize, offset=start)
        clips.append(EncodedClip(names[row], values.reshape(shapes[row]), dtypes[row], encoders[row]))
    return clips


def _check(clip: EncodedClip) -> None:
    dtype = _numpy_dtype(clip.sha256, clip.dtype)
    if clip.states.ndim != 2 or clip.states.dtype != dtype:
        raise DataError(
            f"clip {clip.sha256}: states are {clip.states.dtype} {clip.states.shape}, expected [S, width] "
            f"{clip.dtype} (as {dtype})"
        )


def _numpy_dtype(sha256: str, dtype: str) -> np.dtype:
    if dtype not in _NUMPY_DTYPES:
        raise DataError(f"clip {sha256}: states of dtype {dtype!r}; known are {', '.join(_NUMPY_DTYPES)}")
    return _NUMPY_DTYPES[dtype]
