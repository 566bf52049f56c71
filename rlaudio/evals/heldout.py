"""Plays held-out dialogues greedily on the run's own actors and has them judged: the same decoding before and after."""

import asyncio
from collections.abc import Callable, Mapping, Sequence

from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.aio import all_or_first_error
from rlaudio.config import EvaluationSettings
from rlaudio.dialogue.users import played_turns
from rlaudio.errors import JudgeError, RolloutError
from rlaudio.evals.summary import DialogueResult, EvaluationResult, Phase
from rlaudio.types import PromptRecord

MAX_IN_FLIGHT = 64
"""Dialogues played at once per rollout actor; more would only wait inside the engine."""


async def evaluate(
    sets: Mapping[str, Sequence[PromptRecord]],
    *,
    phase: Phase,
    rollouts: RolloutPool,
    rewards: RewardPool,
    settings: EvaluationSettings,
    progressed: Callable[[int, int], None],
    told: Callable[[str], None],
) -> list[EvaluationResult]:
    """Evaluate every set with the weights the engines hold now.

    Args:
        progressed: called with (done, total) dialogues.
        told: hears of dialogues with a problem. One that could not be played or judged is recorded without turns, so
            it counts as wrong.

    Raises:
        RolloutError, JudgeError: of a set nothing could be played or judged; that says nothing of the weights.
        EngineError: no actor of a kind is alive.
    """
    chosen = {name: records[: settings.max_dialogues or None] for name, records in sets.items()}
    total = sum(len(records) for records in chosen.values())
    slots = asyncio.Semaphore(MAX_IN_FLIGHT * max(1, len(rollouts.pool.handles)))
    done = 0

    errors: list[RolloutError | JudgeError] = []

    async def one(record: PromptRecord, index: int) -> DialogueResult:
        nonlocal done
        async with slots:
            try:
                played = await rollouts.play_greedy(
                    record, index=index, purpose=f"heldout-{phase}", silence=settings.silence
                )
                result = await rewards.evaluate(played)
            except (RolloutError, JudgeError) as error:
                errors.append(error)
                result = DialogueResult(record.id, record.task, len(played_turns(record)), (), problem=str(error))
        done += 1
        progressed(done, total)
        return result

    results: list[EvaluationResult] = []
    index = 0
    for name, records in chosen.items():
        numbered = list(enumerate(records, start=index))
        index += len(records)
        dialogues = await all_or_first_error(one(record, number) for number, record in numbered)
        if errors and len(errors) == len(records):
            raise errors[0]
        errors.clear()
        if problems := [(dialogue.prompt_id, dialogue.problem) for dialogue in dialogues if dialogue.problem]:
            told(f"{name}: {len(problems)} of {len(records)} dialogues had a problem, such as {': '.join(problems[0])}")
        results.append(EvaluationResult(name, phase, tuple(dialogues)))
    return results


async def evaluate_siblings(
    sets: Mapping[str, Sequence[PromptRecord]],
    *,
    num_siblings: int,
    num_records: int,
    rollouts: RolloutPool,
    rewards: RewardPool,
    progressed: Callable[[int, int], None],
    told: Callable[[str], None],
) -> list[EvaluationResult]:
    """Sample so many dialogues of each of the first `num_records` records (0: all) of every set, as training would.

    Args:
        progressed, told: as of `evaluate`.

    Returns:
        One result per set, in which a record has several dialogues, one after another. One that could not be played or
        judged is left out.

    Raises:
        RolloutError, JudgeError: of a set nothing could be played or judged.
    """
    chosen = {name: records[: num_records or None] for name, records in sets.items()}
    total = sum(len(records) for records in chosen.values())
    slots = asyncio.Semaphore(max(1, MAX_IN_FLIGHT // num_siblings) * max(1, len(rollouts.pool.handles)))
    done = 0
    errors: list[RolloutError | JudgeError] = []

    async def one(record: PromptRecord, index: int) -> list[DialogueResult]:
        nonlocal done
        found: list[DialogueResult] = []
        async with slots:
            try:
                played = await rollouts.sample(record, index=index, num_siblings=num_siblings, purpose="siblings")
                found = await rewards.grade(played)
            except (RolloutError, JudgeError) as error:
                errors.append(error)
        done += 1
        progressed(done, total)
        return found

    results: list[EvaluationResult] = []
    index = 0
    for name, records in chosen.items():
        numbered = list(enumerate(records, start=index))
        index += len(records)
        groups = await all_or_first_error(one(record, number) for number, record in numbered)
        if errors and len(errors) == len(records):
            raise errors[0]
        if errors:
            told(f"{name}: {len(errors)} of {len(records)} records had no siblings, such as: {errors[0]}")
            errors.clear()
        results.append(EvaluationResult(name, "after", tuple(one for group in groups for one in group)))
    return results
