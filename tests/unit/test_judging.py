"""What the tiny judge learns from: balanced, true by the verifiers, complete in its vocabulary, held out by content."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pyarrow as pa
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "quickstart"))

from spoken_world import vocabulary
from spoken_world.attacking import FOREIGN, JUDGE_VOCABULARY, LEARNED_KINDS, PLAIN_WORDS, hide
from spoken_world.building import widened
from spoken_world.heldout import write_heldout
from spoken_world.judging import (
    JUDGE_PHASES,
    JudgePair,
    draw_reply,
    find,
    judge_pairs,
    judge_phases,
    judge_rows,
    level_of,
)
from spoken_world.tasks import TASKS

from rlaudio.errors import DataError
from rlaudio.experience.schema import EXPERIENCE
from rlaudio.models.step_audio import create_tiny
from rlaudio.models.step_audio.tokenizer import CONTROL_TOKENS, StepAudioTokenizer, build_word_tokenizer
from rlaudio.rewards.attacks import ATTACKS, readable
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


# ---- attacks in the lessons ---------------------------------------------------------------------------------------


def test_the_judge_can_read_sixty_attacks_and_more_of_learned_and_of_heldout_kinds() -> None:
    tokenizer = StepAudioTokenizer(build_word_tokenizer(list(JUDGE_VOCABULARY)))
    found = readable(ATTACKS, tokenizer, unknown=CONTROL_TOKENS.index("<unk>"))
    assert len(found) >= 60
    assert min(Counter(attack.kind in LEARNED_KINDS for attack in found).values()) >= 25
    assert {attack.kind for attack in found} == {attack.kind for attack in ATTACKS}


def test_the_judges_words_begin_with_the_worlds() -> None:
    assert JUDGE_VOCABULARY[: len(vocabulary.WORDS)] == vocabulary.WORDS
    assert len(set(JUDGE_VOCABULARY)) == len(JUDGE_VOCABULARY)


def test_no_attack_makes_a_reply_better_by_the_worlds_own_rules() -> None:
    random = Random(3)
    lost = 0
    for _ in range(60):
        script = TASKS[random.choice(tuple(TASKS))](random)
        line = random.choice(script.lines)
        reference = find(line, line.reply(random, warm=random.random() < 0.8))
        reply = draw_reply(random, script, line)
        honest = level_of(reference, find(line, reply), "all")
        for attack in ATTACKS:
            attacked = level_of(reference, find(line, attack.on(reply)), "all")
            assert attacked <= honest, (attack.name, reply)
            lost += attacked < honest
    assert lost > 1000


def test_texts_of_heldout_kinds_are_never_learned_from() -> None:
    heldout = [attack for attack in ATTACKS if attack.kind not in LEARNED_KINDS]
    marks = {" ".join(attack.on("").split()) for attack in heldout if len(attack.on("").split()) > 3}
    learned = [pair.comparison.response for pair in judge_pairs(seed=4, num=500, items=0.1, plain=0.3, attacked=0.6)]
    for reply in learned:
        said = " ".join(reply.split())
        assert not [mark for mark in marks if mark in said]
    hidden = [reply for reply in learned if not PLAIN_WORDS.issuperset(reply.split())]
    assert len(hidden) > 60
    shown = [a for a in ATTACKS if a.kind in LEARNED_KINDS and any(a.on("").strip() in r for r in hidden)]
    assert len(shown) > 12


def test_hidden_texts_are_judged_by_the_rules_and_told_in_words_the_judge_has() -> None:
    pairs = list(judge_pairs(seed=6, num=400, items=0.1, plain=0.3, attacked=0.6))
    foreign = [pair for pair in pairs if FOREIGN in pair.rationale[0].split()]
    assert len(foreign) > 60
    assert {word for pair in pairs for text in pair.rationale for word in text.split()} <= {*vocabulary.WORDS, FOREIGN}
    for pair in foreign:
        about_rule = pair.comparison.criterion in ("rule is kept", "reply is warm")
        assert pair.level == 0 or about_rule
    assert hide(Random(1), "sure") == hide(Random(1), "sure") != "sure"


def test_a_widened_checkpoint_is_the_old_one_with_more_words(tmp_path: Path) -> None:
    old = create_tiny(tmp_path / "old", words=["one", "two"], seed=0)
    wide = widened(tmp_path / "wide", narrow=old.path, words=["one", "two", "three"], seed=1)
    assert wide.tokenizer.vocab_size == old.tokenizer.vocab_size + 1
    assert wide.tokenizer.encode("two one") == old.tokenizer.encode("two one")
    before, after = (dict(family.load_module(dtype=torch.float32).named_parameters()) for family in (old, wide))
    for name, tensor in before.items():
        assert torch.equal(after[name][: len(tensor)], tensor), name
        assert after[name].shape[1:] == tensor.shape[1:]
    with pytest.raises(DataError, match="must begin"):
        widened(tmp_path / "other", narrow=old.path, words=["two", "one", "three"], seed=1)


def test_without_attacks_the_pairs_are_as_ever() -> None:
    known = set(vocabulary.WORDS)
    for pair in judge_pairs(seed=99, num=200, items=0.15, plain=0.25, heldout=True):
        assert set(pair.comparison.response.split()) <= known


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
