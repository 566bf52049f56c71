"""A batch of experience comes out of its pickle as it went in, without a stranger's bytes and with nothing twice."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from rlaudio.errors import DataError
from rlaudio.experience.builder import make_batch, played_batch, with_rewards
from rlaudio.experience.schema import EXPERIENCE, STATES
from rlaudio.experience.states import states_batch
from rlaudio.experience.wire import pack, unpack_experience, unpack_states
from rlaudio.types import (
    ClipSpan,
    Dialogue,
    EncodedClip,
    PromptRecord,
    RewardShare,
    Spoken,
    Turn,
    VersionSpan,
    WeightVersion,
)

RECORD = PromptRecord("p", "sums", ())


def some_turn(rng: np.random.Generator, index: int) -> Turn:
    """Every kind of row in few values: siblings share many prompts, columns are silent often."""
    num_prompt, num_response = rng.integers(0, 4, 2).tolist()
    odd = np.array([np.nan, -0.0, np.inf, -1.5], np.float32)
    logprobs = rng.choice(odd, num_response if rng.random() < 0.7 else 0)
    spans = tuple(VersionSpan(WeightVersion(0, 2**40), i, i + 1, bool(i % 2)) for i in range(num_response))
    return Turn(
        index,
        np.arange(num_prompt, dtype=np.int32) + np.int32(rng.integers(0, 2)),
        np.arange(num_response, dtype=np.int32),
        logprobs,
        spans if rng.random() < 0.7 else (),
        tuple(ClipSpan("c" * i, i, i + 1) for i in range(rng.integers(0, 3))),
        None if rng.random() < 0.3 else "so",
        ["", "yes", "\u00e9\U0001f50a"][rng.integers(0, 3)],
        "stop" if rng.random() < 0.7 else "length",
        spoken=Spoken("s", "eh", heard="he") if rng.random() < 0.2 else None,
    )


def some_batch(seed: int) -> pa.RecordBatch:
    """Played or judged, whole or a slice; of no row at all too."""
    rng = np.random.default_rng(seed)
    dialogues = [
        Dialogue("p", 3, sibling, tuple(some_turn(rng, index) for index in range(rng.integers(0, 4))))
        for sibling in range(rng.integers(0, 5))
    ]
    batch = played_batch(RECORD, dialogues)
    if rng.random() < 0.5:
        keys = [(one.sibling, turn.index) for one in dialogues for turn in one.turns]
        kept = {key: -0.0 for key in keys if rng.random() < 0.7}
        shares = {key: [RewardShare("v", key[1], 0.25, 0.5, {"correct": 1.0})] for key in kept}
        batch = with_rewards(batch, mixed=kept, shares=shares, judge_s=0.1)
    return batch if rng.random() < 0.5 else batch.slice(*rng.integers(0, batch.num_rows + 1, 2).tolist())


def sent(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Through a pickle whose buffers travel beside it, as Ray's store has them."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])


def num_bytes(batch: pa.RecordBatch) -> int:
    buffers: list[pickle.PickleBuffer] = []
    return len(pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)) + sum(b.raw().nbytes for b in buffers)


def bits(batch: pa.RecordBatch) -> list[object]:
    """Every value; floats as their bits, for NaN is not equal to itself and -0.0 is to 0.0."""
    logprobs = batch.column("logprobs").flatten().to_numpy(zero_copy_only=False).view(np.int32).tolist()
    return [
        batch.drop_columns(["logprobs"]).to_pylist(),
        batch.column("logprobs").value_lengths().to_pylist(),
        logprobs,
    ]


@pytest.mark.parametrize("seed", range(80))
def test_a_batch_survives_its_pickle_bit_for_bit(seed: int) -> None:
    batch = some_batch(seed)
    for read in (sent(batch), pickle.loads(pickle.dumps(batch))):
        assert read.schema.equals(EXPERIENCE, check_metadata=True)
        read.validate(full=True)
        assert str(bits(read)) == str(bits(batch))  # as text, where NaN is NaN and -0.0 is not 0.0


def turn(index: int, *, prompt: np.ndarray, size: int = 4) -> Turn:
    ids = np.arange(size, dtype=np.int32)
    span = (VersionSpan(WeightVersion(0, 1), 0, size),)
    return Turn(index, prompt, ids, ids.astype(np.float32), span, (), "t", "r", "stop")


def test_siblings_store_their_prompt_once() -> None:
    shared, own = np.arange(10_000, dtype=np.int32), np.arange(1, 10_001, dtype=np.int32)
    dialogues = [Dialogue("p", 0, one, (turn(0, prompt=shared.copy()), turn(1, prompt=own + one))) for one in range(8)]
    batch = played_batch(RECORD, dialogues)
    assert 9 * shared.nbytes < num_bytes(batch) < 9 * shared.nbytes + 4_000
    assert [len(ids) for ids in sent(batch).column("prompt_ids").to_pylist()] == [10_000] * 16


def test_a_slice_takes_nothing_of_its_parent_along() -> None:
    big = np.arange(100_000, dtype=np.int32)
    dialogues = [
        Dialogue("p", 0, 0, (turn(0, prompt=big[:3]),)),
        Dialogue("p", 0, 1, (turn(0, prompt=big, size=9_999),)),
    ]
    batch = played_batch(RECORD, dialogues)
    assert num_bytes(batch.slice(0, 1)) < 3_000
    clips = states_batch(
        EncodedClip(name, np.zeros((rows, 8), np.float32), "float32", "e") for name, rows in [("a", 1), ("b", 9_999)]
    )
    assert num_bytes(clips.slice(0, 1)) < 3_000
    assert sent(clips.slice(1)).equals(clips.slice(1))


def test_what_a_row_costs_beside_its_ids() -> None:
    """A group of 8 short turns: a tenth on top of its tokens at most, for all that is said of them."""
    ids, prompt = np.arange(200, dtype=np.int32), np.arange(300, dtype=np.int32)
    turns = [turn(0, prompt=prompt + one, size=200) for one in range(8)]  # no prompt is shared
    batch = played_batch(RECORD, [Dialogue("p", 0, sibling, (one,)) for sibling, one in enumerate(turns)])
    assert num_bytes(batch) <= 1.1 * 8 * (prompt.nbytes + 2 * ids.nbytes)


def test_nulls_where_our_own_batches_have_none_are_kept() -> None:
    row = {"prompt_id": "p", "group": 0, "sibling": 0, "turn": 0, "response_ids": [1]}
    batch = pa.RecordBatch.from_pylist([row, row | {"prompt_ids": [4, None]}], schema=EXPERIENCE)
    assert sent(batch).to_pylist() == batch.to_pylist()


def test_batches_of_other_schemas_and_no_clips_at_all() -> None:
    other = pa.RecordBatch.from_pydict({"a": [1, 2], "b": ["x", None]})
    assert sent(other).equals(other)
    foreign = make_batch(
        prompt_id=["p"], task=["t"], group=[0], sibling=[0], turn=[0], prompt_ids=[[1]], response_ids=[[2]],
        clips=[()], thinking=[None], reply=["r"],
    ).replace_schema_metadata({"rlaudio.schema": "0"})  # fmt: skip
    assert sent(foreign).schema.metadata == {b"rlaudio.schema": b"0"}
    silent = sent(states_batch(()))
    assert silent.num_rows == 0 and silent.schema.equals(STATES, check_metadata=True)


def test_another_schema_on_another_node_is_refused() -> None:
    batch = played_batch(RECORD, [Dialogue("p", 0, 0, (turn(0, prompt=np.arange(3, dtype=np.int32)),))])
    _, (_, *packed) = pack(batch)
    with pytest.raises(DataError, match="sent under schema 0.*on every node"):
        unpack_experience("0", *packed)
    _, (_, *packed) = pack(states_batch(()))
    with pytest.raises(DataError, match="sent under schema 0.*on every node"):
        unpack_states("0", *packed)
