"""A checkpoint goes on with another number of ranks: nothing is lost on the way, and the next step is the same."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from rlaudio.learner import optimization
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.rank import RankWorker
from rlaudio.learner.sharding import own_share, put_share
from rlaudio.learner.universal import read_for_other_ranks
from tests.ray_local.learner_world import World, assert_same_weights, take_step
from tests.ray_local.zero_world import NO_REFERENCE, Digest, rebuild, step, two

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def world(learner_world: World) -> World:
    return learner_world


@pytest.mark.parametrize("stage", [1, 3])
async def test_two_ranks_one_rank_two_ranks(world: World, ranks: LearnerGroup, tmp_path: Path, stage: int) -> None:
    """Two ranks step three times; and once, then one rank steps, then two again: the same weights at each step."""
    ranks._algorithm = NO_REFERENCE
    first, second, third = (world.experience(seed=seed) for seed in (1, 2, 3))
    await rebuild(ranks, two(world, zero_stage=stage))
    await step(ranks, [ray.put(batch) for batch in first])
    await ranks.save(tmp_path / "of two")
    saved = await ranks._all("probe", Digest())
    _, expected = await step(ranks, [ray.put(batch) for batch in second])
    later_metrics, later = await step(ranks, [ray.put(batch) for batch in third])

    one = RankWorker(world.spec(zero_stage=stage, micro_batch_tokens=1))
    restored = one.load(tmp_path / "of two")
    assert restored.version.number == 1
    one.save(tmp_path / "of one, at once")
    found = take_step(one, second, NO_REFERENCE)
    assert_same_weights(found, expected)
    one.save(tmp_path / "of one")

    # Dealt out twice and not trained in between: every weight and moment of each rank is the one that it saved.
    await rebuild(ranks, two(world, zero_stage=stage))
    await ranks.load(tmp_path / "of one, at once")
    assert await ranks._all("probe", Digest()) == saved

    await rebuild(ranks, two(world, zero_stage=stage))
    await ranks.load(tmp_path / "of one")
    again, found = await step(ranks, [ray.put(batch) for batch in third])
    assert_same_weights(found, later, num_steps=2)
    assert again.version == later_metrics.version
    assert again.values["grad_norm"] == pytest.approx(later_metrics.values["grad_norm"], rel=1e-3)
    assert sorted(os.listdir(tmp_path)) == ["of one", "of one, at once", "of two"]


def of_small_pieces(patched: pytest.MonkeyPatch) -> None:
    """At stage 3 DeepSpeed divides a billion weights and more into sub-groups; here a few hundred."""
    settings: Callable[..., dict[str, object]] = optimization._zero_settings
    patched.setattr(optimization, "_zero_settings", lambda *a, **k: settings(*a, **k) | {"sub_group_size": 5000})


def move(worker: RankWorker) -> None:
    """Weights that are not those of the checkpoint it began with, in what is frozen too."""
    for _, parameter in worker.trainer.parameters:
        put_share(parameter, own_share(parameter) * 1.01)


@pytest.mark.parametrize(
    "changes",
    [
        {"zero_stage": 1, "offload_optimizer": "cpu"},
        {"zero_stage": 2},
        {"zero_stage": 3},
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    ],
    ids=str,
)
def test_what_is_dealt_anew_is_what_was_saved(
    world: World, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage, in a folder that no pattern is safe with; read as if by others, by as many ranks: bit for bit."""
    of_small_pieces(monkeypatch)
    first, second = (world.experience(seed=seed) for seed in (1, 2))
    spec = world.spec(**changes)
    path = tmp_path / "run [1] (+)" / "there"
    path.parent.mkdir()
    writer = RankWorker(spec)
    move(writer)
    take_step(writer, first, NO_REFERENCE)
    writer.save(path)
    saved = Digest().run(writer)
    expected = take_step(writer, second, NO_REFERENCE)

    reader = RankWorker(spec)
    reader.trainer.ensure_engine(None)
    engine = reader.trainer._live_engine()
    read_for_other_ranks(engine, reader.trainer.parameters, path, rank=0, step_index=1)
    assert Digest().run(reader) == saved
    counters = [state["step"] for state in engine.optimizer.optimizer.state.values()]
    assert len({counter.data_ptr() for counter in counters}) == len(counters) and all(one == 1 for one in counters)
    assert take_step(reader, second, NO_REFERENCE).tensors.keys() == expected.tensors.keys()
    assert Digest().run(reader)[0] == Digest().run(writer)[0]
    reader.load(path)  # as the one that wrote it
    assert Digest().run(reader) == saved


@pytest.mark.parametrize("stage", [1, 3])
def test_before_the_first_step_there_are_weights_alone(world: World, tmp_path: Path, stage: int) -> None:
    spec, first = world.spec(zero_stage=stage), world.experience(seed=1)
    writer = RankWorker(spec)
    move(writer)
    writer.save(tmp_path / "there")
    reader = RankWorker(spec)
    reader.trainer.ensure_engine(None)
    read_for_other_ranks(
        reader.trainer._live_engine(), reader.trainer.parameters, tmp_path / "there", rank=0, step_index=0
    )
    take_step(writer, first, NO_REFERENCE)
    take_step(reader, first, NO_REFERENCE)
    assert Digest().run(reader) == Digest().run(writer)
