"""What a run keeps when something goes wrong: weights, evaluations, checkpoints, and the words of why."""

import asyncio
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from rlaudio.actors.members import ActorPool
from rlaudio.actors.pool import PlayedGroup, RewardPool
from rlaudio.aio import undisturbed
from rlaudio.cli.train import make_importable, resume_command
from rlaudio.config import AlgorithmSettings, EvaluationSettings, RunConfig
from rlaudio.data.mixture import MixturePart
from rlaudio.data.run_data import RunData, prompt_source
from rlaudio.data.source import PromptSource
from rlaudio.errors import (
    CheckpointError,
    DataError,
    DivergenceError,
    EngineDeadError,
    EngineError,
    JudgeError,
    RolloutError,
    RunFolderError,
    StarvedError,
)
from rlaudio.evals.heldout import evaluate
from rlaudio.evals.summary import EvaluationResult, read_evaluation, summarise, write_evaluation
from rlaudio.experience.issuing import Issuer
from rlaudio.experience.ledger import Ledger
from rlaudio.loop import Parts
from rlaudio.observe.metrics import GroupStats
from rlaudio.observe.observer import Observer
from rlaudio.observe.progress import Progress
from rlaudio.recipes.checkpoints import CheckpointStore, DriverState
from rlaudio.recipes.restoring import remembering
from rlaudio.recipes.rl import evaluated
from rlaudio.recipes.training import train_and_keep
from rlaudio.runs import RunFolder, create_run, find_run, open_run
from rlaudio.types import Message, PromptRecord, TextPart, WeightVersion
from tests.unit.evaluations import dialogue, turn

RECORDS = [PromptRecord(f"r{i}", "sums", (Message("user", (TextPart("hi"),)),)) for i in range(4)]


# ---- training that ends early -------------------------------------------------------------------------------------


@dataclass
class World:
    """A learner, actors and observer in one; everything goes well until step `until`."""

    until: int = 1_000
    failure: Exception | None = None
    trained: int = 0
    steps_done: int = 0
    saved: list[int] = field(default_factory=list)
    save_fails: bool = False
    third_step: asyncio.Event = field(default_factory=asyncio.Event)

    async def play(self, prompt: PromptRecord, *, group: int) -> Any:
        if self.trained >= self.until and isinstance(self.failure, RolloutError):
            raise self.failure
        version = WeightVersion(0, self.trained)
        judged = {"versions": (version, version), "spooled": None}
        return SimpleNamespace(has_signal=True, ref=group, states=(), oldest_version=version, **judged)

    async def judge(self, played: Any) -> Any:
        return played

    async def prepare(self, refs: list[Any], states: list[Any]) -> None: ...

    def minibatches(self, prepared: None) -> list[int]:
        return [0]

    async def forward_backward(self, part: int) -> None:
        if self.trained >= self.until and not isinstance(self.failure, RolloutError) and self.failure:
            raise self.failure

    async def optimizer_step(self) -> Any:
        if self.trained == 2:
            self.third_step.set()
        await asyncio.sleep(0.01)
        self.trained += 1
        return SimpleNamespace(version=WeightVersion(0, self.trained))

    async def broadcast(self, snapshot: Any) -> None: ...

    async def find_lost(self) -> str:
        return ""

    def dropped(self, reason: str) -> None: ...

    def step(self, step: int, **_: object) -> None:
        self.steps_done = step + 1

    async def save(self, step: int) -> None:
        if self.save_fails:
            raise CheckpointError("the disk is full")
        self.saved.append(step)


async def train_world(
    world: World, *, first_step: int = 0, said: io.StringIO | None = None, staleness: int = 0
) -> None:
    config = RunConfig(algorithm=AlgorithmSettings(max_staleness=staleness, groups_per_step=1, max_dropped_in_a_row=3))
    config.run.steps, config.run.checkpoint_every = 1_000, 500
    ledger = Ledger.in_memory()
    parts: Any = Parts(
        prompts=Issuer(PromptSource(RECORDS, seed=0), ledger),
        ledger=ledger,
        rollouts=world,  # type: ignore[arg-type]
        rewards=world,  # type: ignore[arg-type]
        learner=world,  # type: ignore[arg-type]
        weights=world,  # type: ignore[arg-type]
        observer=world,  # type: ignore[arg-type]
        version=WeightVersion(0, 0),
        save=world.save,
    )
    await train_and_keep(config, parts, first_step=first_step, progress=Progress(stream=said or io.StringIO()))


async def test_a_starved_run_keeps_its_weights_and_says_what_was_wrong() -> None:
    world = World(until=3, failure=RolloutError("the microphone is gone"))
    with pytest.raises(StarvedError, match="RolloutError: the microphone is gone"):
        await train_world(world)
    assert world.saved == [3] == [world.trained]


async def test_any_other_end_keeps_them_too() -> None:
    world = World(until=2, failure=EngineError("no actor is alive"))
    with pytest.raises(EngineError, match="no actor is alive"):
        await train_world(world)
    assert world.saved == [2]


async def test_weights_of_a_learner_that_failed_are_not_kept() -> None:
    world = World(until=2, failure=DivergenceError("loss is nan"))
    with pytest.raises(DivergenceError):
        await train_world(world)
    assert world.saved == []


async def test_a_save_that_fails_does_not_hide_why_the_run_ended() -> None:
    said = io.StringIO()
    with pytest.raises(StarvedError):
        await train_world(World(until=2, failure=RolloutError("gone"), save_fails=True), said=said)
    assert "the disk is full" in said.getvalue()


async def test_nothing_is_saved_where_nothing_was_learned() -> None:
    world = World(until=0, failure=RolloutError("gone"))
    with pytest.raises(StarvedError):
        await train_world(world, first_step=7)
    assert world.saved == []


async def test_a_stop_within_an_optimizer_step_saves_as_many_steps_as_the_learner_took() -> None:
    world = World()
    running = asyncio.create_task(train_world(world))
    await world.third_step.wait()
    assert world.trained == 2
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert world.saved == [3] == [world.trained]


class LosesItsEnginesWithinAStep(World):
    """While the third optimizer step is under way; saving takes a moment, as it does."""

    async def play(self, prompt: PromptRecord, *, group: int) -> Any:
        if group == 3:
            await self.third_step.wait()
            raise EngineError("no actor is alive")
        return await super().play(prompt, group=group)

    async def save(self, step: int) -> None:
        await asyncio.sleep(0.01)
        await super().save(step)


async def test_an_error_within_an_optimizer_step_saves_as_many_steps_as_the_learner_took() -> None:
    """The task group is ending when the step's batch is recorded: it takes no new task, such as a publish."""
    world = LosesItsEnginesWithinAStep()
    with pytest.raises(EngineError, match="no actor is alive"):
        await train_world(world, staleness=1)
    assert world.saved == [3] == [world.trained]


async def test_undisturbed_work_ends_and_the_cancellation_comes_after_it() -> None:
    done: list[str] = []

    async def work() -> str:
        await asyncio.sleep(0.01)
        return "result"

    async def caller() -> None:
        done.append(await undisturbed(work()))
        await asyncio.sleep(10)
        done.append("too far")

    task = asyncio.create_task(caller())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 1)
    assert done == ["result"]


async def test_undisturbed_work_in_a_group_leaves_the_group_its_error_and_its_cancellation() -> None:
    async def fail() -> None:
        raise JudgeError("first")

    async def fail_beside_work() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())
            await undisturbed(asyncio.sleep(0.01))
            await asyncio.sleep(10)

    with pytest.raises(ExceptionGroup) as caught:
        await fail_beside_work()
    assert caught.value.subgroup(JudgeError) is not None
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0, "the group's own cancellation was counted twice"


# ---- checkpoints --------------------------------------------------------------------------------------------------


def save(store: CheckpointStore, step: int, content: str) -> None:
    path = store.begin(step)
    (path / "weights").write_text(content)
    store.finish(path, DriverState(step=step, incarnation=0, number=step, prompts={}))


def test_a_save_that_is_cut_off_costs_no_whole_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5, "good")
    (store.begin(5) / "weights").write_text("half")
    assert store.holds(5)
    found = CheckpointStore(tmp_path).latest()
    assert found is not None and (found[0] / "weights").read_text() == "good"
    save(store, 6, "next")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000005", "step-000006"]


def test_a_whole_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5, "good")
    with pytest.raises(CheckpointError, match="step-000005 is whole already"):
        save(store, 5, "other")
    found = store.latest()
    assert found is not None and (found[0] / "weights").read_text() == "good"


def test_a_checkpoint_that_is_not_what_was_saved_is_put_aside(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (5, 6):
        save(store, step, f"of {step}")
    (tmp_path / "step-000006" / "weights").write_text("of 7")
    told: list[str] = []
    found = store.latest(told=told.append)
    assert found is not None and found[0].name == "step-000005" and found[1].version == WeightVersion(0, 5)
    assert "weights is not what was saved" in told[0] and (tmp_path / "damaged-step-000006").is_dir()
    (tmp_path / "step-000005" / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint .* is damaged, .*weights is missing"):
        store.latest()


@pytest.mark.parametrize("damage", ["more", "manifest"])
def test_what_was_added_or_cannot_be_summed_up_is_damage_too(tmp_path: Path, damage: str) -> None:
    store = CheckpointStore(tmp_path)
    save(store, 5, "good")
    (tmp_path / "step-000005" / ("extra.pt" if damage == "more" else "manifest.json")).write_text("?")
    with pytest.raises(CheckpointError, match="damaged"):
        store.latest()


# ---- resuming -----------------------------------------------------------------------------------------------------


def test_a_resume_finds_the_code_beside_the_configuration_the_run_was_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = tmp_path / "example"
    example.mkdir()
    with create_run(tmp_path / "runs", name="quick", seed=0, config=example / "config.yaml") as run:
        pass
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "")
    make_importable(str(run.config_yaml), resume=None)
    assert str(example) not in sys.path
    make_importable(str(run.config_yaml), resume=str(run.path))
    assert str(example) in sys.path
    assert resume_command(run) == f"rlaudio train {run.path}/config.yaml --resume {run.path}"


def test_a_run_that_does_not_say_where_it_came_from_is_resumed_all_the_same(tmp_path: Path) -> None:
    with create_run(tmp_path, name="quick", seed=0) as run:
        assert find_run(run.path).first_config is None
    (run.path / "run.json").write_text("[]")
    with pytest.raises(RunFolderError, match=r"run\.json cannot be read"):
        _ = run.first_config


async def test_a_run_that_goes_on_draws_its_mixture_where_it_stood(tmp_path: Path) -> None:
    """Six prompts before the checkpoint and three after it: all come back under their numbers, then the rest."""
    parts = (MixturePart("a", 0.75, RECORDS[:3]), MixturePart("b", 0.25, RECORDS[3:]))
    config, data = RunConfig(), RunData(RECORDS, {}, parts)
    whole = prompt_source(data, seed=config.run.seed)
    told: list[str] = []

    class Learner:
        async def save(self, path: Path) -> WeightVersion:
            return WeightVersion(0, 1)

    learner: Any = Learner()
    with (
        create_run(tmp_path, name="mixed", seed=0) as folder,
        remembering(config, data=data, folder=folder, resume=False, told=told.append) as memory,
    ):
        dealt = [memory.prompts.next() for _ in range(6)]
        await memory.saver(learner)(1)
        dealt += [memory.prompts.next() for _ in range(3)]
    with (
        open_run(folder.path),
        remembering(config, data=data, folder=folder, resume=True, told=told.append) as memory,
    ):
        again = [memory.prompts.next() for _ in range(20)]
        assert (memory.step, memory.version) == (1, WeightVersion(1, 1))
    assert again[:9] == [replace(issue, incarnation=1) for issue in dealt]
    assert [(issue.group, issue.record) for issue in again] == [(group, whole.next()) for group in range(20)]
    assert "of 9 groups that come back 0 are ready" in told[-1]


# ---- evaluations --------------------------------------------------------------------------------------------------


@dataclass
class Evaluated:
    """Rollout and reward actors that evaluate: every dialogue is right, those in `broken` raise what they name."""

    broken: Mapping[str, Exception] = field(default_factory=dict)
    reply: str = "seven"
    pool: Any = field(default_factory=lambda: SimpleNamespace(handles={"rollout-0": None}))

    @property
    def rollouts(self) -> Any:
        return self

    rewards = rollouts

    async def play_greedy(self, record: PromptRecord, **_: object) -> Any:
        if isinstance(error := self.broken.get(record.id), RolloutError):
            raise error
        return record

    async def evaluate(self, played: PromptRecord) -> Any:
        if error := self.broken.get(played.id):
            raise error
        return dialogue(played.id, turn(0, reply=self.reply))


async def evaluate_world(world: Evaluated, said: list[str]) -> list[EvaluationResult]:
    return await evaluate(
        {"heldout": RECORDS},
        phase="after",
        rollouts=world.rollouts,
        rewards=world.rewards,
        settings=EvaluationSettings(),
        progressed=lambda done, total: None,
        told=said.append,
    )


async def test_a_dialogue_that_cannot_be_played_or_judged_counts_as_wrong_and_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    world = Evaluated({"r1": RolloutError("does not fit"), "r2": JudgeError("no judge")})
    (result,) = await evaluate_world(world, said)
    assert [(d.prompt_id, d.accuracy, d.problem) for d in result.dialogues] == [
        ("r0", 1.0, ""), ("r1", 0.0, "does not fit"), ("r2", 0.0, "no judge"), ("r3", 1.0, ""),
    ]  # fmt: skip
    assert said == ["heldout: 2 of 4 dialogues had a problem, such as r1: does not fit"]
    (before,) = await evaluate_world(Evaluated(), said)
    before = EvaluationResult("heldout", "before", before.dialogues)
    report = summarise([before], [result], seed=0, throughput={}, timings_s={})["heldout"]
    assert report["delta"]["accuracy"]["mean"] == pytest.approx(-0.5)
    assert (report["before"]["num_problems"], report["after"]["num_problems"]) == (0, 2)
    write_evaluation(tmp_path / "after.json", result)
    assert read_evaluation(tmp_path / "after.json") == result


async def test_an_evaluation_of_which_nothing_could_be_played_is_no_evaluation() -> None:
    with pytest.raises(RolloutError, match="engine"):
        await evaluate_world(Evaluated({record.id: RolloutError("engine") for record in RECORDS}), [])


async def test_actors_that_are_all_dead_end_an_evaluation() -> None:
    with pytest.raises(EngineError, match="nobody"):
        await evaluate_world(Evaluated({"r1": EngineError("nobody")}), [])


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path, name="quick", seed=0)


async def evaluate_run(folder: RunFolder, world: Evaluated, *, phase: Any, step: int) -> str:
    data = RunData(train=RECORDS, heldout={"heldout": RECORDS})
    progress = Progress(stream=io.StringIO())
    (result,) = await evaluated(RunConfig(), data, world, phase=phase, step=step, folder=folder, progress=progress)
    return result.dialogues[0].turns[0].reply


async def test_a_longer_run_is_evaluated_again_at_its_new_end_and_not_at_its_start(folder: RunFolder) -> None:
    with folder:
        assert await evaluate_run(folder, Evaluated(reply="old"), phase="before", step=0) == "old"
        assert await evaluate_run(folder, Evaluated(reply="60"), phase="after", step=60) == "60"
        assert await evaluate_run(folder, Evaluated(reply="new"), phase="before", step=60) == "old"
        assert await evaluate_run(folder, Evaluated(reply="120"), phase="after", step=120) == "120"
        assert await evaluate_run(folder, Evaluated(reply="again"), phase="after", step=120) == "120"


async def test_trained_weights_are_not_evaluated_as_the_start(folder: RunFolder) -> None:
    with folder, pytest.raises(DataError, match="not evaluated on heldout before training, and is at step 60"):
        await evaluate_run(folder, Evaluated(), phase="before", step=60)


# ---- actors that die ----------------------------------------------------------------------------------------------


class FakeRewardActor:
    """Answers as a Ray handle does: `handle.judge.options(...).remote(...)` is a list of things to wait for."""

    def __init__(self, answer: Callable[[], str]) -> None:
        self._answer = answer

    @property
    def judge(self) -> "FakeRewardActor":
        return self

    def options(self, *, num_returns: int) -> "FakeRewardActor":
        return self

    def remote(self, *_: object) -> list[Any]:
        async def header() -> str:
            return self._answer()

        return [header(), "experience"]


def dying(error: Exception) -> Callable[[], str]:
    def answer() -> str:
        raise error

    return answer


def judges(said: list[str], ended: list[Any], *answers: Callable[[], str]) -> RewardPool:
    handles: Any = {f"reward-{i}": FakeRewardActor(answer) for i, answer in enumerate(answers)}
    pool = ActorPool("rewards", handles, alive_deadline_s=1.0, told=said.append, end=ended.append)
    return RewardPool(RunConfig(), environment={}, pool=pool)


PLAYED: Any = PlayedGroup(RECORDS[0], header=None, ref=None, states=())  # type: ignore[arg-type]
DEATHS = [EngineDeadError("the engine is dead: out of memory"), RayActorError()]


@pytest.mark.parametrize("death", DEATHS, ids=lambda error: type(error).__name__)
async def test_a_dead_judge_is_left_out_and_another_one_asked(death: Exception) -> None:
    said: list[str] = []
    ended: list[Any] = []
    header: Any = SimpleNamespace(late="")
    pool = judges(said, ended, dying(death), lambda: header)
    scored = await pool.judge(PLAYED)
    assert (scored.header, scored.ref) == (header, "experience")
    assert (pool.pool.num_alive, len(ended), len(said)) == (1, 1, 1)
    assert said[0].startswith(f"reward-0 is left out, 1 of 2 rewards actors go on: {type(death).__name__}")


async def test_a_group_that_kills_two_judges_is_dropped() -> None:
    pool = judges([], [], *[dying(DEATHS[0])] * 3)
    with pytest.raises(JudgeError, match="'r0' could not be judged: reward-0 died .*; reward-1 died"):
        await pool.judge(PLAYED)
    assert pool.pool.num_alive == 1


async def test_without_judges_the_run_ends_and_says_of_what_the_last_one_died() -> None:
    with pytest.raises(EngineError, match=r"no rewards actor is alive \(the last: reward-0: .*out of memory"):
        await judges([], [], dying(DEATHS[0])).judge(PLAYED)


async def test_an_actor_that_died_while_starting_does_not_look_like_a_slow_one() -> None:
    pool = judges([], [], dying(RayActorError())).pool
    with pytest.raises(EngineError, match="reward-0 died .* into its start"):
        await pool.start(lambda handle: handle.remote()[0], deadline_s=300)


# ---- what is told -------------------------------------------------------------------------------------------------


@dataclass
class Logged:
    rows: list[Mapping[str, float]] = field(default_factory=list)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        self.rows.append(metrics)


def test_lost_actors_and_judge_failures_are_on_the_curves() -> None:
    said = io.StringIO()
    tracker: Any = Logged()
    pools: Any = [SimpleNamespace(role="rollout", num_alive=3), SimpleNamespace(role="rewards", num_alive=0)]
    observer = Observer(tracker=tracker, progress=Progress(stream=said), num_steps=9, pools=pools)
    stats = GroupStats(
        num_dialogues=2, num_turns=2, rewards={}, num_response_tokens=9, num_parsable=2, num_correct=0,
        failures={"judge": 2}, failure="judge: unreadable (and 1 more)", judge_counts={"asked": 5, "ties": 0},
    )  # fmt: skip
    version = WeightVersion(0, 0)
    group = SimpleNamespace(stats=stats, oldest_version=version)
    snapshot: Any = SimpleNamespace(metrics=SimpleNamespace(values={}))
    window: Any = SimpleNamespace(ready=0, waiting=0, overtaken=0, bound=1, ready_s=0.0, take_s=0.0)
    for step in range(2):
        observer.step(step, groups=[group, group], consumed_by=version, snapshot=snapshot, window=window)
    row = tracker.rows[0]
    assert (row["actors/rollout"], row["actors/rewards"]) == (3, 0)
    assert (row["failures/judge"], row["judge/asked"], row["judge/ties"]) == (4, 10, 0)
    assert said.getvalue().count("judge: unreadable (and 1 more)") == 1
