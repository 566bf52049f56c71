"""Dialogues into Arrow rows and back. Columns are written directly; nothing is rounded on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rlaudio.errors import DataError
from rlaudio.experience.schema import EXPERIENCE, SCHEMA_VERSION
from rlaudio.types import ClipSpan, Dialogue, PromptRecord, RewardShare, Spoken, Turn, VersionSpan, WeightVersion


def played_batch(record: PromptRecord, dialogues: Sequence[Dialogue]) -> pa.RecordBatch:
    """One row per played turn, rewards still empty."""
    rows = [(dialogue, turn) for dialogue in dialogues for turn in dialogue.turns]
    return make_batch(
        prompt_id=[d.prompt_id for d, _ in rows],
        task=[record.task] * len(rows),
        group=[d.group for d, _ in rows],
        sibling=[d.sibling for d, _ in rows],
        turn=[t.index for _, t in rows],
        prompt_ids=[t.prompt_ids for _, t in rows],
        response_ids=[t.response_ids for _, t in rows],
        logprobs=[t.logprobs for _, t in rows],
        version_spans=[[_span_row(s) for s in t.version_spans] for _, t in rows],
        clips=[[_clip_row(c) for c in t.clips] for _, t in rows],
        thinking=[t.thinking for _, t in rows],
        reply=[t.reply for _, t in rows],
        finish_reason=[t.finish_reason for _, t in rows],
        generate_s=[t.generate_s for _, t in rows],
        spoken=[None if t.spoken is None else asdict(t.spoken) for _, t in rows],
    )


def make_batch(
    *,
    prompt_id: Sequence[str],
    task: Sequence[str],
    group: Sequence[int],
    sibling: Sequence[int],
    turn: Sequence[int],
    prompt_ids: Sequence[npt.NDArray[np.int32]],
    response_ids: Sequence[npt.NDArray[np.int32]],
    clips: Sequence[list[dict[str, object]]],
    thinking: Sequence[str | None],
    reply: Sequence[str],
    logprobs: Sequence[npt.NDArray[np.float32]] | None = None,
    version_spans: Sequence[list[dict[str, int]]] | None = None,
    clip_targets: Sequence[Sequence[Sequence[int]]] | None = None,
    finish_reason: Sequence[str] | None = None,
    generate_s: Sequence[float] | None = None,
    spoken: Sequence[dict[str, object] | None] | None = None,
) -> pa.RecordBatch:
    """Columns of an `EXPERIENCE` batch; what is left out is empty (lists), "stop", null or zero."""
    count = len(prompt_id)
    empty: list[list[object]] = [[] for _ in range(count)]
    zeros = [0.0] * count
    columns: Mapping[str, object] = {
        "prompt_id": prompt_id,
        "task": task,
        "group": group,
        "sibling": sibling,
        "turn": turn,
        "prompt_ids": _ragged(prompt_ids, np.int32),
        "response_ids": _ragged(response_ids, np.int32),
        "logprobs": _ragged(logprobs if logprobs is not None else [np.empty(0, np.float32)] * count, np.float32),
        "version_spans": version_spans if version_spans is not None else empty,
        "clips": clips,
        "clip_targets": clip_targets if clip_targets is not None else empty,
        "rewards": empty,
        "reward": zeros,
        "thinking": thinking,
        "reply": reply,
        "finish_reason": finish_reason if finish_reason is not None else ["stop"] * count,
        "generate_s": generate_s if generate_s is not None else zeros,
        "judge_s": zeros,
        "spoken": spoken if spoken is not None else [None] * count,
    }
    arrays = [
        column if isinstance(column := columns[field.name], pa.Array) else pa.array(column, type=field.type)
        for field in EXPERIENCE
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=EXPERIENCE)


def read_dialogues(batch: pa.RecordBatch) -> list[Dialogue]:
    """The dialogues a batch was written from, bit for bit.

    Raises:
        DataError: the batch was written under another schema version.
    """
    check_schema(batch)
    turns: dict[tuple[str, int, int], list[Turn]] = {}
    numeric = {name: _split(batch.column(name)) for name in ("prompt_ids", "response_ids", "logprobs")}
    names = ("prompt_id", "group", "sibling", "turn", "version_spans", "clips", "thinking", "reply", "finish_reason")
    plain = {name: batch.column(name).to_pylist() for name in (*names, "generate_s", "spoken")}
    for row in range(batch.num_rows):
        key = (plain["prompt_id"][row], plain["group"][row], plain["sibling"][row])
        turns.setdefault(key, []).append(
            Turn(
                index=plain["turn"][row],
                prompt_ids=numeric["prompt_ids"][row],
                response_ids=numeric["response_ids"][row],
                logprobs=numeric["logprobs"][row],
                version_spans=tuple(
                    VersionSpan(WeightVersion(s["incarnation"], s["number"]), s["start"], s["end"], s["mixed"])
                    for s in plain["version_spans"][row]
                ),
                clips=tuple(ClipSpan(c["sha256"], c["start"], c["end"]) for c in plain["clips"][row]),
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


def _ragged(rows: Sequence[npt.NDArray[np.generic]], dtype: type[np.generic]) -> pa.LargeListArray:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows).astype(dtype, copy=False) if rows else np.empty(0, dtype)
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))


def _split(column: pa.LargeListArray) -> list[npt.NDArray[Any]]:
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=True)
    return [values[start:end] for start, end in pairwise(offsets)]


def _share_row(share: RewardShare) -> dict[str, object]:
    return {
        "source": share.source,
        "turn": share.turn,
        "value": share.value,
        "share": share.share,
        "detail": list(share.detail.items()),
    }


def _span_row(span: VersionSpan) -> dict[str, int]:
    version = span.version
    return {
        "incarnation": version.incarnation,
        "number": version.number,
        "start": span.start,
        "end": span.end,
        "mixed": span.mixed,
    }


def _clip_row(span: ClipSpan) -> dict[str, object]:
    return {"sha256": span.sha256, "start": span.start, "end": span.end}
