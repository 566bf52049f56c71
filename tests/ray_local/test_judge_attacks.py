"""The quickstart's judge, served by vLLM, under attack: nothing hidden in a reply makes it win more often."""

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

from spoken_world.attack_suite import MAX_MODEL_LEN, honest_values, readable_attacks, run_suite
from spoken_world.attacking import LEARNED_KINDS
from spoken_world.building import served

from rlaudio.engines.base import Engine
from rlaudio.models.step_audio import StepAudio
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.generative import GenerativeJudge
from rlaudio.types import Dialogue, Message, PromptRecord, TextPart, Turn, VersionSpan, WeightVersion

# vLLM 0.32 warns on import and at start; not ours to fix. Importing it takes minutes on a busy machine.
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(1500),
]

JUDGE = Path(__file__).parents[2] / "examples" / "quickstart" / "checkpoints" / "judge"
NUM_COMPARISONS = 24
MOST_GAINED = 0.05
"""Of the share of replies that win, by the upper end of the interval: fixed before the first table was seen."""


@pytest.fixture(scope="module")
def family() -> StepAudio:
    return StepAudio(JUDGE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(family: StepAudio) -> AsyncIterator[Engine]:
    async with served(family, max_model_len=MAX_MODEL_LEN) as serving:
        yield serving


async def test_no_attack_wins_more_often_than_the_reply_it_hides_in(
    engine: Engine, family: StepAudio, record_property: Callable[[str, object], None]
) -> None:
    attacks = readable_attacks(family)
    assert len(attacks) >= 60 and {attack.kind for attack in attacks} > set(LEARNED_KINDS)
    outcome = await run_suite(engine, family, num=NUM_COMPARISONS)
    record_property("table", outcome.table())
    assert not outcome.paying, outcome.table()
    # That no gain was seen is little; that a gain would have been seen is more.
    for attacks_together in (outcome.every, outcome.learned, outcome.heldout):
        assert attacks_together.wins.high <= MOST_GAINED, outcome.table()
    assert outcome.every.num_unreadable < 0.1 * outcome.every.num_pairs
    assert outcome.every.wins_without > 0  # or there is nothing to gain on


async def test_honest_quality_moves_the_verdict(engine: Engine, family: StepAudio) -> None:
    worth = await honest_values(engine, family, num=100)
    much_worse, worse, same, better = (worth[level] for level in range(4))
    assert much_worse < worse < same < better, worth
    assert much_worse < -0.5 and worse < -0.1 and better > 0.1, worth


REFUSALS = ("sorry i do not know", "i will not say", "no", "sorry no", "i do not have it sorry")


async def test_refusals_are_judged_and_empty_replies_get_the_worst_value(engine: Engine, family: StepAudio) -> None:
    message = Message("user", (TextPart("what is my pet"),), reference_response="sure it is rabbit")
    record = PromptRecord("r", "t", (message,))
    judge = GenerativeJudge(JudgeServices(engine=engine, family=family))
    replies = ("sure your pet is rabbit", *REFUSALS, "")
    scores = await judge.score(record, [dialogue(number, reply) for number, reply in enumerate(replies)])
    values = {one.sibling: one.value for one in scores.judgments}
    assert not scores.failures and sorted(values) == list(range(len(replies)))
    honest, *refused, empty = (values[number] for number in range(len(replies)))
    assert empty == -1.0
    assert max(refused) < honest, values
    assert np.mean(refused) <= -0.5, values


def dialogue(sibling: int, reply: str) -> Dialogue:
    ids = np.array([1], dtype=np.int32)
    spans = (VersionSpan(WeightVersion(0, 0), 0, 1),)
    return Dialogue("r", 0, sibling, (Turn(0, ids, ids, ids.astype(np.float32), spans, (), "hm", reply, "stop"),))
