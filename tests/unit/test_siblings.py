"""Evaluation of checkpoints with sampled siblings: who is played, what is left out, what a resumed one plays again."""

import dataclasses
import types
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rlaudio.config_checks_stages import evaluation_problems
from rlaudio.config_loader import load_config
from rlaudio.config_stages import EvaluationConfig
from rlaudio.data.run_data import RunData
from rlaudio.errors import JudgeError, RolloutError, WeightSyncError
from rlaudio.evals.heldout import evaluate_siblings
from rlaudio.evals.summary import DialogueResult, read_evaluation
from rlaudio.observe.progress import Progress
from rlaudio.recipes import evaluation
from rlaudio.runs import create_run
from rlaudio.types import Message, PromptRecord, TextPart
from tests.unit.evaluations import turn


def records(*names: str) -> list[PromptRecord]:
    return [PromptRecord(name, "t", (Message("user", (TextPart("q"),), answer="seven"),)) for name in names]


class Fakes:
    """Rollout and reward pools in one. A record called `broken` cannot be played, one called `odd` not judged."""

    def __init__(self, policy: str = "") -> None:
        self.policy = policy
        self.pool = types.SimpleNamespace(handles={"one": None})
        self.sampled: list[tuple[str, int, int, str]] = []
        self.greedy: list[str] = []

    async def sample(self, record: PromptRecord, *, index: int, num_siblings: int, purpose: str) -> Any:
        self.sampled.append((record.id, index, num_siblings, purpose))
        if record.id == "broken":
            raise RolloutError("no dialogue")
        return record, num_siblings

    async def grade(self, played: tuple[PromptRecord, int]) -> list[DialogueResult]:
        record, count = played
        if record.id == "odd":
            raise JudgeError("no verdict")
        return [DialogueResult(record.id, "t", 1, (turn(reply=f"{self.policy} {i}"),)) for i in range(count)]

    async def play_greedy(self, record: PromptRecord, **_: Any) -> PromptRecord:
        self.greedy.append(record.id)
        return record

    async def evaluate(self, record: PromptRecord) -> DialogueResult:
        return DialogueResult(record.id, "t", 1, (turn(reply=self.policy),))


async def siblings(fakes: Fakes, told: list[str], **sets: list[PromptRecord]) -> dict[str, list[str]]:
    found = await evaluate_siblings(
        sets, num_siblings=3, num_records=2, rollouts=fakes, rewards=fakes,  # type: ignore[arg-type]
        progressed=lambda done, total: None, told=told.append,
    )  # fmt: skip
    return {one.name: [dialogue.prompt_id for dialogue in one.dialogues] for one in found}


async def test_the_first_records_have_siblings_side_by_side() -> None:
    fakes, told = Fakes(), list[str]()
    found = await siblings(fakes, told, a=records("p", "q", "r"), b=records("p"))
    assert found == {"a": ["p"] * 3 + ["q"] * 3, "b": ["p"] * 3} and not told
    assert len({index for _, index, _, _ in fakes.sampled}) == 3, "no two groups in play with one number"


async def test_what_cannot_be_played_or_judged_is_left_out_and_told() -> None:
    told: list[str] = []
    assert await siblings(Fakes(), told, a=records("broken", "p")) == {"a": ["p"] * 3}
    assert told == ["a: 1 of 2 records had no siblings, such as: no dialogue"]
    with pytest.raises(JudgeError, match="no verdict"):
        await siblings(Fakes(), told, a=records("p"), b=records("odd"))


# ---- the recipe ---------------------------------------------------------------------------------------------------


def config(tmp_path: Path, **changes: Any) -> EvaluationConfig:
    path = tmp_path / "config.yaml"
    path.write_text(
        "{run: {name: e}, model: {path: m}, data: {train: t.jsonl, clips: c, heldout: {held: h.jsonl}}, "
        "policies: {start: m, end: n}, rewards: {sources: [{name: v, judge: 'rlaudio.rewards.verified:R1Text'}]}}"
    )
    loaded: EvaluationConfig = load_config(EvaluationConfig, path)
    return dataclasses.replace(loaded, **changes)


async def test_a_resumed_evaluation_plays_the_policies_that_lack_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Fakes] = []

    @asynccontextmanager
    async def actors(config: EvaluationConfig, *, told: Any) -> AsyncIterator[Any]:
        started.append(Fakes(Path(config.model.path).name))
        yield types.SimpleNamespace(rollouts=started[-1], rewards=started[-1], model=config.model)

    monkeypatch.setattr(evaluation, "playing_actors", actors)
    data = RunData([], {"held": records("p", "q")})

    async def go(folder: Any, **changes: Any) -> list[str]:
        started.clear()
        with Progress() as progress:
            await evaluation.run_evaluation(
                config(tmp_path, **changes), data=data, folder=folder, tracker=Tracker(), progress=progress
            )
        return [one.policy for one in started]

    with create_run(str(tmp_path), name="e", seed=0) as folder:
        assert await go(folder) == ["m", "n"] and not any(one.sampled for one in started)
        assert not list(folder.path.glob("siblings-*"))
        assert await go(folder, siblings=2) == ["m", "n"] and not any(one.greedy for one in started)
        kept = read_evaluation(folder.path / "siblings-end-held.json")
        assert [one.turns[0].reply for one in kept.dialogues] == ["n 0", "n 1"] * 2
        assert await go(folder, siblings=2) == []
        (folder.path / "siblings-end-held.json").unlink()
        assert await go(folder, siblings=2) == ["n"]


async def test_policies_that_differ_in_weights_alone_share_their_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    class Actors(Fakes):
        rollouts = rewards = property(lambda self: self)

        def __init__(self, model: Any) -> None:
            super().__init__(model.path)
            self.model = model

        async def load(self, path: str, *, number: int) -> None:
            happened.append(f"load {path} as {number}")
            if path == "n3":
                raise WeightSyncError("no engine took them")
            self.policy = path

    @asynccontextmanager
    async def actors(config: EvaluationConfig, *, told: Any) -> AsyncIterator[Any]:
        happened.append(f"start {config.model.path}")
        yield Actors(config.model)
        happened.append("end")

    monkeypatch.setattr(evaluation, "playing_actors", actors)
    monkeypatch.setattr(evaluation, "differ_in_weights_alone", lambda model, path: model.path[0] == path[0])
    policies = {"a": "m1", "b": "m2", "c": "n1", "d": "n2", "e": "n3"}
    with create_run(str(tmp_path), name="e", seed=0) as folder, Progress() as progress:
        await evaluation.run_evaluation(
            config(tmp_path, policies=policies),
            data=RunData([], {"held": records("p")}),
            folder=folder,
            tracker=Tracker(),  # type: ignore[arg-type]
            progress=progress,
        )
        replies = [
            read_evaluation(folder.path / f"evaluation-{name}-held.json").dialogues[0].turns[0].reply
            for name in policies
        ]
    assert happened == [
        "start m1",
        "load m2 as 1",
        "end",
        "start n1",
        "load n2 as 2",
        "load n3 as 3",
        "end",
        "start n3",
        "end",
    ]
    assert replies == list(policies.values()), "a policy was measured with another one's weights"


class Tracker:
    def log(self, metrics: Any, *, step: int) -> None: ...


def test_settings_of_siblings_that_make_no_sense(tmp_path: Path) -> None:
    assert evaluation_problems(config(tmp_path, siblings=2, sibling_records=5)) == []
    (said,) = evaluation_problems(config(tmp_path, sibling_records=5))
    assert "siblings 0: say how many" in said
    (said,) = evaluation_problems(config(tmp_path, siblings=-1))
    assert said == "siblings is -1: set 0 or more"
