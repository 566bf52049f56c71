"""Many verdicts of one judge model, for figures about it: what came back, and what was no verdict."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from rlaudio.aio import all_or_first_error
from rlaudio.errors import JudgeError, VerdictError
from rlaudio.rewards.asking import JudgeModel
from rlaudio.rewards.levels import Scale
from rlaudio.rewards.prompt import Comparison


@dataclass(frozen=True, slots=True)
class Ask:
    """One comparison in one order."""

    comparison: Comparison
    response_first: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        level: of the response, 0 much worse than the reference; None: no readable verdict.
        problem: of which kind it was, as in `VerdictError`; empty with a level.
    """

    level: int | None
    problem: str = ""


async def verdicts_of(
    model: JudgeModel, asks: Sequence[Ask], *, scale: Scale, deadline_s: float = 120.0, max_in_flight: int = 256
) -> list[Answer]:
    """Ask each once, as a first attempt: an unreadable answer is a finding here, so nothing is asked again.

    Args:
        deadline_s: of one answer, from the moment it is asked for.
        max_in_flight: questions at the model at once.

    Raises:
        EngineError: the model's engine or endpoint failed.
        AudioError: a sound that it shall hear cannot be read.
        JudgeError: an answer took longer than `deadline_s`.
    """
    places = asyncio.Semaphore(max_in_flight)

    async def one(ask: Ask) -> Answer:
        question = model.question(ask.comparison, response_first=ask.response_first)
        async with places:
            try:
                verdict = await asyncio.wait_for(question.ask(0), deadline_s)
            except VerdictError as error:
                return Answer(None, error.kind)
            except TimeoutError as error:
                raise JudgeError(
                    f"the judge gave no answer within {deadline_s:g} s: look at its engine, or give it longer"
                ) from error
        return Answer(scale.level(verdict, response_first=ask.response_first))

    return await all_or_first_error(one(ask) for ask in asks)
