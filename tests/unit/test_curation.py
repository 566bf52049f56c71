"""Curation without engines: what counts as passed, what is kept, what is remembered, refused and told."""

import asyncio
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaudio.config import DataSettings, EngineConfig, ModelSettings, RewardSettings, RolloutSettings, SourceSettings
from rlaudio.config_checks_stages import curation_problems
from rlaudio.config_stages import CurationConfig, CurationSettings
from rlaudio.data.curation import Rolled, RolledFile, require_kept, rolled, still_to_roll, summarise_curation
from rlaudio.data.records import read_records
from rlaudio.errors import ConfigError, DataError, JudgeError, RolloutError
from rlaudio.evals.summary import DialogueResult
from rlaudio.observe.curation_page import write_curation_page
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import JsonlTracker, read_curves
from rlaudio.recipes import curation
from rlaudio.recipes.rolling import in_flight
from rlaudio.runs import RunFolder, create_run
from rlaudio.types import Message, PromptRecord, TextPart
from tests.unit.evaluations import dialogue, turn

VERIFIED = SourceSettings("verified", "rlaudio.rewards.verified:VerifiedReward")
JUDGE = SourceSettings("judge", "rlaudio.rewards.generative:GenerativeJudge", weight=0.2)
EVIL = "<script>alert(1)</script>"


def record(name: str, *answers: str | None, task: str = "sums") -> PromptRecord:
    users = tuple(Message("user", (TextPart(f"what is {name}"),), answer=answer) for answer in answers or ("seven",))
    return PromptRecord(name, task, users)


def settings(tmp_path: Path, *sources: SourceSettings, **chosen: Any) -> CurationConfig:
    (tmp_path / "policy").mkdir(exist_ok=True)
    (tmp_path / "policy" / "weights").write_text("v1")
    config = CurationConfig(
        model=ModelSettings(path=str(tmp_path / "policy")),
        data=DataSettings(train="train.jsonl", clips=str(tmp_path)),
        rollout=RolloutSettings(engine=EngineConfig(max_num_seqs=8)),
        rewards=RewardSettings(sources=list(sources or (VERIFIED,))),
        curation=CurationSettings(**chosen),
    )
    config.run.name = "curation"
    return config


@dataclasses.dataclass
class FakeActors:
    """Plays and grades by script: record id -> how many of its siblings are right, or the error."""

    script: dict[str, int | Exception]
    dies_after: int = 10**6

    def __post_init__(self) -> None:
        self.played: list[str] = []
        self.in_play = self.most_in_play = 0

    async def sample(self, record: PromptRecord, *, index: int, num_siblings: int, purpose: str) -> Any:
        if len(self.played) >= self.dies_after:
            raise KeyError("the process is killed here")
        self.played.append(record.id)
        self.in_play += 1
        self.most_in_play = max(self.most_in_play, self.in_play)
        await asyncio.sleep(0)
        self.in_play -= 1
        return SimpleNamespace(record=record, num_siblings=num_siblings)

    async def grade(self, played: Any) -> list[DialogueResult]:
        fate = self.script[played.record.id]
        if isinstance(fate, Exception):
            raise fate
        return [dialogue(played.record.id, turn(correct=n < fate)) for n in range(played.num_siblings)]


async def run(
    config: CurationConfig, records: Sequence[PromptRecord], actors: FakeActors, folder: RunFolder
) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch, Progress() as progress:
        patch.setattr(curation, "playing_actors", lambda config, told: _Held(actors))
        return await curation.run_curation(
            config,
            records=records,
            folder=folder,
            tracker=JsonlTracker(folder.metrics / "metrics.jsonl"),
            progress=progress,
        )


class _Held:
    def __init__(self, actors: FakeActors) -> None:
        self._actors = SimpleNamespace(rollouts=actors, rewards=actors)

    async def __aenter__(self) -> Any:
        return self._actors

    async def __aexit__(self, *_: object) -> None: ...


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with create_run(tmp_path / "runs", name="curation", seed=0) as made:
        yield made


# ---- what passes, what is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verified", "pass_share", "passes"),
    [
        ({0, 1}, 1.0, False),  # turn 1 is wrong
        ({0}, 1.0, True),  # nobody checks turn 1
        ({0, 1}, 0.5, True),
        ({0, 1, 2}, 0.5, False),  # turn 2 was never played: wrong
        ({2}, 1.0, False),
    ],
)
def test_a_dialogue_passes_by_the_turns_that_are_verified(verified: set[int], pass_share: float, passes: bool) -> None:
    played = dialogue("r", turn(0), turn(1, correct=False), asked=3)
    made = rolled(record("r", "a", "b", "c"), [played], verified=verified, pass_share=pass_share)
    assert made.passed == (passes,)


def test_right_words_that_cannot_be_parsed_do_not_pass() -> None:
    assert rolled(record("r"), [dialogue("r", turn(parsable=False))], verified={0}, pass_share=1.0).passed == (False,)


def test_a_sibling_that_was_not_judged_leaves_the_whole_record_unjudged() -> None:
    bad = dataclasses.replace(dialogue("r", turn(correct=False)), problem="verified: no verdict")
    made = rolled(record("r"), [dialogue("r", turn()), bad], verified={0}, pass_share=1.0)
    assert (made.passed, made.problem, made.fate([0, 1])) == ((), "verified: no verdict", "unjudged")


async def test_three_to_six_of_eight_are_kept_as_they_lie(tmp_path: Path, folder: RunFolder) -> None:
    records = [record(f"r{n}", task="sums" if n < 5 else "rule") for n in range(9)]
    actors = FakeActors({one.id: number for number, one in enumerate(records)})
    report = await run(settings(tmp_path), records, actors, folder)
    kept = read_records(folder.path / "kept.jsonl")
    assert kept == records[3:7], "in the order of the file, unchanged"
    assert report["all"] == {
        "records": 9, "kept": 4, "too_hard": 3, "too_easy": 2, "unjudged": 0,
        "pass_rate": 36 / 72, "pass_rate_kept": 18 / 32, "histogram": [1] * 9,
    }  # fmt: skip
    assert {name: one["kept"] for name, one in report["tasks"].items()} == {"rule": 2, "sums": 2}
    assert json.loads(folder.report_json.read_text())["all"] == report["all"]
    curves = read_curves(folder.metrics / "metrics.jsonl")
    assert curves["curation/records_by_passes"] == [(number, 1.0) for number in range(9)]
    assert actors.most_in_play <= in_flight(settings(tmp_path), k=8) == 2
    first = json.loads((folder.path / "rolled.jsonl").read_text().splitlines()[0])["dialogues"][0]["turns"][0]
    assert first["reply"] == "it is seven" and first["thinking"] == "four plus three"


# ---- what is remembered -------------------------------------------------------------------------------------------


async def test_a_killed_curation_rolls_out_only_what_is_missing(tmp_path: Path, folder: RunFolder) -> None:
    records = [record(f"r{n}") for n in range(6)]
    script: dict[str, int | Exception] = {one.id: 4 for one in records}
    with pytest.raises(KeyError, match="killed"):
        await run(settings(tmp_path), records, FakeActors(script, dies_after=4), folder)
    file = folder.path / "rolled.jsonl"
    known = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    assert known, "what was done is on the disk"
    file.write_bytes(file.read_bytes()[:-20])  # the kill cut the last line
    lost = known.pop()
    second = FakeActors(script)
    report = await run(settings(tmp_path), records, second, folder)
    assert sorted(second.played) == sorted({one.id for one in records} - set(known)) and lost in second.played
    assert report["all"]["kept"] == 6
    third = FakeActors(script)
    assert (await run(settings(tmp_path), records, third, folder))["all"] == report["all"]
    assert third.played == []


async def test_the_range_may_change_without_playing_again(tmp_path: Path, folder: RunFolder) -> None:
    records = [record(f"r{n}") for n in range(9)]
    script: dict[str, int | Exception] = {one.id: number for number, one in enumerate(records)}
    await run(settings(tmp_path), records, FakeActors(script), folder)
    again = FakeActors(script)
    await run(settings(tmp_path, keep=[7, 8]), records, again, folder)
    assert not again.played
    assert [one.id for one in read_records(folder.path / "kept.jsonl")] == ["r7", "r8"]


@pytest.mark.parametrize("changed", ["k", "model", "seed"])
async def test_rollouts_of_another_policy_are_not_taken_for_this_one(
    tmp_path: Path, folder: RunFolder, changed: str
) -> None:
    records = [record("r")]
    await run(settings(tmp_path), records, FakeActors({"r": 4}), folder)
    config = settings(tmp_path, **({"k": 7} if changed == "k" else {}))
    if changed == "model":
        (tmp_path / "policy" / "weights").write_text("v2")
    if changed == "seed":
        config.run.seed = 1
    actors = FakeActors({"r": 4})
    with pytest.raises(DataError, match=f"under another {changed}"):
        await run(config, records, actors, folder)
    assert not actors.played


def test_a_changed_record_is_rolled_out_again(tmp_path: Path) -> None:
    file = RolledFile(tmp_path / "rolled.jsonl")
    file.add(rolled(record("r"), [dialogue("r", turn())] * 2, verified={0}, pass_share=1.0))
    file.add(Rolled("bad", "sums", "", problem="the engine died"))
    file.close()
    again = RolledFile(tmp_path / "rolled.jsonl")
    again.close()
    found = again.found
    assert still_to_roll([record("r")], found, k=2) == []
    assert still_to_roll([record("r", "eight")], found, k=2) == [record("r", "eight")]
    assert still_to_roll([record("r"), record("bad")], found, k=2) == [record("bad")], "trouble is tried again"
    assert still_to_roll([record("r")], found, k=3) == [record("r")]


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_a_record_without_a_verifier_is_named_before_anything_runs(tmp_path: Path) -> None:
    config = settings(tmp_path)
    assert curation.verified_turns(config, [record("a", None, "seven")]) == {"a": frozenset({1})}
    with pytest.raises(DataError, match=r"2 of 3 records have no verifier \(b, c\).*answer"):
        curation.verified_turns(config, [record("a"), record("b", None), record("c", None)])


def test_only_verifiers_judge_and_no_judge_model_is_served(tmp_path: Path) -> None:
    config = settings(tmp_path, VERIFIED, JUDGE)
    config.rewards.judge_model.path = "judge"
    chosen = curation.verifying(config).rewards
    assert [source.name for source in chosen.sources] == ["verified"] and chosen.judge_model.path == ""
    config.curation.sources = ["judge"]
    assert curation.verifying(config).rewards.judge_model.path == "judge"
    with pytest.raises(ConfigError, match=r"no reward source verifies, the run has judge \("):
        curation.verifying(settings(tmp_path, JUDGE))


async def test_nothing_kept_says_what_would_be(tmp_path: Path, folder: RunFolder) -> None:
    records = [record(f"r{n}") for n in range(4)]
    actors = FakeActors({"r0": 0, "r1": 0, "r2": 8, "r3": 1})
    with pytest.raises(DataError, match=r"keeps nothing.*0 of 8: 2, 1 of 8: 1, 8 of 8: 1.*curation\.keep"):
        await run(settings(tmp_path), records, actors, folder)
    assert json.loads(folder.report_json.read_text())["all"]["kept"] == 0
    assert folder.report_html.is_file() and not (folder.path / "kept.jsonl").exists()


async def test_what_could_not_be_judged_is_told_and_counted(tmp_path: Path, folder: RunFolder) -> None:
    script: dict[str, int | Exception] = {
        "r0": 4,
        "r1": RolloutError("it does not fit"),
        "r2": JudgeError("no verdict"),
    }
    records = [record(name) for name in script]
    report = await run(settings(tmp_path), records, FakeActors(script), folder)
    assert (report["all"]["kept"], report["all"]["unjudged"]) == (1, 2)
    assert report["problems"] == {"it does not fit": 1, "no verdict": 1}
    with pytest.raises(DataError, match="none of 1 records could be played and judged: it does not fit"):
        require_kept(summarise_curation([Rolled("r", "t", "", problem="it does not fit")], CurationSettings()))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"keep": [6, 3]}, r"curation\.keep is \[6, 3\]"),
        ({"keep": [3]}, r"curation\.keep is \[3\]"),
        ({"keep": [3, 9]}, r"curation\.keep is \[3, 9\]"),
        ({"keep": [0, 8]}, "keeps every record"),
        ({"k": 0, "keep": [0, 0]}, r"curation\.k"),
        ({"pass_share": 0.0}, r"curation\.pass_share"),
        ({"sources": ["verifed"]}, "verifed"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, chosen: dict[str, Any], said: str) -> None:
    assert any(re.search(said, problem) for problem in curation_problems(settings(tmp_path, **chosen)))
    assert curation_problems(settings(tmp_path)) == []


def test_the_file_of_an_rl_run_will_do(tmp_path: Path) -> None:
    config = settings(tmp_path)
    for recipe, fine in (("rl", True), ("curate", True), ("sft", False)):
        config.recipe = recipe
        assert (curation_problems(config) == []) == fine


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_page_shows_counts_and_runs_nothing_that_was_said(tmp_path: Path) -> None:
    said = record("r-" + EVIL, task=EVIL)
    made = rolled(said, [dialogue(said.id, turn(reply=EVIL))] * 8, verified={0}, pass_share=1.0)
    config = CurationSettings(keep=[3, 8])
    report = summarise_curation([made], config)
    write_curation_page(tmp_path / "report.html", report=report, rolled=[made], records=[said])
    page = (tmp_path / "report.html").read_text()
    assert "1 of 1 records are kept" in page and "<script" not in page
    assert 'class="bars"' in page and "8: 1" in page
