"""From Arrow rows to padded tensors, and from hidden states to the log-probabilities of exactly the sampled tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch.utils.checkpoint import checkpoint

from rlaudio.errors import DataError
from rlaudio.experience.columns import read_clip_spans, split
from rlaudio.types import ClipSpan, FloatArray, IntArray

LOGIT_CHUNK = 4096
"""Tokens projected at once: at a vocabulary of 158720 in float32 that is 2.6 GB, where [B, T, V] would be far more."""

BANNED_LOGIT = -1e30
"""Finite, so that 0 * log(0) stays 0 in the entropy; exp() of it is 0."""


@dataclass(frozen=True, slots=True)
class Row:
    """One assistant turn to train on, out of Arrow.

    Attributes:
        dialogue: a number per (group, sibling), equal where turns belong together; from 0.
        group: number of the row's group.
        sibling, turn: place within the group.
        prompt_ids: [P]; response_ids: [R].
        logprobs: [R] recorded when sampled; empty for supervised rows.
        clips: placeholder spans of `prompt_ids`.
        clip_targets: spoken word ids per clip; empty for experience.
        reward: mixed reward of the turn.
    """

    dialogue: int
    group: int
    sibling: int
    turn: int
    prompt_ids: IntArray
    response_ids: IntArray
    logprobs: FloatArray
    clips: tuple[ClipSpan, ...]
    clip_targets: tuple[IntArray, ...]
    reward: float

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True, slots=True)
class RowTerms:
    """What the learner adds to a row before stepping.

    Attributes:
        weight: of each response token in the global mean.
        advantage: of each response token; unused in supervised steps, and 0 where it takes what the model says of the
            row's tokens (a critic, a KL in the reward).
    """

    weight: float
    advantage: float = 0.0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Right-padded rows and, for their N response tokens in row order, everything the loss needs.

    Attributes:
        input_ids: [B, T] int64.
        spans: (row, start, end) per clip occurrence.
        clips: sha256 per entry of `spans`.
        positions: [N] int64 into the flattened [B * T]: where the hidden state that predicts the token lies.
        targets: [N] int64: the sampled (or wanted) ids.
        behaviour: [N] float32 recorded log-probabilities; zeros for supervised rows.
        advantages, weights: [N] float32.
        sequences: [N] int64 which row each token belongs to.
        reference: [N] float32 or None.
        proximal: [N] float32 log-probabilities by the trainer before the first step on the batch, or None.
        values, returns: [N] float32 what the critic said before that step, and what it should have said; or None.
    """

    input_ids: torch.Tensor
    spans: tuple[tuple[int, int, int], ...]
    clips: tuple[str, ...]
    positions: torch.Tensor
    targets: torch.Tensor
    behaviour: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    sequences: torch.Tensor
    reference: torch.Tensor | None = None
    proximal: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None


class Projection(Protocol):
    """The part of `AudioPolicy` that turns hidden states into logits."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def read_rows(batches: Sequence[pa.RecordBatch], *, repeats: bool = False) -> list[Row]:
    """Decode experience or supervised batches, in the order given.

    Args:
        batches: with the columns of `EXPERIENCE`.
        repeats: allow a turn to come twice (supervised data seen for several epochs).

    Raises:
        DataError: no rows, a row without prompt or response, log-probabilities that do not align, a clip span outside
            the prompt, or a (group, sibling, turn) that occurs twice.
    """
    rows: list[Row] = []
    dialogues: dict[tuple[int, int], int] = {}
    seen: set[tuple[int, int, int]] = set()
    for batch in batches:
        for prompt_id, group, sibling, turn, *contents in zip(*_columns(batch), strict=True):
            if not repeats and (group, sibling, turn) in seen:
                raise DataError(
                    f"prompt {prompt_id!r}: group {group}, sibling {sibling}, turn {turn} arrived twice: every turn is "
                    "trained once, look at the window"
                )
            seen.add((group, sibling, turn))
            row = Row(dialogues.setdefault((group, sibling), len(dialogues)), group, sibling, turn, *contents)
            if problem := _problem(row):
                raise DataError(f"prompt {prompt_id!r}, group {group}, sibling {sibling}, turn {turn}: {problem}")
            rows.append(row)
    if not rows:
        raise DataError(f"{len(batches)} batches hold no rows: do not step on an empty batch")
    return rows


def _columns(batch: pa.RecordBatch) -> list[Sequence[Any]]:
    """Per row: prompt id, group, sibling, turn; then what a `Row` holds after these. Arrays are views of the batch."""
    small = [batch.column(name).to_pylist() for name in ("prompt_id", "group", "sibling", "turn")]
    tokens = [split(batch.column(name)) for name in ("prompt_ids", "response_ids", "logprobs")]
    rewards = [reward or 0.0 for reward in batch.column("reward").to_pylist()]
    return [*small, *tokens, read_clip_spans(batch.column("clips")), _targets(batch.column("clip_targets")), rewards]


def _targets(column: pa.ListArray) -> list[tuple[IntArray, ...]]:
    if not len(column.values):
        return [()] * len(column)
    targets = split(column.values)
    return [tuple(targets[start:end]) for start, end in pairwise(column.offsets.to_pylist())]


def _problem(row: Row) -> str:
    """Why a row cannot be trained on; empty when it can."""
    num_prompt, num_response = len(row.prompt_ids), len(row.response_ids)
    if num_prompt < 1 or num_response < 1:
        return f"{num_prompt} prompt and {num_response} response ids; both are needed to train on it"
    if len(row.logprobs) not in (0, num_response):
        return f"{len(row.logprobs)} logprobs for {num_response} sampled ids: they must align"
    for clip in row.clips:
        if not 0 <= clip.start < clip.end <= num_prompt:
            return f"clip {clip.sha256} spans [{clip.start}, {clip.end}) of {num_prompt} prompt ids"
    if row.clip_targets and len(row.clip_targets) != len(row.clips):
        return f"{len(row.clip_targets)} clip targets for {len(row.clips)} clips: one each, or none"
    return ""


def collate(rows: Sequence[Row], terms: Sequence[RowTerms], *, pad: int, device: torch.device) -> MicroBatch:
    """Pad rows on the right and lay out the loss positions.

    A response token at place `P + k` of its row is predicted by the hidden state at `P + k - 1`: the loss covers
    positions P-1 to P+R-2 and nothing else.

    Args:
        rows: at least one.
        terms: one per row.
        pad: id that fills rows.
        device: of the tensors.
    """
    width = max(row.num_tokens for row in rows)
    input_ids = np.full((len(rows), width), pad, dtype=np.int64)
    positions: list[np.ndarray] = []
    for line, row in enumerate(rows):
        num_prompt = len(row.prompt_ids)
        input_ids[line, :num_prompt] = row.prompt_ids
        input_ids[line, num_prompt : row.num_tokens] = row.response_ids
        positions.append(line * width + np.arange(num_prompt - 1, row.num_tokens - 1))
    counts = [len(row.response_ids) for row in rows]

    def per_token(values: Sequence[float]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.asarray(values, dtype=np.float32), counts)).to(device)

    def joined(values: Sequence[np.ndarray], dtype: type[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(values).astype(dtype)).to(device)

    return MicroBatch(
        input_ids=torch.from_numpy(input_ids).to(device),
        spans=tuple((line, clip.start, clip.end) for line, row in enumerate(rows) for clip in row.clips),
        clips=tuple(clip.sha256 for row in rows for clip in row.clips),
        positions=joined(positions, np.int64),
        targets=joined([row.response_ids for row in rows], np.int64),
        behaviour=joined([_or_zeros(row) for row in rows], np.float32),
        advantages=per_token([term.advantage for term in terms]),
        weights=per_token([term.weight for term in terms]),
        sequences=joined([np.full(count, line) for line, count in enumerate(counts)], np.int64),
    )


def _or_zeros(row: Row) -> FloatArray:
    return row.logprobs if len(row.logprobs) else np.zeros(len(row.response_ids), dtype=np.float32)


def response_logprobs(
    policy: Projection,
    hidden: torch.Tensor,
    *,
    positions: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
    chunk: int = LOGIT_CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the sampling distribution, at the loss positions only.

    Hidden states are gathered first and projected in chunks, and a chunk's logits are recomputed in the backward pass:
    the largest tensor is [chunk, vocabulary].

    Args:
        policy: whose `logits` projects.
        hidden: [B, T, hidden].
        positions, targets: [N] as in `MicroBatch`.
        temperature: logits are divided by it, as the engine does before it records log-probabilities.
        banned: [K] ids the engine masks out of sampling, or None. A banned target gets about -1e30.
        chunk: tokens projected at once.

    Returns:
        ([N] log-probabilities in nats, float32, with gradient; [N] entropies in nats, detached).
    """
    gathered = hidden.reshape(-1, hidden.shape[-1])[positions]

    def project(part: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = policy.logits(part).float()
        if temperature != 1.0:
            logits = logits / temperature
        if banned is not None and len(banned):
            logits = logits.index_fill(-1, banned, BANNED_LOGIT)
        normalised = logits.log_softmax(dim=-1)
        with torch.no_grad():
            entropy = -(normalised.exp() * normalised).sum(dim=-1)
        return normalised.gather(-1, wanted[:, None])[:, 0], entropy

    logprobs, entropies = [], []
    for start in range(0, len(targets), chunk):
        part, wanted = gathered[start : start + chunk], targets[start : start + chunk]
        recompute = torch.is_grad_enabled() and len(targets) > chunk
        result = checkpoint(project, part, wanted, use_reentrant=False) if recompute else project(part, wanted)
        logprobs.append(result[0])
        entropies.append(result[1])
    return torch.cat(logprobs), torch.cat(entropies)
