"""What the tiny judge learns from: balanced, true by the verifiers, complete in its vocabulary, held out by content."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

from spoken_world import vocabulary
from spoken_world.heldout import write_heldout
from spoken_world.judging import JUDGE_PHASES, JudgePair, judge_pairs, judge_phases, judge_rows

from rlaudio.experience.schema import EXPERIENCE
from rlaudio.rewards.levels import Verdict
from rlaudio.rewards.preferences import read_preferences
from rlaudio.rewards.prompt import PROMPT_WORDS, JudgePrompt
from tests.fakes import FakeFamily


@pytest.fixture(scope="module")
def pairs() -> list[JudgePair]:
    return list(judge_pairs(seed=5, num=600, items=0.2, plain=0.2))


def texts(pair: JudgePair) -> tuple[str, str, str]:
    return pair.comparison.history[0].text, pair.comparison.reference, pair.comparison.response


def test_the_five_verdicts_are_equally_frequent(pairs: list[JudgePair]) -> None:
    count = Counter(pair.verdict for pair in pairs)
    assert set(count) == set(Verdict)
    assert min(count.values()) > 0.7 * len(pairs) / 5


def test_the_same_reply_is_the_same_and_verdicts_mirror(pairs: list[JudgePair]) -> None:
    for pair in pairs:
        if pair.comparison.reference == pair.comparison.response:
            assert pair.verdict is Verdict.SAME
        mirrored = Verdict(4 - pair.verdict_in(response_first=True))
        assert pair.verdict_in(response_first=False) is mirrored
        assert pair.rationale[0].split()[-1] == pair.rationale[1].split()[-1]


def test_nothing_said_or_written_is_outside_the_vocabulary(pairs: list[JudgePair]) -> None:
    known = {*vocabulary.WORDS, *PROMPT_WORDS}
    assert set(PROMPT_WORDS) <= set(vocabulary.WORDS)
    for pair in pairs:
        said = (*texts(pair), pair.comparison.criterion or "", *pair.rationale)
        assert {word for text in said for word in text.split()} <= known


def test_heldout_comparisons_are_never_learned_from() -> None:
    learned = {texts(pair) for pair in judge_pairs(seed=1, num=600, items=0.2, plain=0.2)}
    heldout = {texts(pair) for pair in judge_pairs(seed=1, num=300, items=0.2, plain=0.2, heldout=True)}
    assert not learned & heldout


def test_equal_seeds_give_equal_pairs() -> None:
    first, again, other = (list(judge_pairs(seed=s, num=20, items=0.2, plain=0.2)) for s in (1, 1, 2))
    assert first == again != other


def test_rows_hold_what_is_asked_and_what_is_to_be_written() -> None:
    family = FakeFamily()
    rows = judge_rows(family, seed=0, num=30)  # type: ignore[arg-type]
    assert rows.schema.equals(EXPERIENCE, check_metadata=True)
    prompt = JudgePrompt(family.tokenizer, style=family.style)
    for ids, word, group in zip(
        rows["response_ids"].to_pylist(), rows["reply"].to_pylist(), rows["group"], strict=True
    ):
        assert Verdict(prompt.parse(ids)).word == word
        assert group.as_py() is not None
    assert len(set(rows["group"].to_pylist())) == 30


def test_phases_lie_as_the_recipe_reads_them(tmp_path: Path) -> None:
    family = FakeFamily()
    small = [replace(phase, steps=2, rows_per_step=8) for phase in JUDGE_PHASES]
    phases = judge_phases(tmp_path, family=family, seed=0, phases=small)  # type: ignore[arg-type]
    assert [phase.name for phase in phases] == [phase.name for phase in JUDGE_PHASES]
    for phase in phases:
        rows = pa.ipc.open_file(phase.data).read_all()
        assert rows.schema.equals(EXPERIENCE, check_metadata=True)
        assert (rows.num_rows, phase.steps, phase.rows_per_step) == (16, 2, 8)


def test_the_heldout_file_says_what_the_pairs_say(tmp_path: Path) -> None:
    write_heldout(tmp_path / "build" / "heldout.jsonl", num=40)
    labelled = read_preferences(tmp_path / "build" / "heldout.jsonl")
    phase = JUDGE_PHASES[-1]
    pairs = list(judge_pairs(seed=99, num=40, items=phase.items, plain=phase.plain, heldout=True))
    assert [(one.level, one.reasoning) for one in labelled] == [(pair.level, pair.rationale) for pair in pairs]
    family = FakeFamily()
    prompt = JudgePrompt(family.tokenizer, style=family.style)
    for one, pair in zip(labelled, pairs, strict=True):
        for order in (False, True):
            asked, wanted = (prompt.ids(c, response_first=order) for c in (one.comparison, pair.comparison))
            assert asked.tolist() == wanted.tolist()
