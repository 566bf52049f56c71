"""Columns of an experience from numpy arrays and spans, and back: a few calls per column, whatever the rows.

Converting rows of dictionaries costs more than everything else that an actor does with a played group.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rlaudio.experience.schema import EXPERIENCE
from rlaudio.types import ClipSpan, Spoken, VersionSpan, WeightVersion

_NOTHING = {
    "logprobs": [],
    "version_spans": [],
    "clips": [],
    "clip_targets": [],
    "rewards": [],
    "reward": 0.0,
    "finish_reason": "stop",
    "generate_s": 0.0,
    "judge_s": 0.0,
    "spoken": None,
}
"""What a column holds where nothing is said of its rows."""


@lru_cache(maxsize=4096)
def nothing(name: str, num_rows: int) -> pa.Array:
    """The column of this name that says nothing of its rows. Made once: Arrow's arrays never change."""
    return pa.array([_NOTHING[name]] * num_rows, type=EXPERIENCE.field(name).type)


@lru_cache(maxsize=4096)
def repeated(text: str, num_rows: int) -> pa.StringArray:
    """A column of strings that are all alike. Made once, for names that come with every group."""
    return pa.array([text] * num_rows, type=pa.string())


def ragged(rows: Sequence[npt.ArrayLike], dtype: type[np.generic]) -> pa.LargeListArray:
    """One list per row."""
    values = np.concatenate(rows).astype(dtype, copy=False) if rows else np.empty(0, dtype)
    return pa.LargeListArray.from_arrays(_offsets(rows, np.int64), pa.array(values))


def numbers(values: Sequence[float], dtype: type[np.generic]) -> pa.Array:
    """One number per row. Through numpy: Arrow takes twice as long over a list."""
    return pa.array(np.array(values, dtype))


def split(column: pa.LargeListArray | pa.ListArray) -> list[npt.NDArray[Any]]:
    """The rows of a column of lists, as views of its memory; one that is null is empty."""
    values = column.values.to_numpy(zero_copy_only=True)
    return [values[start:end] for start, end in pairwise(column.offsets.to_pylist())]


def version_spans(rows: Sequence[Sequence[VersionSpan]]) -> pa.ListArray:
    """The column `version_spans`."""
    spans = list(chain.from_iterable(rows))
    children = [
        numbers([span.version.incarnation for span in spans], np.int32),
        numbers([span.version.number for span in spans], np.int64),
        numbers([span.start for span in spans], np.int32),
        numbers([span.end for span in spans], np.int32),
        numbers([span.mixed for span in spans], np.bool_),
    ]
    return _list_of_structs("version_spans", rows, children)


def read_version_spans(column: pa.ListArray) -> list[tuple[VersionSpan, ...]]:
    """What `version_spans` was given."""
    fields = _children(column)
    spans = [
        VersionSpan(WeightVersion(incarnation, number), start, end, mixed)
        for incarnation, number, start, end, mixed in zip(*fields, strict=True)
    ]
    return [tuple(spans[start:end]) for start, end in pairwise(column.offsets.to_pylist())]


def clip_spans(rows: Sequence[Sequence[ClipSpan]]) -> pa.ListArray:
    """The column `clips`."""
    if not any(rows):
        return nothing("clips", len(rows))
    spans = list(chain.from_iterable(rows))
    children = [
        pa.array([span.sha256 for span in spans], pa.string()),
        numbers([span.start for span in spans], np.int32),
        numbers([span.end for span in spans], np.int32),
    ]
    return _list_of_structs("clips", rows, children)


def read_clip_spans(column: pa.ListArray) -> list[tuple[ClipSpan, ...]]:
    """What `clip_spans` was given; rows that are null have none."""
    if not len(column.values):
        return [()] * len(column)
    spans = [ClipSpan(sha256, start, end) for sha256, start, end in zip(*_children(column), strict=True)]
    return [tuple(spans[start:end]) for start, end in pairwise(column.offsets.to_pylist())]


def spoken(rows: Sequence[Spoken | None]) -> pa.StructArray:
    """The column `spoken`."""
    if not any(rows):
        return nothing("spoken", len(rows))
    told = [one and {"sha256": one.sha256, "text": one.text, "voice": one.voice, "heard": one.heard} for one in rows]
    return pa.array(told, type=EXPERIENCE.field("spoken").type)


def _list_of_structs(name: str, rows: Sequence[Sequence[object]], children: Sequence[pa.Array]) -> pa.ListArray:
    structs = pa.StructArray.from_arrays(children, fields=_fields(name))
    return pa.ListArray.from_arrays(_offsets(rows, np.int32), structs)


@lru_cache
def _fields(name: str) -> list[pa.Field]:
    item = EXPERIENCE.field(name).type.value_type
    return [item.field(place) for place in range(item.num_fields)]


def _children(column: pa.ListArray) -> list[list[Any]]:
    """Fields of the structs that its lists hold, over the lists of every row and of those it is a slice of."""
    structs = column.values
    return [structs.field(place).to_pylist() for place in range(structs.type.num_fields)]


def _offsets(rows: Sequence[Any], dtype: type[np.generic]) -> pa.Array:
    return pa.array(np.fromiter(accumulate(map(len, rows), initial=0), dtype, len(rows) + 1))
