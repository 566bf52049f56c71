"""The reward actor: every configured source, and the judge model they share. Dialogues in, learnable experience out."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from rlaudio.actors.group_stats import correct_turns, group_stats
from rlaudio.actors.judge_services import start_services
from rlaudio.actors.rollout import PlayedHeader
from rlaudio.actors.serving import ping_engine
from rlaudio.actors.spooling import counts_of, header_from_json, header_to_json
from rlaudio.aio import all_or_first_error
from rlaudio.audio.store import ClipStore
from rlaudio.config import RunConfig, SourceSettings
from rlaudio.data.augmentation import Augmenter
from rlaudio.dialogue.users import as_said, played_turns, user_message
from rlaudio.errors import ConfigError, JudgeError, SpoolError, VerdictTimeoutError
from rlaudio.evals.summary import DialogueResult, RewardPart, TurnResult
from rlaudio.experience.builder import read_dialogues, with_rewards
from rlaudio.experience.spool import Spool, Spooled
from rlaudio.observe.metrics import GroupStats
from rlaudio.registry import load_object
from rlaudio.rewards.base import Failure, Judge, JudgeServices, Scores
from rlaudio.rewards.generative import GenerativeJudge
from rlaudio.rewards.mix import SourceWeight, mix_rewards
from rlaudio.rewards.schedule import step_of, weight_at
from rlaudio.rewards.scope import judged_turns
from rlaudio.rewards.serving import JudgeHealth
from rlaudio.types import AudioPart, Dialogue, Judgment, PromptRecord, Turn, WeightVersion


@dataclass(frozen=True, slots=True)
class ScoredHeader:
    """What the driver learns of a judged group; the experience itself stays where it is.

    Attributes:
        has_signal: some sibling did better than another, so there is something to learn.
        versions: oldest and newest weights that sampled a token of the group.
        late: of a source that is only measured: it gave nothing in time, in words; the group is whole without it.
        spooled: the group's file, where the run has a spool and the group can be trained on.
    """

    has_signal: bool
    versions: tuple[WeightVersion, WeightVersion]
    stats: GroupStats
    late: str = ""
    spooled: Spooled | None = None


class _Source(NamedTuple):
    judge: Judge
    settings: SourceSettings


class _Found(NamedTuple):
    """`late`: a source that gave nothing in time and was excused, in words."""

    judgments: list[Judgment]
    failures: list[Failure]
    late: str


class RewardWorker:
    """Plain class; `actors.pool` makes it a Ray actor. `start` first, then any number of calls at once."""

    def __init__(self, config: RunConfig, *, on_gpu: bool) -> None:
        self._config = config
        self._on_gpu = on_gpu
        self._sources: list[_Source] = []
        self._counts: dict[str, float] = {}
        self._services: JudgeServices | None = None
        self._augmenter = Augmenter(config.data.augment, ClipStore(config.data.clips), seed=config.run.seed)
        self._spool = Spool(config.run.spool) if config.run.spool else None

    async def start(self) -> None:
        services = self._services = self._services or await start_services(self._config, on_gpu=self._on_gpu)
        self._counts = {}
        self._sources = []
        for source in self._config.rewards.sources:
            judge: Judge = load_object(source.judge)(services, name=source.name, **source.options)
            self._sources.append(_Source(judge, source))

    async def start_over(self, config: RunConfig) -> None:
        """Begin another run, which may have other sources, around the models that the one before served here."""
        self._config = config
        self._spool = Spool(config.run.spool) if config.run.spool else None
        await self.start()

    async def ping(self) -> None:
        """As `RolloutWorker.ping`, for every model that is served here."""
        served = [self._services, self._services.policy] if self._services else []
        engines = [one.engine for one in served if one is not None and one.engine is not None]
        await all_or_first_error(ping_engine(engine) for engine in engines)

    async def health(self) -> dict[str, JudgeHealth]:
        """How each generative judge keeps up, by source; answered at once, whatever the judges do."""
        judges = [source.judge for source in self._sources]
        return {judge.name: judge.health for judge in judges if isinstance(judge, GenerativeJudge)}

    async def judge(self, record: PromptRecord, batch: pa.RecordBatch) -> tuple[ScoredHeader, pa.RecordBatch]:
        """Score a group with every source and attach the mixed rewards. Two return values, as `RolloutWorker.play`.

        A source that is only measured costs nobody anything, whatever it fails at.

        Raises:
            JudgeError: fewer siblings survived bad judgments than `rewards.min_siblings` asks.
            VerdictTimeoutError: the same, because a source gave nothing in time.
        """
        started = time.monotonic()
        if self._augmenter.active:  # a judge that hears must hear what the policy heard
            record = await asyncio.to_thread(self._augmenter.apply, record)
        dialogues = read_dialogues(batch)
        measured = {judge.name for judge, settings in self._sources if settings.is_measured}
        judgments, failures, late = await self._score(record, dialogues, excused=measured)
        costly = [failure for failure in failures if failure.source not in measured]
        bad = {failure.sibling for failure in costly}
        kept = [dialogue for dialogue in dialogues if dialogue.sibling not in bad]
        compared = self._config.algorithm.compares_siblings
        needed = max(2 if compared else 1, math.ceil(self._config.rewards.min_siblings * len(dialogues)))
        if len(kept) < needed:
            reasons = Counter(failure.reason for failure in costly).most_common(3)
            kind = VerdictTimeoutError if _some_source_was_late(costly) else JudgeError
            raise kind(
                f"record {record.id!r}: {len(kept)} of {len(dialogues)} siblings could be judged, "
                f"{needed} are needed: {reasons}"
            )
        survivors = {dialogue.sibling for dialogue in kept}
        judgments = [judgment for judgment in judgments if judgment.sibling in survivors]
        versions = sorted(span.version for d in kept for turn in d.turns for span in turn.version_spans)
        weights = self._weights(record, oldest=versions[0])
        mixed = mix_rewards(
            dialogues=kept,
            turns=played_turns(record),
            judgments=judgments,
            sources=weights,
            dealt=_dealt(kept) if self._config.rewards.shuffle else None,
        )
        judge_s = time.monotonic() - started
        experience = with_rewards(batch, mixed=mixed.rewards, shares=mixed.shares, judge_s=judge_s)
        header = ScoredHeader(
            has_signal=mixed.has_signal,
            versions=(versions[0], versions[-1]),
            stats=replace(
                group_stats(kept, judgments, shares=mixed.shares.values(), judge_s=judge_s),
                weights={one.name: one.weight for one in weights if self._is_scheduled(one.name)},
                failures=dict(Counter(failure.source for failure in failures)),
                failure=_in_words(failures),
                judge_counts=self._counted(),
            ),
            late=late,
        )
        if self._spool is not None and (header.has_signal or not self._config.algorithm.drops_groups_without_signal):
            write = partial(self._spool.write, group=dialogues[0].group, header=header_to_json(header))
            header = replace(header, spooled=await asyncio.to_thread(write, experience))
        return header, experience

    async def recall(self, spooled: Spooled) -> tuple[tuple[ScoredHeader, PlayedHeader], pa.RecordBatch]:
        """A group that was judged in an earlier life of the run. Two return values, as `judge`.

        Raises:
            SpoolError: its file is gone or damaged.
        """
        if self._spool is None:
            raise SpoolError(f"{spooled.name} is asked for and run.spool is not set")
        written, batch = await asyncio.to_thread(self._spool.read, spooled)
        return (ScoredHeader(**header_from_json(written), spooled=spooled), counts_of(batch)), batch

    def _weights(self, record: PromptRecord, *, oldest: WeightVersion) -> list[SourceWeight]:
        """How the sources that judge a record enter the mix of a group whose oldest token `oldest` sampled."""
        algorithm = self._config.algorithm
        step = step_of(oldest, algorithm)
        default = "centre" if algorithm.compares_siblings else "none"
        return [
            SourceWeight(
                judge.name,
                weight_at(settings, step),
                judge.unplayed,
                normalise=settings.normalise or default,
                turns=turns,
            )
            for judge, settings in self._sources
            if (turns := judged_turns(settings, judge, record))
        ]

    def _is_scheduled(self, name: str) -> bool:
        return any(judge.name == name and one.schedule.kind != "constant" for judge, one in self._sources)

    async def evaluate(self, record: PromptRecord, batch: pa.RecordBatch) -> DialogueResult:
        """Judge one held-out dialogue for the report, by the sources' final weights: no schedule, so that two compare.

        A source's failure leaves its part of the reward out and is told.

        Raises:
            VerdictTimeoutError: a source gave nothing in time; `partial` is the result without it.
            EngineDeadError: the judge model will answer nothing more.
        """
        (result,), late = await self._results(record, read_dialogues(batch))
        if late:
            raise VerdictTimeoutError(late, partial=result)
        return result

    async def grade(self, record: PromptRecord, batch: pa.RecordBatch) -> list[DialogueResult]:
        """Judge every sibling of a group by itself, as `evaluate` does: who is right, whatever the others are.

        Raises:
            As `evaluate`; `partial` is the results without the late source.
        """
        if self._augmenter.active:
            record = await asyncio.to_thread(self._augmenter.apply, record)
        results, late = await self._results(record, read_dialogues(batch))
        if late:
            raise VerdictTimeoutError(late, partial=results)
        return results

    async def _results(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> tuple[list[DialogueResult], str]:
        """One result per dialogue, and what was late, in words."""
        everyone = {judge.name for judge, _ in self._sources}
        judgments, failures, late = await self._score(record, dialogues, excused=everyone)
        self._counted()  # the next header tells of training alone
        weights = {judge.name: settings.weight for judge, settings in self._sources}
        parts: dict[tuple[int, int], list[RewardPart]] = {}
        for one in judgments:
            part = RewardPart(one.source, float(one.value), weights[one.source], dict(one.detail))
            parts.setdefault((one.sibling, one.turn), []).append(part)
        correct = correct_turns(judgments)

        def of_turn(sibling: int, turn: Turn) -> TurnResult:
            message, place = user_message(as_said(record, (turn,)), turn.index), (sibling, turn.index)
            return TurnResult(
                turn=turn.index,
                correct=correct.get(place, False),
                parsable=turn.parsable,
                reward=sum(part.weight * part.value for part in parts.get(place, ())),
                breakdown=tuple(parts.get(place, ())),
                thinking=turn.thinking,
                reply=turn.reply,
                num_tokens=len(turn.response_ids),
                transcript=message.text,
                clips=tuple(part.sha256 for part in message.parts if isinstance(part, AudioPart)),
                answer=message.answer,
                reference=message.reference_response,
            )

        results = []
        for dialogue in dialogues:
            turns = tuple(of_turn(dialogue.sibling, turn) for turn in dialogue.turns)
            failed = _in_words([failure for failure in failures if failure.sibling == dialogue.sibling])
            results.append(DialogueResult(record.id, record.task, len(played_turns(record)), turns, problem=failed))
        return results, late

    async def _score(self, record: PromptRecord, dialogues: Sequence[Dialogue], *, excused: Collection[str]) -> _Found:
        """What all sources say. One that can judge nothing at all is an error, unless it is one of the `excused`."""
        late: list[str] = []

        async def one(judge: Judge) -> Scores:
            try:
                return await judge.score(record, dialogues)
            except JudgeError as error:
                if judge.name not in excused:
                    raise
                if timed_out := isinstance(error, VerdictTimeoutError):
                    late.append(str(error))
                turns = ((dialogue.sibling, turn.index) for dialogue in dialogues for turn in dialogue.turns)
                return Scores((), tuple(Failure(judge.name, *turn, str(error), timed_out) for turn in turns))

        asked = [(judge, judged_turns(settings, judge, record)) for judge, settings in self._sources]
        all_scores = await all_or_first_error(one(judge) for judge, turns in asked if turns)
        found = [judgment for scores in all_scores for judgment in scores.judgments]
        _require_known_names(found, known={judge.name for judge, _ in asked})
        # What a source says of turns that it was not configured for is not asked of it, good or bad.
        places = {(judge.name, turn) for judge, turns in asked for turn in turns}
        judgments = [judgment for judgment in found if (judgment.source, judgment.turn) in places]
        failures = [
            failure for scores in all_scores for failure in scores.failures if (failure.source, failure.turn) in places
        ]
        finite = [one for one in judgments if math.isfinite(one.value)]
        return _Found(finite, [*failures, *_not_finite(judgments)], "; ".join(late))

    def _counted(self) -> dict[str, float]:
        """What the generative judges did since this was asked last."""
        now: dict[str, float] = {}
        for judge, _ in self._sources:
            if isinstance(judge, GenerativeJudge):
                for name, count in asdict(judge.counters).items():
                    now[name] = now.get(name, 0) + count
        since = {name: count - self._counts.get(name, 0) for name, count in now.items()}
        self._counts = now
        return since


def _some_source_was_late(failures: Sequence[Failure]) -> bool:
    """Whether all that some source failed at is for lack of an answer in time: then it hangs, for all that is known."""
    late: dict[str, bool] = {}
    for failure in failures:
        late[failure.source] = late.get(failure.source, True) and failure.late
    return any(late.values())


def _in_words(failures: Sequence[Failure]) -> str:
    if not failures:
        return ""
    more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return f"{failures[0].source}: {failures[0].reason}{more}"


def _dealt(dialogues: Sequence[Dialogue]) -> list[int]:
    """Control: whose rewards each sibling gets; the same for the same group."""
    dealt: list[int] = np.random.default_rng(dialogues[0].group).permutation(len(dialogues)).tolist()
    return dealt


def _require_known_names(judgments: Sequence[Judgment], *, known: set[str]) -> None:
    for one in judgments:
        if one.source not in known:
            raise ConfigError(
                f"a reward source gave a judgment in the name of {one.source!r}, the configured ones are "
                f"{', '.join(sorted(known))}: a source must pass on the `name` it was built with"
            )


def _not_finite(judgments: Sequence[Judgment]) -> list[Failure]:
    """A value that is no number says nothing of the turn, and one of them would spoil its whole group."""
    return [
        Failure(one.source, one.sibling, one.turn, f"source {one.source!r} gave {one.value}, which is not finite")
        for one in judgments
        if not math.isfinite(one.value)
    ]
