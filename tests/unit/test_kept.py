"""What a stage leaves running for the next: only what fits it, only after a good end, and nothing that is forgotten."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from rlaudio.actors import reward as reward_module
from rlaudio.actors import rollout as rollout_module
from rlaudio.actors.members import ActorPool
from rlaudio.actors.pool import RolloutPool
from rlaudio.actors.reward import RewardWorker
from rlaudio.actors.rollout import RolloutWorker
from rlaudio.cli.train import train_command
from rlaudio.config import RunConfig, SourceSettings
from rlaudio.config_loader import load_config
from rlaudio.config_stages import CurationConfig
from rlaudio.models.step_audio import create_tiny
from rlaudio.recipes import places as places_module
from rlaudio.recipes import rl
from rlaudio.recipes.cluster import joined_ray
from rlaudio.recipes.kept import Kept, Left, built_from
from rlaudio.recipes.places import Places, Wish
from rlaudio.rewards.base import JudgeServices
from rlaudio.types import WeightVersion
from tests.conftest import TINY_WORDS
from tests.fake_actors import Answer, Method

START = WeightVersion(0, 0)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Ray was told to do, instead of doing it."""
    heard: list[Any] = []
    monkeypatch.setattr("ray.kill", heard.append)
    monkeypatch.setattr("ray.shutdown", lambda: heard.append("shutdown"))
    monkeypatch.setattr("ray.init", lambda **_: heard.append("init"))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return heard


class Actor:
    """Answers pings, or has died, or says nothing."""

    def __init__(self, name: str, ails: str = "") -> None:
        self.name, self._ails = name, ails
        self.started: list[tuple[str, tuple[Any, ...]]] = []

    async def _ping(self) -> None:
        if self._ails == "mute":
            await asyncio.Event().wait()
        if self._ails == "dead":
            raise RayActorError

    def _calls(self, name: str, *given: Any) -> Answer:
        async def started() -> None:
            self.started.append((name, given))

        return Answer(started)

    ping = property(lambda self: Method(lambda: Answer(self._ping)))
    start = property(lambda self: Method(lambda *given: self._calls("start", *given)))
    start_over = property(lambda self: Method(lambda *given: self._calls("start over", *given)))

    def __repr__(self) -> str:
        return self.name


def pool_of(*actors: Actor) -> ActorPool:
    members: Any = {f"{actor.name}": actor for actor in actors}
    return ActorPool("rollout", members, alive_deadline_s=1.0, end=lambda handle: ray.kill(handle))


def config_of(path: Path | str, **changes: Any) -> RunConfig:
    config = RunConfig()
    config.model.path, config.data.clips = str(path), "clips"
    for name, value in changes.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


def left_by(config: RunConfig, kept: Kept, *, then: object) -> tuple[ActorPool, ActorPool]:
    kept.begin(config, then=then)
    assert kept.take() is None, "nobody was before"
    rollouts, rewards = pool_of(Actor("engine")), pool_of(Actor("judge"))
    kept.leave(config, places=Places(), rollouts=rollouts, rewards=rewards)
    return rollouts, rewards


@pytest.mark.parametrize(
    ("line", "fits"),
    [
        ("model.path=elsewhere", True),
        ("run.steps=7", True),
        ("run.name=other", True),
        ("data.train=other.jsonl", True),
        ("algorithm.kl_coef=0.5", True),
        ("learner.lr=0.5", True),
        ("rewards.sources=[{name: a, judge: b, weight: 0.5}]", True),
        ("rewards.shuffle=true", True),
        ("run.seed=7", False),
        ("model.dtype=bfloat16", False),
        ("data.clips=other", False),
        ("data.augment.share=0.5", False),
        ("dialogue.max_turns=2", False),
        ("sampling.max_new_tokens=7", False),
        ("rollout.actors=2", False),
        ("rollout.engine.max_model_len=99", False),
        ("rewards.judge_model.path=other", False),
        ("rewards.judge_model.engine.max_num_seqs=3", False),
        ("rewards.group_deadline_s=3", False),
        ("learner.ranks=2", False),
        ("learner.train_encoder=true", False),
        ("sync.transport=collective", False),
        ("cluster.room_deadline_s=3", False),
    ],
)
def test_settings_that_engines_and_judges_were_built_from_must_be_equal(tmp_path: Path, line: str, fits: bool) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("run: {name: x}\nmodel: {path: start}\ndata: {clips: clips}\nlearner: {num_cpus: 0.5}\n")
    configs = [load_config(RunConfig, file, lines) for lines in ((), (line,))]
    assert configs[0] != configs[1] and (built_from(configs[0]) == built_from(configs[1])) is fits


def test_what_was_left_is_taken_once_and_is_not_ended(tiny_checkpoint: Path, done: list[Any]) -> None:
    kept, first = Kept(), config_of(tiny_checkpoint)
    second = config_of(tiny_checkpoint, learner__lr=0.5)
    rollouts, rewards = left_by(first, kept, then=second)
    assert kept.waits and not rollouts.handles and not rewards.handles
    kept.begin(second, then=None)
    left = kept.take()
    assert left is not None and [str(actor) for actor in (*left.rollouts, *left.rewards)] == ["engine", "judge"]
    assert not kept.waits and kept.take() is None
    kept.close()
    assert not done, "whoever took it ends it"


@pytest.mark.parametrize("then", [None, CurationConfig(), config_of("elsewhere", rollout__actors=2)])
def test_nothing_is_left_for_a_stage_that_cannot_use_it(tiny_checkpoint: Path, done: list[Any], then: object) -> None:
    kept = Kept()
    rollouts, rewards = left_by(config_of(tiny_checkpoint), kept, then=then)
    assert not kept.waits and len(rollouts.handles) == len(rewards.handles) == 1 and not done


def test_what_the_stage_that_begins_cannot_use_is_ended_with_ray(
    tiny_checkpoint: Path, tmp_path: Path, done: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alike = create_tiny(tmp_path / "alike", words=TINY_WORDS, seed=0).path
    unlike = create_tiny(tmp_path / "unlike", words=TINY_WORDS, seed=1).path  # it has another frozen encoder
    first = config_of(tiny_checkpoint)
    kept = Kept()
    left_by(first, kept, then=config_of(alike))
    kept.begin(config_of(alike), then=None)
    assert kept.waits and not done, "its learner brings the weights"
    for stage in (config_of(unlike), CurationConfig(), config_of(alike, rewards__actors=2)):
        kept = Kept()
        left_by(first, kept, then=config_of(alike))
        kept.begin(stage, then=None)
        assert not kept.waits and [str(one) for one in done] == ["engine", "judge", "shutdown"]
        done.clear()
    kept = Kept()
    left_by(first, kept, then=config_of(alike))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    kept.begin(config_of(alike), then=None)
    assert not kept.waits, "its judges' code is found elsewhere"


async def test_whoever_died_or_is_mute_meanwhile_is_not_taken_over(done: list[Any]) -> None:
    config = config_of("p", rollout__alive_deadline_s=0.05)
    dead, mute, well, judge = Actor("dead", "dead"), Actor("mute", "mute"), Actor("well"), Actor("judge")
    actors: Any = (dead, mute, well)
    left = Left(config, {}, Places(), actors, (judge,))  # type: ignore[arg-type]
    assert await left.living() == ((well,), (judge,))
    assert set(done) == {dead, mute}


def test_an_actor_that_is_missing_gets_its_place_although_ray_has_not_freed_it_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places_module, "_is_homeless", lambda group: False)
    monkeypatch.setattr(places_module, "_has_room", lambda wish, group: False)
    first, group = Places(), SimpleNamespace(is_empty=False)
    first._groups["rollout"] = (Wish("rollout", "rollout.actors", 2, 1.0, 0.0, "PACK"), group)  # type: ignore[assignment]
    assert [bool(first.options("rollout")) for _ in range(3)] == [True, True, False]
    second = first.moved()
    assert first.options("rollout") == {}, "nothing is left there"
    second.taken_over("rollout", 1)
    assert [bool(second.options("rollout")) for _ in range(2)] == [True, False]


def test_what_runs_is_what_the_file_says_when_the_stage_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """The pipeline has read it before, perhaps hours ago."""

    class Asked(Exception):
        pass

    class Asking(Kept):
        def fit(self, stage: Any) -> None:
            raise Asked(stage.rollout.engine.max_model_len)

    settings = {
        "run": {"name": "x", "root": str(tmp_path / "runs")},
        "model": {"path": str(tiny_checkpoint)},
        "data": {"clips": str(tmp_path), "train": str(tmp_path / "train.jsonl")},
        "rewards": {"sources": [{"name": "verified", "judge": "rlaudio.rewards.verified:VerifiedReward"}]},
        "rollout": {"engine": {"max_model_len": 123}},
    }
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "arm.yaml").write_text(json.dumps(settings))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(Asked, match="123"):
        train_command(str(tmp_path / "arm.yaml"), [], resume=None, kept=Asking())


def test_a_pool_hands_over_no_more_than_the_next_one_has() -> None:
    ended: list[Any] = []
    actors: Any = {name: Actor(name) for name in ("a", "b", "c", "d")}
    pool = ActorPool("rollout", actors, alive_deadline_s=1.0, end=ended.append)
    pool.give_no_more("b")
    assert [str(one) for one in pool.handed_over(2)] == ["a", "c"]
    assert {str(one) for one in ended} == {"b", "d"} and not pool.handles
    pool.stop()
    assert len(ended) == 2


async def test_running_actors_start_over_and_missing_ones_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    config, old, new = config_of("p", rollout__actors=2), Actor("old"), Actor("new")
    monkeypatch.setattr(RolloutPool, "make", lambda self: new)
    pool = RolloutPool(config, environment={}, running=(old,))  # type: ignore[arg-type]
    await pool.start(START)
    assert pool.pool.handles == {"rollout-0": old, "rollout-1": new}
    assert old.started == [("start over", (config, START))] and new.started == [("start", (START,))]


async def test_a_rollout_actor_keeps_its_engine_and_encoder_and_knows_nothing_of_the_weights_before(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    monkeypatch.setattr(rollout_module, "load_encoder", lambda *_, **__: loaded.append("encoder") or object())
    first, second = (config_of(tiny_checkpoint, sync__delta=True, data__clips=str(tmp_path)) for _ in range(2))
    engine: Any = SimpleNamespace(version=WeightVersion(0, 40))
    worker = RolloutWorker(first, on_gpu=False, engine=engine)
    await worker.start(START)
    before, users, left = worker._receiver, worker._users, list[str]()
    assert before is not None and users is not None
    before.membership = SimpleNamespace(leave=lambda: left.append("group"))  # type: ignore[assignment]
    await worker.start_over(second, START)
    assert worker._config is second and worker._engine is engine and loaded == ["encoder"]
    assert worker._users is users, "what users think with is served on"
    assert left == ["group"] and worker._receiver is not before
    assert worker._receiver is not None and worker._receiver.base_version is None, "versions of two runs look alike"


async def test_a_reward_actor_keeps_its_models_and_takes_the_sources_of_the_new_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served = 0

    async def start_services(config: RunConfig, *, on_gpu: bool) -> JudgeServices:
        nonlocal served
        served += 1
        return JudgeServices(engine=None, family=None, seed=0)

    monkeypatch.setattr(reward_module, "start_services", start_services)
    verified, brevity = (
        SourceSettings("verified", "rlaudio.rewards.verified:VerifiedReward"),
        SourceSettings("brevity", "rlaudio.rewards.brevity:Brevity", weight=0.1, options={"most": 12}),
    )
    first, second = RunConfig(), RunConfig()
    first.rewards.sources = [verified]
    second.rewards.sources = [dataclasses.replace(verified, weight=0.25), brevity]
    second.run.spool = str(tmp_path / "spool")
    worker = RewardWorker(first, on_gpu=False)
    await worker.start()
    await worker.start_over(second)
    assert [(judge.name, settings.weight) for judge, settings in worker._sources] == [
        ("verified", 0.25),
        ("brevity", 0.1),
    ]
    assert served == 1 and worker._spool is not None


@pytest.mark.parametrize("leaves", [True, False])
def test_ray_goes_on_between_runs_that_leave_something(tiny_checkpoint: Path, done: list[Any], leaves: bool) -> None:
    kept, config = Kept(), config_of(tiny_checkpoint)
    needs = {"rollout": (1.0, 0.0)}
    with joined_ray(needs, kept=kept):
        left_by(config, kept, then=config if leaves else None)
    assert done == (["init"] if leaves else ["init", "shutdown"])
    with joined_ray(needs, kept=kept):
        kept.take()
    assert done == (["init", "shutdown"] if leaves else ["init", "shutdown"] * 2)


# ---- a run --------------------------------------------------------------------------------------------------------


class Parts:
    """Stands in for everything that `running_actors` builds, and remembers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: list[str] = []
        self.running: list[tuple[Any, ...]] = []
        parts = self

        class Pool:
            def __init__(self, config: RunConfig, *, running: tuple[Any, ...], **_: Any) -> None:
                parts.running.append(running)
                self.pool = pool_of(Actor("one"))

            async def start(self, *_: Any) -> None: ...

        class Learner:
            def __init__(self, *_: Any, **__: Any) -> None: ...

            async def start(self) -> None: ...

            async def stop(self) -> None:
                parts.heard.append("learner stopped")

        @asynccontextmanager
        async def nothing(*_: Any, **__: Any) -> AsyncIterator[None]:
            yield

        async def bring_back(learner: Any, weights: Any, checkpoint: Path | None) -> WeightVersion:
            parts.heard.append(f"weights of {checkpoint}")
            return WeightVersion(0, 5)

        for name in ("RolloutPool", "RewardPool"):
            monkeypatch.setattr(rl, name, Pool)
        monkeypatch.setattr(rl, "LearnerGroup", Learner)
        monkeypatch.setattr(rl, "trainer_spec", lambda *_: None)
        monkeypatch.setattr(rl, "transport_of", lambda *_, **__: None)
        monkeypatch.setattr(rl, "supervised", nothing)
        monkeypatch.setattr(rl, "JudgeWatch", lambda *_, **__: SimpleNamespace(watching=nothing))
        monkeypatch.setattr(rl, "bring_back", bring_back)


async def one_run(config: RunConfig, kept: Kept, work: Callable[[rl.RunActors], None] = lambda actors: None) -> None:
    async with rl.running_actors(config, version=START, checkpoint=None, told=print, kept=kept) as actors:
        work(actors)


async def test_the_second_run_goes_on_with_the_actors_of_the_first_and_its_own_weights(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, done: list[Any]
) -> None:
    parts, kept, config = Parts(monkeypatch), Kept(), config_of(tiny_checkpoint)
    kept.begin(config, then=config)
    await one_run(config, kept)
    assert parts.running == [(), ()] and parts.heard == ["learner stopped"] and kept.waits and not done
    kept.begin(config, then=None)
    await one_run(config, kept)
    assert [[str(one) for one in running] for running in parts.running[2:]] == [["one"], ["one"]]
    assert parts.heard == ["learner stopped", "weights of None", "learner stopped"]
    assert not kept.waits and len(done) == 2, "nobody comes after it"


async def test_a_run_that_fails_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, done: list[Any]
) -> None:
    Parts(monkeypatch)
    kept, config = Kept(), config_of(tiny_checkpoint)
    kept.begin(config, then=config)

    def fail(actors: rl.RunActors) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await one_run(config, kept, fail)
    assert not kept.waits and len(done) == 2
