"""How a batch of experience is pickled, and so lies in Ray's store: one Arrow IPC message, whose schema both ends know.

pyarrow by itself pickles the schema, and every one of 55 buffers with a record of its own: for eight turns of text that
is 40 % on top of their ids and log-probabilities, and most of the time it takes to store and to fetch them. Here
nothing is stored twice, and nothing that can be told without it:

    columns that say nothing of their rows are left out (which ones, a number tells)
    a prompt that several siblings share is stored with the first of them
    a slice, however small, takes its own rows along and not its parent's

Whoever imports `builder` or `states` pickles so; whoever unpickles imports this. Batches of other schemas keep
pyarrow's own way. What is read back is the batch as it was, bit for bit; prompts that were shared are copied apart.
"""

import copyreg
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from rlaudio.errors import DataError
from rlaudio.experience.columns import nothing, ragged, split
from rlaudio.experience.schema import EXPERIENCE, SCHEMA_VERSION, STATES

_MAYBE_SILENT = (
    "logprobs",
    "version_spans",
    "clips",
    "clip_targets",
    "rewards",
    "reward",
    "finish_reason",
    "judge_s",
    "spoken",
)
_PROMPT_IDS = EXPERIENCE.get_field_index("prompt_ids")
_DATA = STATES.get_field_index("data")


def pack(batch: pa.RecordBatch) -> tuple[Any, ...]:
    """As `__reduce__`."""
    if batch.schema.equals(EXPERIENCE, check_metadata=True):
        return unpack_experience, (SCHEMA_VERSION, *_packed_experience(batch))
    if batch.schema.equals(STATES, check_metadata=True) and not batch.column(_DATA).null_count:
        return unpack_states, (SCHEMA_VERSION, *_packed_states(batch))
    reduced: tuple[Any, ...] = batch.__reduce__()
    return reduced


copyreg.pickle(pa.RecordBatch, pack)


def unpack_experience(version: str, silent: int, sources: bytes, message: pa.Buffer) -> pa.RecordBatch:
    """The batch that was packed.

    Args:
        version: of the schema, where it was packed.
        silent: which of `_MAYBE_SILENT` were left out, a bit for each.
        sources: [rows] int32, the row whose prompt each shares; nothing where no two share one.
        message: the rest.

    Raises:
        DataError: it was packed under another version of the schema.
    """
    _check(version)
    batch = pa.ipc.read_record_batch(message, _stored(silent))
    if sources:
        place = batch.schema.get_field_index("prompt_ids")
        prompts = split(batch.column(place))
        shared = ragged([prompts[row] for row in np.frombuffer(sources, np.int32).tolist()], np.int32)
        batch = batch.set_column(place, EXPERIENCE.field(_PROMPT_IDS), shared)
    for name in _left_out(silent):
        place = EXPERIENCE.get_field_index(name)
        batch = batch.add_column(place, EXPERIENCE.field(place), nothing(name, batch.num_rows))
    return batch.replace_schema_metadata(EXPERIENCE.metadata)


def unpack_states(version: str, offsets: bytes, message: pa.Buffer, data: pa.Buffer) -> pa.RecordBatch:
    """The batch of encoder states that was packed; its states are the memory that they arrived in.

    Args:
        version: of the schema, where it was packed.
        offsets: [rows + 1] int64, where the states of each row begin in `data`.
        message: the other columns.

    Raises:
        DataError: it was packed under another version of the schema.
    """
    _check(version)
    others = pa.ipc.read_record_batch(message, STATES.remove(_DATA))
    column = pa.Array.from_buffers(pa.large_binary(), others.num_rows, [None, pa.py_buffer(offsets), data])
    return others.add_column(_DATA, STATES.field(_DATA), column).replace_schema_metadata(STATES.metadata)


def _packed_experience(batch: pa.RecordBatch) -> tuple[int, bytes, pa.Buffer]:
    silent = 0
    for place, name in enumerate(_MAYBE_SILENT):
        if _alike(batch.column(name), nothing(name, batch.num_rows)):
            silent |= 1 << place
    prompts, sources = _shared(batch.column(_PROMPT_IDS))
    if sources:
        batch = batch.set_column(_PROMPT_IDS, EXPERIENCE.field(_PROMPT_IDS), prompts)
    return silent, sources, batch.select(_places(silent)).serialize()


def _alike(left: pa.Array, right: pa.Array) -> bool:
    if left.type == pa.float32():  # -0.0 equals 0.0 and is not the same
        left, right = left.view(pa.int32()), right.view(pa.int32())
    return bool(left.equals(right))


def _packed_states(batch: pa.RecordBatch) -> tuple[bytes, pa.Buffer, pa.Buffer]:
    column = batch.column(_DATA)
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    bytes_of_rows = pa.py_buffer(b"") if data is None else data.slice(first, last - first)
    return (offsets - first).tobytes(), batch.remove_column(_DATA).serialize(), bytes_of_rows


def _shared(column: pa.LargeListArray) -> tuple[pa.LargeListArray, bytes]:
    """The column with every prompt once, and where the others find theirs; as it is where no two are alike."""
    if column.null_count or column.values.null_count:
        return column, b""
    rows = split(column)
    first: dict[bytes, int] = {}
    sources = [first.setdefault(ids.tobytes(), row) for row, ids in enumerate(rows)]
    if len(first) == len(rows):
        return column, b""
    alone = [ids if source == row else ids[:0] for row, (ids, source) in enumerate(zip(rows, sources, strict=True))]
    return ragged(alone, np.int32), np.array(sources, np.int32).tobytes()


@lru_cache(maxsize=1 << len(_MAYBE_SILENT))
def _stored(silent: int) -> pa.Schema:
    """`EXPERIENCE` without the columns that are left out."""
    return pa.schema([field for field in EXPERIENCE if field.name not in _left_out(silent)])


@lru_cache(maxsize=1 << len(_MAYBE_SILENT))
def _places(silent: int) -> list[int]:
    return [EXPERIENCE.get_field_index(name) for name in _stored(silent).names]


def _left_out(silent: int) -> list[str]:
    return [name for place, name in enumerate(_MAYBE_SILENT) if silent >> place & 1]


def _check(version: str) -> None:
    if version != SCHEMA_VERSION:
        raise DataError(
            f"experience was sent under schema {version}, this rlaudio reads {SCHEMA_VERSION}: install the same "
            "rlaudio on every node"
        )
