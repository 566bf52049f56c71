"""Dialogues into Arrow rows and back. Columns are written directly; nothing is rounded on the way."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rlaudio.errors import DataError
from rlaudio.experience import columns, wire  # noqa: F401 (how a batch is pickled)
from rlaudio.experience.schema import EXPERIENCE, SCHEMA_VERSION
from rlaudio.types import ClipSpan, Dialogue, PromptRecord, RewardShare, Spoken, Turn, VersionSpan


def played_batch(record: PromptRecord, dialogues: Sequence[Dialogue]) -> pa.RecordBatch:
    """One row per played turn, rewards still empty."""
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    of_turn = [dialogue for dialogue in dialogues for _ in dialogue.turns]
    return make_batch(
        prompt_id=[d.prompt_id for d in of_turn],
        task=columns.repeated(record.task, len(turns)),
        group=[d.group for d in of_turn],
        sibling=[d.sibling for d in of_turn],
        turn=[t.index for t in turns],
        prompt_ids=[t.prompt_ids for t in turns],
        response_ids=[t.response_ids for t in turns],
        logprobs=[t.logprobs for t in turns],
        version_spans=[t.version_spans for t in turns],
        clips=[t.clips for t in turns],
        thinking=[t.thinking for t in turns],
        reply=[t.reply for t in turns],
        finish_reason=[t.finish_reason for t in turns] if any(t.finish_reason != "stop" for t in turns) else None,
        generate_s=[t.generate_s for t in turns],
        spoken=[t.spoken for t in turns],
    )


def make_batch(
    *,
    prompt_id: Sequence[str],
    task: Sequence[str] | pa.StringArray,
    group: Sequence[int],
    sibling: Sequence[int],
    turn: Sequence[int],
    prompt_ids: Sequence[npt.ArrayLike],
    response_ids: Sequence[npt.ArrayLike],
    clips: Sequence[Sequence[ClipSpan]],
    thinking: Sequence[str | None],
    reply: Sequence[str],
    logprobs: Sequence[npt.NDArray[np.float32]] | None = None,
    version_spans: Sequence[Sequence[VersionSpan]] | None = None,
    clip_targets: Sequence[Sequence[Sequence[int]]] | None = None,
    finish_reason: Sequence[str] | None = None,
    generate_s: Sequence[float] | None = None,
    spoken: Sequence[Spoken | None] | None = None,
) -> pa.RecordBatch:
    """Columns of an `EXPERIENCE` batch; what is left out is empty (lists), "stop", null or zero."""
    given: dict[str, object] = {
        "prompt_id": prompt_id,
        "task": task,
        "group": columns.numbers(group, np.int64),
        "sibling": columns.numbers(sibling, np.int32),
        "turn": columns.numbers(turn, np.int32),
        "prompt_ids": columns.ragged(prompt_ids, np.int32),
        "response_ids": columns.ragged(response_ids, np.int32),
        "logprobs": None if logprobs is None else columns.ragged(logprobs, np.float32),
        "version_spans": None if version_spans is None else columns.version_spans(version_spans),
        "clips": columns.clip_spans(clips),
        "clip_targets": clip_targets,
        "thinking": thinking,
        "reply": reply,
        "finish_reason": finish_reason,
        "generate_s": None if generate_s is None else columns.numbers(generate_s, np.float32),
        "spoken": None if spoken is None else columns.spoken(spoken),
    }
    arrays = []
    for name, wanted in _types():
        column = given.get(name)
        if column is None:
            column = columns.nothing(name, len(prompt_id))
        arrays.append(column if isinstance(column, pa.Array) else pa.array(column, type=wanted))
    return pa.RecordBatch.from_arrays(arrays, schema=EXPERIENCE)


@lru_cache(maxsize=1)
def _types() -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in EXPERIENCE]


def read_dialogues(batch: pa.RecordBatch) -> list[Dialogue]:
    """The dialogues a batch was written from, bit for bit.

    Raises:
        DataError: the batch was written under another schema version.
    """
    check_schema(batch)
    turns: dict[tuple[str, int, int], list[Turn]] = {}
    numeric = {name: columns.split(batch.column(name)) for name in ("prompt_ids", "response_ids", "logprobs")}
    version_spans = columns.read_version_spans(batch.column("version_spans"))
    clips = columns.read_clip_spans(batch.column("clips"))
    names = ("prompt_id", "group", "sibling", "turn", "thinking", "reply", "finish_reason")
    plain = {name: batch.column(name).to_pylist() for name in (*names, "generate_s", "spoken")}
    for row in range(batch.num_rows):
        key = (plain["prompt_id"][row], plain["group"][row], plain["sibling"][row])
        turns.setdefault(key, []).append(
            Turn(
                index=plain["turn"][row],
                prompt_ids=numeric["prompt_ids"][row],
                response_ids=numeric["response_ids"][row],
                logprobs=numeric["logprobs"][row],
                version_spans=version_spans[row],
                clips=clips[row],
                thinking=plain["thinking"][row],
                reply=plain["reply"][row],
                finish_reason=plain["finish_reason"][row],
                generate_s=plain["generate_s"][row],
                spoken=None if plain["spoken"][row] is None else Spoken(**plain["spoken"][row]),
            )
        )
    return [Dialogue(prompt_id, group, sibling, tuple(played)) for (prompt_id, group, sibling), played in turns.items()]


def with_rewards(
    batch: pa.RecordBatch,
    *,
    mixed: Mapping[tuple[int, int], float],
    shares: Mapping[tuple[int, int], Sequence[RewardShare]] | None = None,
    judge_s: float,
) -> pa.RecordBatch:
    """Attach mixed rewards and what they are made of, keeping only the siblings that have one.

    Args:
        mixed: (sibling, turn) -> the reward the learner sees. A sibling absent here is left out of the batch.
        shares: (sibling, turn) -> the sources' parts of it; None leaves the breakdown empty.
        judge_s: wall seconds the group's judgment took.
    """
    siblings, turns = batch.column("sibling").to_pylist(), batch.column("turn").to_pylist()
    keep = [row for row in range(batch.num_rows) if (siblings[row], turns[row]) in mixed]
    # take() copies the kept rows, so a dropped sibling's buffers do not travel with the batch.
    kept = batch.take(pa.array(keep, type=pa.int64()))
    keys = [(siblings[row], turns[row]) for row in keep]
    filled: dict[str, pa.Array] = {
        "rewards": pa.array(
            [[_share_row(one) for one in (shares or {}).get(key, ())] for key in keys],
            type=EXPERIENCE.field("rewards").type,
        ),
        "reward": pa.array([mixed[key] for key in keys], type=pa.float32()),
        "judge_s": pa.array([judge_s] * len(keys), type=pa.float32()),
    }
    arrays = [filled.get(field.name, kept.column(field.name)) for field in EXPERIENCE]
    return pa.RecordBatch.from_arrays(arrays, schema=EXPERIENCE)


def check_schema(batch: pa.RecordBatch) -> None:
    """Raise DataError unless the batch carries this version of the schema."""
    found = (batch.schema.metadata or {}).get(b"rlaudio.schema", b"none").decode()
    if found != SCHEMA_VERSION:
        raise DataError(
            f"experience has schema {found}, this rlaudio reads {SCHEMA_VERSION}: use the version that wrote it"
        )


def _share_row(share: RewardShare) -> dict[str, object]:
    return {
        "source": share.source,
        "turn": share.turn,
        "value": share.value,
        "share": share.share,
        "detail": list(share.detail.items()),
    }
