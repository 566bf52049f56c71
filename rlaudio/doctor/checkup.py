"""What the checks of one examination share: the run's settings, its sounds, its two sides, what they have played."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rlaudio.actors.rollout import PlayOrder
from rlaudio.aio import all_or_first_error
from rlaudio.audio.store import ClipStore
from rlaudio.config import RunConfig
from rlaudio.doctor.bounds import Bounds, bounds_for
from rlaudio.doctor.in_trainer import ScoreRows
from rlaudio.doctor.sides import Sides
from rlaudio.errors import DoctorError
from rlaudio.experience.builder import read_dialogues
from rlaudio.models.base import ModelFamily
from rlaudio.models.families import open_family
from rlaudio.types import AudioClip, AudioPart, Dialogue, FloatArray, PromptRecord

if TYPE_CHECKING:
    import pyarrow as pa

NUM_SIBLINGS = 2


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is looked at. Every number is a count.

    Attributes:
        records: dialogues of the run's own data, `NUM_SIBLINGS` times each.
        model_lengths: clip lengths that go through both models.
        multi_clip: prompts of several clips that do.
        deaf: dialogues of the deaf test; deaf_tokens: ids of each answer.
        updates: weight updates at learning rate 0.
    """

    records: int
    model_lengths: int
    multi_clip: int
    deaf: int
    deaf_tokens: int
    updates: int


QUICK = Effort(records=2, model_lengths=12, multi_clip=4, deaf=2, deaf_tokens=8, updates=0)
FULL = Effort(records=6, model_lengths=300, multi_clip=100, deaf=4, deaf_tokens=16, updates=10)


@dataclass(slots=True)
class Checkup:
    """One examination.

    Attributes:
        config: of the run.
        records: training records of the run.
        sides: engine and trainer.
        effort: how much is looked at.
        family: built here from the configuration: the reference that both sides are held to.
        played: dialogues under the checkpoint's weights, once `play` was called.
    """

    config: RunConfig
    records: Sequence[PromptRecord]
    sides: Sides
    effort: Effort
    family: ModelFamily = field(init=False)
    store: ClipStore = field(init=False)
    bounds: Bounds = field(init=False)
    played: list[pa.RecordBatch] = field(default_factory=list)
    nonce: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def __post_init__(self) -> None:
        self.family = open_family(self.config.model)
        self.store = ClipStore(self.config.data.clips)
        self.bounds = bounds_for(self.config.model.dtype, on_gpu=self.config.rollout.num_gpus > 0)

    # ---- the run's own sounds ------------------------------------------------------------------------------------

    def chosen(self) -> list[PromptRecord]:
        """Records spread over the run's data, of as many tasks as there are, those with several turns first."""
        by_task: dict[str, list[PromptRecord]] = {}
        for record in self.records:
            by_task.setdefault(record.task, []).append(record)
        for records in by_task.values():
            records.sort(key=lambda record: -sum(message.role == "user" for message in record.messages))
        rounds = max(len(records) for records in by_task.values())
        ordered = [records[turn] for turn in range(rounds) for records in by_task.values() if turn < len(records)]
        return ordered[: self.effort.records]

    def clips(self, count: int) -> list[AudioClip]:
        """Distinct sounds of the run's data that fit the window, in the order of its records."""
        found: dict[str, AudioClip] = {}
        for record in self.records:
            for message in record.messages:
                for part in message.parts:
                    if isinstance(part, AudioPart) and part.sha256 not in found:
                        clip = self.store.get(part.sha256)
                        if len(self.family.pieces(len(clip.samples))) == 1:
                            found[part.sha256] = clip
            if len(found) >= count:
                break
        return list(found.values())[:count]

    # ---- playing and scoring -------------------------------------------------------------------------------------

    async def play(self, *, purpose: str = "checkpoint") -> list[pa.RecordBatch]:
        """The chosen records, played with the run's sampling under the engine's present weights; one batch each."""
        orders = [
            PlayOrder(
                index,
                NUM_SIBLINGS,
                self.config.sampling.temperature,
                f"doctor/{self.config.run.seed}/{purpose}/{index}",
            )
            for index in range(len(self.chosen()))
        ]
        async with asyncio.timeout(self.config.rollout.group_deadline_s):
            return await all_or_first_error(
                self.sides.play(record, order) for record, order in zip(self.chosen(), orders, strict=True)
            )

    async def score(self, batches: Sequence[pa.RecordBatch]) -> list[FloatArray]:
        """[R] log-probabilities per row under the trainer's present weights."""
        scored: list[FloatArray] = await self.sides.ask_trainer(ScoreRows(), *batches)
        return scored

    def dialogues(self) -> list[tuple[PromptRecord, Dialogue]]:
        """What was played, beside the record it was played from."""
        pairs = zip(self.chosen(), self.played, strict=True)
        return [(record, dialogue) for record, batch in pairs for dialogue in read_dialogues(batch)]


def parity(batches: Sequence[pa.RecordBatch], scored: Sequence[FloatArray]) -> Gap:
    """What the engine recorded against what the trainer says, over the tokens that one version alone has sampled.

    Raises:
        DoctorError: there is none: every token was sampled on a KV cache of earlier weights.
    """
    turns = [turn for batch in batches for one in read_dialogues(batch) for turn in one.turns]
    pure = [np.ones(len(turn.logprobs), bool) for turn in turns]
    for turn, mask in zip(turns, pure, strict=True):
        for span in turn.version_spans:
            mask[span.start : span.end] = not span.mixed
    if not any(mask.any() for mask in pure):
        raise DoctorError("every token was sampled on a KV cache of earlier weights: set sync.keep_kv_cache=false")
    return gap(
        [turn.logprobs[mask] for turn, mask in zip(turns, pure, strict=True)],
        [row[mask] for row, mask in zip(scored, pure, strict=True)],
    )


@dataclass(frozen=True, slots=True)
class Gap:
    """Difference of log-probabilities over sampled tokens, in nats.

    Attributes:
        kl: mean k3 estimate, exp(d) - d - 1 with d = trainer - engine; never negative.
    """

    num_tokens: int
    max: float
    mean: float
    kl: float

    def measured(self) -> dict[str, float | int]:
        return {"tokens": self.num_tokens, "max_nats": self.max, "mean_nats": self.mean, "kl_nats": self.kl}


def gap(engine: Sequence[FloatArray], trainer: Sequence[FloatArray]) -> Gap:
    """Compare rows token by token."""
    first, second = np.concatenate(engine).astype(np.float64), np.concatenate(trainer).astype(np.float64)
    difference = second - first
    size = np.abs(difference)
    if not np.isfinite(size).all():
        return Gap(len(size), float("inf"), float("inf"), float("inf"))
    kl = np.expm1(np.clip(difference, -50, 50)) - np.clip(difference, -50, 50)
    return Gap(len(size), float(size.max()), float(size.mean()), float(kl.mean()))


def over(found: Gap, bounds: Bounds) -> list[str]:
    """Which of the bounds a gap breaks, in words."""
    limits = (
        ("the largest difference", found.max, bounds.max_nats),
        ("the mean difference", found.mean, bounds.mean_nats),
        ("the KL", found.kl, bounds.kl_nats),
    )
    return [
        f"{what} is {value:.2g} nats, at most {limit:g} is rounding" for what, value, limit in limits if value > limit
    ]
