"""The quickstart's hearing judge, served by vLLM: the words are the same, so only the sound can tell it which fits."""

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

from spoken_world.building import served
from spoken_world.heard_pairs import HeardPair, heard_pairs
from spoken_world.hearing import HELDOUT_SEED, heard_table, judge_heard, speak_pairs

from rlaudio.audio.store import ClipStore
from rlaudio.engines.base import Engine
from rlaudio.models.step_audio import StepAudio
from rlaudio.types import AudioPart

# vLLM 0.32 warns on import and at start; not ours to fix. Importing it takes minutes on a busy machine.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1500)]

JUDGE = Path(__file__).parents[2] / "examples" / "quickstart" / "checkpoints" / "hearing_judge"


@pytest.fixture(scope="module")
def family() -> StepAudio:
    return StepAudio(JUDGE)


@pytest.fixture(scope="module")
def pairs() -> list[HeardPair]:
    return list(heard_pairs(seed=HELDOUT_SEED, num=200, heldout=True))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    return ClipStore(str(tmp_path_factory.mktemp("clips")))


@pytest.fixture(scope="module")
def sounds(pairs: list[HeardPair], clips: ClipStore) -> list[AudioPart]:
    return speak_pairs(pairs, clips)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(family: StepAudio) -> AsyncIterator[Engine]:
    async with served(family) as serving:
        yield serving


def test_the_words_of_a_pair_are_the_same_and_its_sounds_differ(
    pairs: list[HeardPair], sounds: list[AudioPart]
) -> None:
    for number, pair in enumerate(pairs):
        one, other = sounds[2 * number : 2 * number + 2]
        assert one.transcript == other.transcript == pair.text
        assert one.sha256 != other.sha256
        assert {pair.response_fits(which) for which in (0, 1)} == {False, True}


@pytest.mark.asyncio(loop_scope="module")
async def test_it_hears_and_without_sound_it_guesses(
    engine: Engine,
    family: StepAudio,
    pairs: list[HeardPair],
    sounds: list[AudioPart],
    clips: ClipStore,
    record_property: Callable[[str, object], None],
) -> None:
    figures = [
        await judge_heard(engine, family, pairs, sounds=sounds, clips=clips, condition=condition)
        for condition in ("heard", "silenced", "transcript")
    ]
    record_property("table", heard_table(figures))
    heard, silenced, read = figures
    assert heard.num_pairs >= 200
    assert heard.accuracy.low > 0.5 and all(one.low > 0.5 for one in heard.per_property.values())
    assert 0.5 in silenced.accuracy
    assert 0.5 in read.accuracy  # equal words get one answer, right for one sound and wrong for the other
    assert heard.num_unreadable < 0.1 * 2 * heard.num_pairs
