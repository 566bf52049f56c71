"""Distillation without engines: what fails a filter is never written, each turn counts once, a kill loses nothing."""

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaudio.audio.store import ClipStore
from rlaudio.cli.distil import distil_command, distil_table
from rlaudio.config import (
    AugmentSettings,
    DataSettings,
    EngineConfig,
    ModelSettings,
    RewardSettings,
    RolloutSettings,
    SourceSettings,
)
from rlaudio.config_checks_stages import RESERVED_FATES, distil_problems
from rlaudio.config_stages import DistilConfig, DistilSettings, FilterSettings
from rlaudio.data.curation import Rolled, rolled
from rlaudio.data.distil import require_answers, select, sift, summarise_distil
from rlaudio.data.records import read_records, write_records
from rlaudio.errors import DataError, RolloutError
from rlaudio.evals.summary import DialogueResult, RewardPart
from rlaudio.models.step_audio import StepAudio, create_tiny
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import JsonlTracker, read_curves
from rlaudio.recipes import distil
from rlaudio.recipes.pipeline import read_pipeline
from rlaudio.recipes.sft import require_learnable, supervised_batch
from rlaudio.rewards.acoustic import AcousticGrounding
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.coherence import Coherence
from rlaudio.rewards.verified import VerifiedReward
from rlaudio.runs import RunFolder, create_run
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart, Dialogue, Message, PromptRecord, TextPart, Turn
from tests.unit.evaluations import dialogue, turn

SOURCES = (
    SourceSettings("verified", "rlaudio.rewards.verified:VerifiedReward"),
    SourceSettings("coherence", "rlaudio.rewards.coherence:Coherence", options={"rivals": [["high", "low"]]}),
    SourceSettings("grounding", "rlaudio.rewards.acoustic:AcousticGrounding", options={"only_correct": False}),
)
FILTERS = [
    FilterSettings("right", "verified", "correct"),
    FilterSettings("coherent", "coherence"),
    FilterSettings("grounded", "grounding", "kept"),
]
GOOD = ("the voice sounds high", "sure your voice is high")


def record(name: str = "r", *answers: str, task: str = "pitch") -> PromptRecord:
    users = (Message("user", (TextPart("is my voice high or low"),), answer=one) for one in answers or ("high",))
    return PromptRecord(name, task, tuple(users))


def told(passes: Sequence[bool], *, parsable: bool = True, said: str = "") -> dict[str, Any]:
    """A turn of `rolled.jsonl`, by what the filters make of it."""
    judged = {
        one.source: {"value": float(ok), "detail": {one.detail: float(ok)}}
        for one, ok in zip(FILTERS, passes, strict=True)
    }
    return {"turn": 0, "thinking": said or GOOD[0], "reply": GOOD[1], "parsable": parsable, "judged": judged}


def siblings_of(*siblings: Sequence[dict[str, Any]], name: str = "r") -> Rolled:
    return Rolled(name, "pitch", "", (True,) * len(siblings), tuple({"turns": list(turns)} for turns in siblings))


def chosen(**settings: Any) -> DistilSettings:
    return DistilSettings(**{"filters": FILTERS, "k": 2, **settings})


def always(thinking: str, reply: str) -> bool:
    return True


# ---- what is written ----------------------------------------------------------------------------------------------


TURNS = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from("abc"))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(TURNS, max_size=3), min_size=1, max_size=5), st.integers(0, 3), st.integers(3, 4))
def test_only_what_passes_is_written_and_every_turn_is_counted_once(
    played: list[list[tuple[bool, bool, bool, bool, str]]], most: int, asked: int
) -> None:
    siblings = [[told(one[:3], parsable=one[3], said=one[4]) for one in turns] for turns in played]
    settings, asks = chosen(k=len(played), most=most), record("r", *["high"] * asked)
    found = sift(asks, siblings_of(*siblings), settings, writable=always)
    fine = [[all(one[:4]) for one in turns] for turns in played]
    assert sum(found.turns.values()) == asked * len(played)
    assert set(found.turns) <= {"right", "coherent", "grounded", *RESERVED_FATES}
    written = [[m for m in one.messages if m.role == "assistant"] for one in found.kept]
    assert found.turns.get("kept", 0) == sum(map(len, written))
    assert len(found.kept) <= (most or len(played)) and len({one.id for one in found.kept}) == len(found.kept)
    for one, said in zip(found.kept, written, strict=True):
        assert tuple(m for m in one.messages if m.role == "user") == asks.messages[: len(said)], "the beginning of it"
        assert [m.role for m in one.messages] == ["user", "assistant"] * len(said) and said
        sibling = int(one.id.rsplit("-", 1)[1])
        assert all(fine[sibling][: len(said)]), "nothing that fails, and nothing behind what fails"
        assert [m.thinking for m in said] == [turn["thinking"] for turn in siblings[sibling][: len(said)]]
    texts = [tuple(m.thinking for m in said) for said in written]
    assert not any(a != b and b[: len(a)] == a for a in texts for b in texts) and len(set(texts)) == len(texts)
    passing = sum(turns[0] for turns in fine if turns)
    assert bool(found.kept) == (passing > 0), "what passes is not thrown away"


def test_each_turn_counts_for_the_first_filter_that_it_fails() -> None:
    wrong, hushed = told((False, False, True)), told((True, True, True), parsable=False)
    found = sift(
        record("r", "high", "low", "high"),
        siblings_of([told((True, True, True)), told((True, False, False)), wrong], [wrong], [hushed], []),
        chosen(k=4),
        writable=always,
    )
    assert found.turns == {"kept": 1, "coherent": 1, "behind": 5, "right": 1, "unparsable": 1, "unplayed": 3}
    assert found.passes == {"right": 3, "coherent": 2, "grounded": 4} and found.played == 5
    assert found.examples["coherent"]["thinking"] == GOOD[0]


def test_an_answer_that_reads_back_as_ids_that_are_never_sampled_is_not_learned(tmp_path: Path) -> None:
    """What came of sampling may still be no text: three unknown words before the right one, for example."""
    family = StepAudio(create_tiny(tmp_path / "m", words=[*" ".join(GOOD).split(), "low"], seed=0).path)
    writable = distil.writable_by(family)
    assert writable(*GOOD) and not writable(GOOD[0], "<unk> <unk>\nhigh") and not writable("never heard", GOOD[1])
    odd = {**told((True, True, True)), "reply": "<unk> high"}
    found = sift(record(), siblings_of([odd], [told((True, True, True))]), chosen(), writable=writable)
    assert found.turns == {"unparsable": 1, "kept": 1}
    rows = supervised_batch(list(found.kept), family=family, clips=ClipStore(str(tmp_path)))
    require_learnable(rows, path="kept", banned=family.tokenizer.ids.banned)


def test_a_turn_of_which_a_source_says_nothing_is_not_learned() -> None:
    silent = told((True, True, True))
    del silent["judged"]["grounding"]
    found = sift(record(), siblings_of([silent], [told((True, True, True))]), chosen(), writable=always)
    assert found.turns == {"grounded": 1, "kept": 1}


def test_the_longest_are_kept_and_equal_ones_once() -> None:
    good = told((True, True, True))
    other = told((True, True, True), said="a low voice , no , the voice sounds high")
    found = sift(
        record("r", "high", "high"),
        siblings_of([good], [good, good], [good], [other]),
        chosen(k=4, most=2),
        writable=always,
    )
    assert [one.id for one in found.kept] == ["r-answer-1", "r-answer-3"]
    assert found.turns == {"spare": 2, "unplayed": 3, "kept": 3}


SAID = [
    (*GOOD, True),
    ("the voice sounds high", "it is low", False),  # wrong, and not what the reasoning says
    ("the voice sounds low", "it is high", False),  # right by a reasoning that says the opposite
    ("the voice sounds low", "it is low", False),  # coherent, grounded, wrong
    ("heard is my voice high or low . the answer is high", "it is high", False),  # of the words only
    ("the transcript says that the voice is high", "it is high", False),
    ("", "high", False),
    ("the pitch is not low , the voice is high", "high", True),
]


async def test_what_is_ungrounded_incoherent_or_wrong_never_reaches_the_training_data() -> None:
    """With the verifiers that the example's filters ask."""
    services, asks = JudgeServices(), record()
    judges = [
        VerifiedReward(services),
        Coherence(services, rivals=[["high", "low"]]),
        AcousticGrounding(services, name="grounding", only_correct=False),
    ]
    ids = np.zeros(1, dtype=np.int32)
    dialogues = [
        Dialogue("r", 0, number, (Turn(0, ids, ids, ids.astype(np.float32), (), (), thinking, reply, "stop"),))
        for number, (thinking, reply, _) in enumerate(SAID)
    ]
    parts: dict[int, list[RewardPart]] = {}
    for judge in judges:
        for one in (await judge.score(asks, dialogues)).judgments:
            parts.setdefault(one.sibling, []).append(RewardPart(one.source, one.value, 1.0, dict(one.detail)))
    results = [
        dialogue("r", turn(thinking=thinking, reply=reply, breakdown=tuple(parts[number])))
        for number, (thinking, reply, _) in enumerate(SAID)
    ]
    found = sift(
        asks, rolled(asks, results, verified={0}, pass_share=1.0), chosen(k=len(SAID), most=0), writable=always
    )
    assert [one.id for one in found.kept] == [f"r-answer-{n}" for n, (_, _, good) in enumerate(SAID) if good]
    assert found.turns == {"kept": 2, "right": 2, "coherent": 2, "grounded": 2}


def test_what_is_left_is_told_with_numbers() -> None:
    bad = sift(
        record(), siblings_of([told((False, True, True))], [told((True, True, False))]), chosen(), writable=always
    )
    lost = sift(record("q"), Rolled("q", "pitch", "", problem="the engine died"), chosen(), writable=always)
    report = summarise_distil([bad, lost], chosen())
    assert report["turns"] == {
        "kept": 0, "right": 1, "coherent": 0, "grounded": 1, "unparsable": 0, "behind": 0, "unplayed": 0, "spare": 0,
        "unjudged": 2,
    }  # fmt: skip
    assert report["records"] == {"selected": 2, "answered": 0, "unjudged": 1}
    with pytest.raises(DataError, match=r"nothing of 4 turns \(right 1, grounded 1, unjudged 2\).*coherent 100%"):
        require_answers(report)
    with pytest.raises(DataError, match="none of 1 records could be played and judged: the engine died"):
        require_answers(summarise_distil([lost], chosen()), problems=["the engine died"])
    with pytest.raises(DataError, match="record 'q' cannot be filtered as those to 'r'"):
        sift(record(), Rolled("q", "pitch", ""), chosen(), writable=always)
    assert distil_table(report).row_count == 9


# ---- which records ------------------------------------------------------------------------------------------------


def test_records_are_selected_by_task_and_axis() -> None:
    records = [
        dataclasses.replace(record(f"r{n}", task=task), axis=axis)
        for n, (task, axis) in enumerate([("pitch", None), ("rate", "timing"), ("sums", None), ("rate", None)])
    ]
    assert [one.id for one in select(records, chosen(tasks=["rate", "pitch"]))] == ["r0", "r1", "r3"]
    assert [one.id for one in select(records, chosen(tasks=["rate"], axes=["timing"]))] == ["r1"]
    assert [one.id for one in select(records, chosen(max_records=1))] == ["r0"]
    with pytest.raises(DataError, match=r"distil\.tasks names 'pich'.*did you mean 'pitch'"):
        select(records, chosen(tasks=["pich"]))
    with pytest.raises(DataError, match=r"distil\.axes names 'rhythm'.*\['timing'\]"):
        select(records, chosen(axes=["rhythm"]))
    with pytest.raises(DataError, match=r"no record .*distil\.tasks \['sums'\] and of distil\.axes \['timing'\]"):
        select(records, chosen(tasks=["sums"], axes=["timing"]))


def test_records_whose_replies_nobody_filters_are_refused() -> None:
    user = record().messages[0]
    given = PromptRecord("given", "pitch", (user, Message("assistant", (TextPart("low"),)), user))
    with pytest.raises(DataError, match="record 'given' has a given reply"):
        select([record(), given], chosen())
    with pytest.raises(DataError, match="record 'open' is to be improvised"):
        select([PromptRecord("open", "pitch", (dataclasses.replace(user, improvise=True),))], chosen())


# ---- the run ------------------------------------------------------------------------------------------------------


def config(tmp_path: Path, **settings: Any) -> DistilConfig:
    (tmp_path / "policy").mkdir(exist_ok=True)
    (tmp_path / "policy" / "weights").write_text("v1")
    made = DistilConfig(
        model=ModelSettings(path=str(tmp_path / "policy")),
        data=DataSettings(train="train.jsonl", clips=str(tmp_path)),
        rollout=RolloutSettings(engine=EngineConfig(max_num_seqs=8)),
        rewards=RewardSettings(sources=list(SOURCES)),
        distil=chosen(**settings),
    )
    made.run.name = "distil"
    return made


@dataclasses.dataclass
class FakeActors:
    """Answers by record id: whether each filter passes, or an error; the same whenever it is asked."""

    dies_after: int = 10**6
    fails: str = ""

    def __post_init__(self) -> None:
        self.played: list[str] = []

    async def sample(self, record: PromptRecord, *, index: int, num_siblings: int, purpose: str) -> Any:
        assert purpose == "distil"
        if record.id == self.fails:
            raise RolloutError("it does not fit")
        if len(self.played) >= self.dies_after:
            raise KeyError("the process is killed here")
        self.played.append(record.id)
        await asyncio.sleep(0)
        return SimpleNamespace(record=record, num_siblings=num_siblings)

    async def grade(self, played: Any) -> list[DialogueResult]:
        number = int(played.record.id[1:])
        results = []
        for sibling in range(played.num_siblings):
            passes = [(number >> bit) % 2 == sibling % 2 for bit in range(3)]
            parts = tuple(
                RewardPart(one.source, float(ok), 1.0, {one.detail: float(ok)} if one.detail else {})
                for one, ok in zip(FILTERS, passes, strict=True)
            )
            results.append(dialogue(played.record.id, turn(reply=f"answer {sibling}", breakdown=parts), asked=1))
        return results


async def run(
    config: DistilConfig, records: Sequence[PromptRecord], actors: FakeActors, folder: RunFolder
) -> dict[str, Any]:
    held = SimpleNamespace(rollouts=actors, rewards=actors)

    class Held:
        async def __aenter__(self) -> Any:
            return held

        async def __aexit__(self, *_: object) -> None: ...

    with pytest.MonkeyPatch.context() as patch, Progress() as progress:
        patch.setattr(distil, "playing_actors", lambda config, told: Held())
        return await distil.run_distil(
            distil.filtering(config),
            records=records,
            writable=always,
            folder=folder,
            tracker=JsonlTracker(folder.metrics / "metrics.jsonl"),
            progress=progress,
        )


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with create_run(tmp_path / "runs", name="distil", seed=0) as made:
        yield made


RECORDS = [record(f"r{number}") for number in range(8)]


async def test_killed_anywhere_and_resumed_it_writes_the_same_records(tmp_path: Path, folder: RunFolder) -> None:
    with create_run(tmp_path / "whole", name="distil", seed=0) as whole:
        wanted = await run(config(tmp_path), RECORDS, FakeActors(), whole)
        written = (whole.path / "records.jsonl").read_bytes()
    assert [one.id for one in read_records(whole.path / "records.jsonl", complete=True)] == [
        "r0-answer-0",
        "r7-answer-1",
    ]
    for done in (0, 3, 2):
        with pytest.raises(KeyError, match="killed"):
            await run(config(tmp_path), RECORDS, FakeActors(dies_after=done), folder)
        assert not (folder.path / "records.jsonl").exists()
    rolled = folder.path / "rolled.jsonl"
    known = [json.loads(line)["id"] for line in rolled.read_text().splitlines()]
    assert known, "what was done is on the disk"
    rolled.write_bytes(rolled.read_bytes()[:-30])  # the kill cut the last line
    last = FakeActors()
    report = await run(config(tmp_path), RECORDS, last, folder)
    assert sorted(last.played) == sorted({one.id for one in RECORDS} - set(known[:-1]))
    assert (folder.path / "records.jsonl").read_bytes() == written
    assert {k: v for k, v in report.items() if k != "timings_s"} == {
        k: v for k, v in wanted.items() if k != "timings_s"
    }
    assert sum(report["turns"].values()) == 16 and report["turns"]["kept"] == 2
    curves = read_curves(folder.metrics / "metrics.jsonl")
    assert curves["distil/turns_kept"] == [(0, 2 / 16)] and curves["distil/passes_right"] == [(0, 0.5)]


async def test_filters_may_change_without_playing_again_and_a_policy_may_not(tmp_path: Path, folder: RunFolder) -> None:
    await run(config(tmp_path), RECORDS, FakeActors(), folder)
    again = FakeActors()
    every = [*FILTERS[:2], dataclasses.replace(FILTERS[2], least=-1.0)]
    report = await run(config(tmp_path, filters=every), RECORDS, again, folder)
    assert not again.played and report["turns"]["kept"] == 4 and report["turns"]["grounded"] == 0
    changed = config(tmp_path)
    (tmp_path / "policy" / "weights").write_text("v2")
    with pytest.raises(DataError, match="under another model"):
        await run(changed, RECORDS, FakeActors(), folder)


async def test_nothing_kept_leaves_a_report_and_no_records(tmp_path: Path, folder: RunFolder) -> None:
    with pytest.raises(DataError, match="the filters keep nothing of 2 turns"):
        await run(config(tmp_path), RECORDS[1:2], FakeActors(), folder)
    assert json.loads(folder.report_json.read_text())["answers"] == 0
    assert not (folder.path / "records.jsonl").exists()


async def test_a_record_in_trouble_is_counted_and_tried_again(tmp_path: Path, folder: RunFolder) -> None:
    report = await run(config(tmp_path), RECORDS, FakeActors(fails="r3"), folder)
    assert report["turns"]["unjudged"] == 2 and report["problems"] == {"it does not fit": 1}
    again = FakeActors()
    assert (await run(config(tmp_path), RECORDS, again, folder))["problems"] == {} and again.played == ["r3"]


def test_only_the_sources_that_filters_ask_judge(tmp_path: Path) -> None:
    made = config(tmp_path, filters=FILTERS[:1])
    made.rewards.sources.append(SourceSettings("judge", "rlaudio.rewards.generative:GenerativeJudge"))
    made.rewards.judge_model.path = "judge"
    kept = distil.filtering(made).rewards
    assert [source.name for source in kept.sources] == ["verified"] and kept.judge_model.path == ""
    made.distil.filters = [FilterSettings("coherent", "judge", least=0.0)]
    assert distil.filtering(made).rewards.judge_model.path == "judge", "the generative judge as a filter"


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"k": 0}, r"distil\.k is 0: set 1"),
        ({"most": -1}, r"distil\.most is -1"),
        ({"max_records": -2}, r"distil\.max_records is -2"),
        ({"filters": []}, r"distil\.filters is empty"),
        ({"filters": [FilterSettings("right", "verifed")]}, r"filters\[0\]\.source is 'verifed'.*verified"),
        ({"filters": [FILTERS[0], FILTERS[0]]}, r"filters\[1\]\.name is 'right'"),
        ({"filters": [FilterSettings("kept", "verified")]}, r"filters\[0\]\.name is 'kept'.*none of kept"),
        ({"filters": [FilterSettings("right", "verified", least=float("nan"))]}, r"filters\[0\]\.least is nan"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, chosen: dict[str, Any], said: str) -> None:
    assert any(re.search(said, problem) for problem in distil_problems(config(tmp_path, **chosen)))
    assert distil_problems(config(tmp_path)) == []
    sounds = config(tmp_path)
    sounds.data.augment = AugmentSettings(share=0.5)
    assert any("data.augment.share is 0.5" in problem for problem in distil_problems(sounds))


def test_a_record_that_a_filter_cannot_judge_is_named(tmp_path: Path) -> None:
    made = config(tmp_path)
    made.rewards.sources[0].options = {"match": "numeric"}
    with pytest.raises(DataError, match="record 'r' cannot be filtered: source 'verified'.*'high' names 0 numbers"):
        distil.require_judged(made, [record()])


def spoken(clips: ClipStore, name: str, *, pitch_hz: float) -> PromptRecord:
    clip = clips.put(0.1 * np.sin(np.arange(SAMPLE_RATE_HZ) * 2 * np.pi * pitch_hz / SAMPLE_RATE_HZ).astype(np.float32))
    sound = AudioPart(clips.uri(clip.sha256), clip.sha256, SAMPLE_RATE_HZ, "is my voice high or low")
    return PromptRecord(name, "pitch", (Message("user", (sound,), answer="high"),))


def test_a_sound_that_is_held_out_ends_it_before_anything_is_played(tmp_path: Path) -> None:
    clips = ClipStore(str(tmp_path))
    write_records(tmp_path / "train.jsonl", [spoken(clips, "a", pitch_hz=100), spoken(clips, "b", pitch_hz=200)])
    write_records(tmp_path / "heldout.jsonl", [spoken(clips, "c", pitch_hz=200)])
    (tmp_path / "policy").mkdir()
    file = {
        "recipe": "distil",
        "run": {"name": "d"},
        "model": {"path": "policy"},
        "data": {"train": "train.jsonl", "clips": ".", "heldout": {"heldout": "heldout.jsonl"}},
        "rewards": {"sources": [{"name": "verified", "judge": "rlaudio.rewards.verified:VerifiedReward"}]},
        "distil": {"filters": [{"name": "right", "source": "verified", "detail": "correct"}]},
    }
    (tmp_path / "distil.yaml").write_text(json.dumps(file))
    with pytest.raises(DataError, match=r"(?s)heldout\.jsonl.*'c'|train\.jsonl.*'b'"):
        distil_command(str(tmp_path / "distil.yaml"), [], resume=None)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_pipeline_hands_the_answers_to_fine_tuning(tmp_path: Path) -> None:
    stages = [
        {"name": "distil_1", "recipe": "distil", "config": "distil.yaml"},
        {
            "name": "sft_1",
            "recipe": "sft",
            "config": "sft.yaml",
            "settings": {"phases": [{"mixture": [{"path": "${stage.distil_1.records}", "weight": 1}]}]},
        },
    ]
    file = {"recipe": "pipeline", "run": {"name": "mgrd", "root": "runs"}, "stages": stages}
    (tmp_path / "pipeline.yaml").write_text(json.dumps(file))
    pipeline = read_pipeline(str(tmp_path / "pipeline.yaml"))
    answers = pipeline.stages[0].results["records"]
    assert f'distil.output="{answers}"' in pipeline.stages[0].overrides
    assert any(str(answers) in line for line in pipeline.stages[1].overrides)
