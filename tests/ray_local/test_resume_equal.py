"""A run resumed at staleness 0 has the weights of one that was not interrupted, bit for bit. So has a replay.

Bit for bit, in float32, where nothing is computed together that came at another time: one request at a time in the
engine, one sound in every forward of an encoder. What a run reuses from its spool the ranks encode by themselves: with
four sounds in that forward, where the actor had encoded one after the other, weights differed by some 1e-6 after
two steps of 1e-3.
"""

import asyncio
import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.config import RunConfig
from rlaudio.data.run_data import RunData
from rlaudio.errors import SpoolError
from rlaudio.experience.audit import audit
from rlaudio.learner.group import LearnerGroup
from rlaudio.loop import Parts, train
from rlaudio.observe.progress import Progress
from rlaudio.recipes.checkpoints import LEDGER_COPY
from rlaudio.recipes.cluster import actor_environment
from rlaudio.recipes.doctor import trainer_spec
from rlaudio.recipes.replay import batches_to_replay, run_replay
from rlaudio.recipes.restoring import remembering, spool_root, with_spool
from rlaudio.runs import RunFolder, create_run, open_run
from rlaudio.types import PromptRecord, WeightVersion
from rlaudio.weights.object_store import ObjectStoreTransport
from tests.ray_local.equivalence_world import make_config, make_records

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.timeout(3600),
    pytest.mark.soak,  # until it was seen to pass
]

STEPS, SAVED = 4, 2


@dataclass(frozen=True)
class World:
    config: RunConfig
    records: list[PromptRecord]
    rollouts: RolloutPool


@dataclass(frozen=True)
class Life:
    """One process's share of a run: what it told, and the weights that it saved last."""

    told: list[str]
    weights: dict[str, Any]


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Iterator[World]:
    """One rollout actor for all lives: each gives it the weights that it begins with."""
    clips = tmp_path_factory.mktemp("clips")
    config = make_config(tiny_checkpoint, clips)
    config = replace(
        config,
        run=replace(config.run, steps=STEPS, checkpoint_every=SAVED, keep_spool=True),
        algorithm=replace(config.algorithm, group_size=4, groups_per_step=1),
        rollout=replace(config.rollout, start_deadline_s=1200.0),
        rewards=replace(config.rewards, start_deadline_s=1200.0),
        learner=replace(config.learner, start_deadline_s=1200.0),
    )
    one_sound_each = [replace(record, messages=record.messages[:1]) for record in make_records(clips)]
    rollouts = RolloutPool(config, environment=actor_environment())
    asyncio.run(rollouts.start(WeightVersion(0, 0)))
    yield World(config, one_sound_each, rollouts)
    rollouts.pool.stop()


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that nobody interrupted, with checkpoints half way and at its end."""
    folder = create_run(tmp_path_factory.mktemp("runs"), name="whole", seed=0)
    asyncio.run(live(world, folder, resume=False))
    return folder


async def live(world: World, folder: RunFolder, *, resume: bool) -> Life:
    """As `recipes.rl`, from where the run stands to its last step."""
    config, told = world.config, []
    observer: Any = SimpleNamespace(dropped=lambda reason: None, step=lambda step, **_: None)
    with (
        folder,
        remembering(config, data=RunData(world.records, {}), folder=folder, resume=resume, told=told.append) as m,
    ):
        rewards = RewardPool(with_spool(config, folder), environment=actor_environment())
        learner = LearnerGroup(
            trainer_spec(config, m.version), algorithm=config.algorithm, env_vars=actor_environment()
        )
        weights = ObjectStoreTransport(world.rollouts.pool, deadline_s=600.0)
        try:
            await asyncio.gather(rewards.start(), learner.start())
            if m.checkpoint is not None:
                await learner.load(m.checkpoint)
                await weights.broadcast(await learner.snapshot())
            for index, record in enumerate(world.records):
                await world.rollouts.play_greedy(record, index=index, purpose="hear", silence=False)
            parts = Parts(
                prompts=m.prompts,
                ledger=m.ledger,
                rollouts=world.rollouts,
                rewards=rewards,
                learner=learner,
                weights=weights,
                observer=observer,
                version=m.version,
                save=m.saver(learner),
            )
            await train(config.algorithm, parts, first_step=m.step, last_step=STEPS, save_every=SAVED)
        finally:
            rewards.pool.stop()
            await learner.stop()
    return Life(told, weights_of(folder.checkpoints / f"step-{STEPS:06d}"))


def weights_of(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "model").glob("*.safetensors")
    return load_file(path)


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Name -> largest difference, of tensors that are not equal bit for bit."""
    assert one.keys() == other.keys() and all(tensor.dtype == np.float32 for tensor in one.values())
    return {
        name: float(np.abs(tensor - other[name]).max())
        for name, tensor in one.items()
        if tensor.tobytes() != other[name].tobytes()
    }


@pytest.mark.parametrize("ledger", ["of the run that was killed", "of the checkpoint"])
async def test_a_resumed_run_has_the_weights_of_one_that_was_not_interrupted(
    world: World, whole: RunFolder, tmp_path: Path, ledger: str
) -> None:
    """Killed after its last step, before that was saved. Played again, or taken from the spool: nothing differs."""
    cut = tmp_path / "cut-20260101-000000-seed0"
    shutil.copytree(whole.path, cut)
    shutil.rmtree(cut / f"checkpoints/step-{STEPS:06d}")
    if ledger == "of the checkpoint":
        for file in cut.glob("ledger.sqlite*"):
            file.unlink()
    life = await live(world, open_run(cut), resume=True)
    start, end = (
        weights_of(whole.checkpoints / f"step-{SAVED:06d}"),
        weights_of(whole.checkpoints / f"step-{STEPS:06d}"),
    )
    assert len(differing(start, end)) > len(end) / 2, "there was something to learn"
    assert differing(life.weights, end) == {}
    sums = audit(cut / "ledger.sqlite", covered=cut / f"checkpoints/step-{STEPS:06d}" / LEDGER_COPY)
    assert sums.problems == () and (sums.num_lives, sums.num_steps) == (2, STEPS)
    assert sums.num_undone == (STEPS - SAVED if ledger == "of the run that was killed" else 0), life.told


@pytest.mark.parametrize("first_step", [0, SAVED])
async def test_a_replay_ends_with_the_weights_of_its_run(
    world: World, whole: RunFolder, tmp_path: Path, first_step: int
) -> None:
    tracked: list[int] = []
    tracker: Any = SimpleNamespace(log=lambda metrics, step: tracked.append(step))
    with create_run(tmp_path, name="again", seed=0) as folder:
        replayed = await run_replay(
            world.config,
            batches_to_replay(world.config, run=whole, first_step=first_step, last_step=None),
            root=spool_root(world.config, whole),
            run=whole,
            folder=folder,
            tracker=tracker,
            progress=Progress(stream=io.StringIO()),
        )
    assert differing(weights_of(folder.path), weights_of(whole.checkpoints / f"step-{STEPS:06d}")) == {}
    assert (replayed.groups, replayed.diverged, replayed.number) == (STEPS - first_step, [], STEPS)
    assert tracked == list(range(first_step, STEPS))


def test_what_the_spool_lacks_is_not_replayed(world: World, whole: RunFolder, tmp_path: Path) -> None:
    cut = tmp_path / whole.path.name
    shutil.copytree(whole.path, cut)
    run = RunFolder(cut)
    lost = batches_to_replay(world.config, run=run, first_step=0, last_step=None)[1].groups[0]
    assert lost.spooled is not None
    (cut / "spool" / lost.spooled.name).unlink()
    with pytest.raises(SpoolError, match=rf"does not hold group {lost.group} of step 1: .*run.keep_spool=true"):
        batches_to_replay(world.config, run=run, first_step=0, last_step=None)
    later = batches_to_replay(world.config, run=run, first_step=SAVED, last_step=STEPS)
    assert [batch.step for batch in later] == [SAVED, SAVED + 1]
    for first, last in ((0, STEPS + 1), (STEPS, None), (1, 1)):
        with pytest.raises(SpoolError, match="choose others with --from and --to"):
            batches_to_replay(world.config, run=run, first_step=first, last_step=last)
