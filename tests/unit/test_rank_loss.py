"""Ranks that are lost at any moment: every group is trained once, on weights that its tokens came from."""

import asyncio
import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from rlaudio.config import AlgorithmSettings, LearnerSettings, RunConfig, RunSettings, SupervisionSettings
from rlaudio.config_checks import learner_problems
from rlaudio.data.run_data import RunData
from rlaudio.errors import LearnerError, RanksLostError, SpoolError, WeightSyncError
from rlaudio.experience.audit import LedgerSums
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.messages import TrainerSpec
from rlaudio.loop import Parts
from rlaudio.observe.progress import Progress
from rlaudio.recipes import training
from rlaudio.recipes.restoring import Memory, remembering
from rlaudio.recipes.training import train_through_losses
from rlaudio.runs import create_run
from rlaudio.types import Message, PromptRecord, TextPart, WeightVersion

RECORDS = [PromptRecord(f"r{i}", "t", (Message("user", (TextPart("hi"),)),)) for i in range(7)]
STEPS, PER_STEP, EVERY = 12, 2, 3
QUICKLY = SupervisionSettings(first_pause_s=0.0, longest_pause_s=0.0)


@dataclass
class World:
    """Engines, judges, learner, transport and observer; the weights are the list of batches that they have seen.

    Args:
        rng: decides how long things take.
        fatal: how many of the learner's calls go well before a rank dies, again and again.
    """

    rng: random.Random
    fatal: list[int]
    memory: Memory | None = None
    engines: WeightVersion = field(default_factory=lambda: WeightVersion(0, 0))
    version: WeightVersion = field(default_factory=lambda: WeightVersion(0, 0))
    seen: list[list[int]] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    lost: str = ""
    calls: int = 0
    restarts: int = 0
    stops_s: list[float] = field(default_factory=list)
    restarts_s: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    steps_done: int = 0
    exported: list[str] = field(default_factory=list)
    played: set[int] = field(default_factory=set)  # in the present life
    kept: set[int] = field(default_factory=set)  # what the weights had seen when it began
    sends_well: int = 10_000  # a rank dies in the broadcast after so many, and nobody else hears of it
    sync_error: WeightSyncError | None = None
    dies_idle: bool = False  # once, with all engines, while the learner waits for the first batch
    is_busy: bool = False

    async def _work(self, what: str) -> None:
        await asyncio.sleep(self.rng.choice([0.0, 0.0, 0.001]))
        self.calls += 1
        if not self.lost and self.fatal and self.calls > self.fatal[0]:
            self.fatal.pop(0)
            self.calls, self.lost = 0, f"learner rank 1 died in {what}"
        if self.lost:
            raise RanksLostError(self.lost)

    # ---- engines and judges --------------------------------------------------------------------------------------

    async def play(self, record: PromptRecord, *, group: int) -> Any:
        oldest = self.engines
        self.played.add(group)
        if self.dies_idle:
            self.lost = "learner rank 1 died"
            await asyncio.Event().wait()  # engines that come find nobody who has weights for them
        await asyncio.sleep(self.rng.choice([0.0, 0.001]))
        versions = (oldest, self.engines)
        return SimpleNamespace(
            has_signal=True, ref=(group, versions), states=None, oldest_version=oldest, versions=versions, spooled=None
        )

    async def judge(self, played: Any) -> Any:
        return played

    async def recall(self, issue: Any) -> Any:
        raise SpoolError("nothing is spooled")

    async def broadcast(self, snapshot: Any) -> None:
        await asyncio.sleep(self.rng.choice([0.0, 0.001]))
        self.sends_well -= 1
        if self.lost or self.sync_error or self.sends_well == 0:
            raise self.sync_error or WeightSyncError("a rank did not send")
        self.engines = snapshot.version

    # ---- learner -------------------------------------------------------------------------------------------------

    async def prepare(self, refs: Sequence[Any], states: Sequence[Any]) -> None:
        assert self.memory is not None
        for _, versions in refs:
            for version in versions:
                assert self.memory.ledger.lineage.is_ancestor(version, of=self.version), (version, self.version)
        self.batch = [group for group, _ in refs]
        await self._work("prepare")

    def minibatches(self, prepared: None) -> list[int]:
        return [0]

    async def forward_backward(self, part: int) -> None:
        await self._work("forward_backward")

    async def optimizer_step(self) -> Any:
        await self._work("optimizer_step")
        self.seen.append(self.batch)
        self.version = replace(self.version, number=self.version.number + 1)
        return SimpleNamespace(version=self.version)

    async def snapshot(self) -> Any:
        await self._work("snapshot")
        return SimpleNamespace(version=self.version)

    async def save(self, path: Path) -> WeightVersion:
        await self._work("save")
        (path / "seen.json").write_text(json.dumps(self.seen))
        return self.version

    async def load(self, path: Path) -> None:
        await self._work("load")
        self.seen = json.loads((path / "seen.json").read_text())
        self.version = replace(self.version, number=len(self.seen))
        self.kept = {group for batch in self.seen for group in batch}

    async def export(self, path: Path) -> None:
        await self._work("export")
        self.exported.append(path.name)

    async def find_lost(self) -> str:
        return self.lost or "learner rank 1 died, sending" * (self.sends_well == 0)

    async def stop(self) -> None:
        self.stops_s.append(asyncio.get_running_loop().time())

    async def restart(self, version: WeightVersion, *, least_ranks: int) -> None:
        self.restarts += 1
        self.restarts_s.append(asyncio.get_running_loop().time())
        self.lost, self.seen, self.version, self.dies_idle = "", [], version, False
        self.played, self.kept, self.sends_well = set(), set(), 10_000
        await self._work("start")

    # ---- observer ------------------------------------------------------------------------------------------------

    def dropped(self, reason: str) -> None: ...

    def step(self, step: int, **_: object) -> None:
        self.steps.append(step)
        self.steps_done = step + 1

    def went_back(self, step: int) -> None:
        assert step % EVERY == 0
        del self.steps[self.steps.index(step) if step in self.steps else len(self.steps) :]
        self.steps_done = step


def train_world(
    world: World,
    root: Path,
    *,
    max_restarts: int = 3,
    said: io.StringIO | None = None,
    supervision: SupervisionSettings = QUICKLY,
) -> LedgerSums:
    config = RunConfig(
        run=RunSettings(root=str(root), steps=STEPS, checkpoint_every=EVERY),
        algorithm=AlgorithmSettings(groups_per_step=PER_STEP, max_staleness=1, look_ahead=1),
        learner=LearnerSettings(max_restarts=max_restarts),
        supervision=supervision,
    )
    here: Any = world
    progress = Progress(stream=said or io.StringIO())

    async def run() -> LedgerSums:
        folder = create_run(str(root), name="lost", seed=0)
        data = RunData(RECORDS, {})
        with (
            folder,
            remembering(config, data=data, folder=folder, resume=False, told=progress.say) as world.memory,
        ):
            assert world.memory is not None
            parts = Parts(
                prompts=world.memory.prompts,
                ledger=world.memory.ledger,
                rollouts=here,
                rewards=here,
                learner=here,
                weights=here,
                observer=here,
                version=world.version,
                save=world.memory.saver(here),
            )
            try:
                await train_through_losses(
                    config, parts, world.memory, folder=folder, progress=progress, went_back=world.went_back
                )
            finally:
                sums = world.memory.ledger.sums()
            return sums

    return asyncio.run(run())


@pytest.mark.parametrize("seed", range(12))
def test_whenever_ranks_are_lost_each_group_is_trained_once(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    # A checkpoint comes every ten calls or so: some losses find a new one, some do not, some come while ranks start.
    world = World(rng, fatal=[rng.randrange(0, 25) for _ in range(rng.randint(1, 6))])
    sums = train_world(world, tmp_path, max_restarts=6)
    groups = [group for batch in world.seen for group in batch]
    assert len(groups) == len(set(groups)) == STEPS * PER_STEP == sums.durable
    assert sums.problems == () and sums.num_lives == world.restarts + 1 and world.restarts >= 1
    assert world.kept | world.played == set(range(max(world.played) + 1)), (
        "what came back was played before what is new"
    )
    assert world.steps == list(range(STEPS)) and world.exported == ["model"]
    assert world.version == world.engines == WeightVersion(world.restarts, STEPS)


def test_losses_without_a_new_checkpoint_end_the_run(tmp_path: Path) -> None:
    world = World(random.Random(0), fatal=[2] * 20)
    with pytest.raises(RanksLostError, match=r"rank 1 died .*started again 2 times .*max_restarts.*--resume"):
        train_world(world, tmp_path, max_restarts=2)
    assert world.restarts == 2 and world.exported == []


def test_losses_with_new_checkpoints_in_between_do_not(tmp_path: Path) -> None:
    """Each life takes the steps to its next checkpoint, and not many more."""
    world = World(random.Random(0), fatal=[15, 15, 15])
    sums = train_world(world, tmp_path, max_restarts=1)
    assert world.restarts == 3 and sums.problems == ()


def test_the_pause_before_ranks_start_again_doubles_until_there_is_a_new_checkpoint(tmp_path: Path) -> None:
    said = io.StringIO()
    world = World(random.Random(0), fatal=[2, 2, 2, 30])
    patient = SupervisionSettings(first_pause_s=0.1, longest_pause_s=0.2)
    sums = train_world(world, tmp_path, max_restarts=3, said=said, supervision=patient)
    # The ranks end at once, and nobody comes back sooner: half of a pause is left to chance.
    pauses_s = [restart_s - stop_s for stop_s, restart_s in zip(world.stops_s, world.restarts_s, strict=True)]
    assert [pause_s >= least_s for pause_s, least_s in zip(pauses_s, (0.05, 0.1, 0.1, 0.05), strict=True)] == [True] * 4
    told_s = [float(pause) for pause in re.findall(r"the ranks start again in (\d+\.\d) s", said.getvalue())]
    assert len(told_s) == 4 and told_s[3] <= 0.1 <= told_s[1] <= 0.2, "the last one follows a new checkpoint"
    assert re.findall(r"(\d) of 3 times without", said.getvalue()) == ["1", "2", "3", "1"]
    assert sums.problems == () and sums.durable == STEPS * PER_STEP


def test_none_are_started_again_where_none_shall_be(tmp_path: Path) -> None:
    world = World(random.Random(0), fatal=[15])
    with pytest.raises(RanksLostError, match="rank 1 died"):
        train_world(world, tmp_path, max_restarts=0)
    assert world.restarts == 0


def test_a_rank_that_dies_while_it_sends_weights_is_a_lost_rank(tmp_path: Path) -> None:
    said = io.StringIO()
    world = World(random.Random(0), fatal=[], sends_well=6)
    sums = train_world(world, tmp_path, said=said)
    assert world.restarts == 1 and sums.problems == () and sums.durable == STEPS * PER_STEP
    assert "rank 1 died, sending; training ended by WeightSyncError" in said.getvalue()


def test_a_rank_that_dies_while_it_waits_is_found_though_nothing_is_asked_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOOK_EVERY_S", 0.01)
    said = io.StringIO()
    world = World(random.Random(0), fatal=[], dies_idle=True)
    sums = train_world(world, tmp_path, said=said)
    assert world.restarts == 1 and sums.problems == () and sums.durable == STEPS * PER_STEP
    assert "learner rank 1 died, waiting for a batch" in said.getvalue()


def test_weights_that_do_not_come_for_another_reason_end_the_run(tmp_path: Path) -> None:
    world = World(random.Random(0), fatal=[], sync_error=WeightSyncError("reached no engine"))
    with pytest.raises(WeightSyncError, match="reached no engine"):
        train_world(world, tmp_path)
    assert world.restarts == 0


class Roomy(LearnerGroup):
    """A group on a cluster that has room for so many ranks."""

    room = 4

    def __init__(self, ranks: int) -> None:
        spec = TrainerSpec(model=RunConfig().model, clips_root="", learner=LearnerSettings(ranks=ranks))
        super().__init__(spec)
        self.started: list[int] = []

    async def start(self) -> None:
        self.started.append(self.num_ranks)
        if self.num_ranks > self.room:
            raise RanksLostError("did not finish open_store", silent=range(self.room, self.num_ranks))


@pytest.mark.parametrize(
    ("room", "least", "started"),
    [(4, 4, [4]), (3, 1, [4, 3]), (1, 1, [4, 1]), (2, 3, None), (3, 4, None), (0, 1, None)],
)
def test_as_many_ranks_go_on_as_there_is_room_for(room: int, least: int, started: list[int] | None) -> None:
    group = Roomy(4)
    group.room = room
    if started is None:
        with pytest.raises(RanksLostError):
            asyncio.run(group.restart(WeightVersion(1, 0), least_ranks=least))
        assert group.started == [4]
    else:
        asyncio.run(group.restart(WeightVersion(1, 0), least_ranks=least))
        assert group.started == started and group.num_ranks == started[-1]


def test_more_than_all_ranks_cannot_be_the_least() -> None:
    [problem] = learner_problems(LearnerSettings(ranks=2, least_ranks=3), dtype="float32")
    assert "learner.least_ranks is 3 and learner.ranks 2" in problem


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("prepare", "Traceback ...", cause)


@pytest.mark.parametrize(
    ("errors", "may_start_again"),
    [
        ({1: RayActorError()}, True),
        ({0: task_error(RuntimeError("Connection closed by peer")), 1: RayActorError()}, True),
        ({0: task_error(RuntimeError("Connection closed by peer"))}, True),
        ({0: task_error(OSError("the disk is gone"))}, True),
        ({0: task_error(ObjectLostError("ab", None, ""))}, True),  # the rows lay on a node that died
        ({0: task_error(IndexError("index out of range"))}, False),
        ({0: task_error(torch.OutOfMemoryError("CUDA out of memory"))}, False),
    ],
    ids=str,
)
def test_a_bug_is_met_once_and_a_loss_is_tried_again(errors: dict[int, Exception], may_start_again: bool) -> None:
    failure = Roomy(2)._failure("prepare", errors)
    assert isinstance(failure, LearnerError) and isinstance(failure, RanksLostError) == may_start_again
