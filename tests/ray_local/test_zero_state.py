"""A bad batch, a restart and offloading leave two ranks where they would be, bit for bit, at every ZeRO stage."""

from pathlib import Path

import pytest
import ray
import torch

from rlaudio.errors import CheckpointError, DataError, DivergenceError, LearnerError
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.rank import RankWorker
from tests.ray_local.learner_world import World, assert_same_weights
from tests.ray_local.zero_world import (
    NO_REFERENCE,
    PART,
    Digest,
    EngineSettings,
    Overflow,
    planned,
    rebuild,
    step,
    two,
    with_nan,
)

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def world(learner_world: World) -> World:
    return learner_world


async def diverge(ranks: LearnerGroup, world: World, *, seed: int) -> None:
    """Twice, in the second rank alone: a loss that is not a number, then a gradient that overflows though it is one."""
    batches = world.experience(seed=seed)
    share = planned(batches)[1].steps[0][1]
    row = next(index for packed in share if not packed.dummy for index in packed.rows)
    with pytest.raises(DivergenceError, match="loss is nan"):
        await step(ranks, [ray.put(batch) for batch in with_nan(world, batches, row=row)])
    with pytest.raises(LearnerError, match="forward_backward"):
        await ranks.optimizer_step()
    await ranks._all("probe", Overflow(rank=1, on=True))
    await ranks.prepare([ray.put(batch) for batch in batches])
    await ranks.forward_backward(PART)
    with pytest.raises(DivergenceError, match="gradient norm is"):
        await ranks.optimizer_step()
    await ranks._all("probe", Overflow(rank=1, on=False))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
async def test_diverging_resuming_and_offloading_change_no_bit(
    world: World, ranks: LearnerGroup, tmp_path: Path, stage: int
) -> None:
    """step, save, diverge twice, step == load, step; the same once more with what can be offloaded in main memory."""
    ranks._algorithm = NO_REFERENCE
    first, second, third = ([ray.put(batch) for batch in world.experience(seed=seed)] for seed in (1, 2, 3))
    await rebuild(ranks, two(world, zero_stage=stage))
    await step(ranks, first)
    await ranks.save(tmp_path / "there")
    before = await ranks._all("probe", Digest())
    assert await ranks._all("probe", EngineSettings()) == [(False, False, False)] * 2
    check_shards(tmp_path / "there" / "engine", stage=stage)
    check_moments(world, [moments for _, moments in before], stage=stage)

    await diverge(ranks, world, seed=3)
    assert await ranks._all("probe", Digest()) == before
    metrics, expected = await step(ranks, second)
    after = await ranks._all("probe", Digest())
    assert [crc for crc, _ in after] != [crc for crc, _ in before]

    await rebuild(ranks, two(world, zero_stage=stage))
    await ranks.load(tmp_path / "there")
    assert await ranks._all("probe", Digest()) == before
    # Which clips are encoded together shows in the last bits of their states: the same ones in the same order.
    await ranks.prepare(first)
    await ranks.prepare(third)
    again, found = await step(ranks, second)
    assert found.checksums == expected.checksums
    assert (again.version, again.values["grad_norm"]) == (metrics.version, metrics.values["grad_norm"])
    assert await ranks._all("probe", Digest()) == after

    if stage > 0:
        parameters = "cpu" if stage == 3 else "none"
        await rebuild(ranks, two(world, zero_stage=stage, offload_optimizer="cpu", offload_parameters=parameters))
        await ranks.load(tmp_path / "there")
        assert await ranks._all("probe", EngineSettings()) == [(True, stage == 3, False)] * 2
        await ranks.prepare(third)
        offloaded, undisturbed = await step(ranks, second)
        assert offloaded.values["grad_norm"] == pytest.approx(metrics.values["grad_norm"], rel=1e-5)
        # Not to the bit: offloading, DeepSpeed reduces each micro-batch by itself and adds up after that.
        assert_same_weights(undisturbed, expected)
        await ranks.load(tmp_path / "there")
        await diverge(ranks, world, seed=3)
        _, found = await step(ranks, second)
        assert found.checksums == undisturbed.checksums


def check_shards(folder: Path, *, stage: int) -> None:
    """Every rank writes its own optimizer states; only stage 0 has the same ones everywhere, and writes them once."""
    sizes = sorted(file.stat().st_size for file in folder.glob("*optim_states.pt"))
    if stage == 0:
        assert sizes == [] and [file.name for file in folder.iterdir()] == ["mp_rank_00_model_states.pt"]
    else:
        assert len(sizes) == 2 and sizes[1] < 1.1 * sizes[0]


def check_moments(world: World, moments: list[int], *, stage: int) -> None:
    """Adam remembers what is trained, divided from stage 1 on; nothing of the frozen encoder."""
    module = world.family.load_module(dtype=torch.float32)
    trained = sum(tensor.numel() for name, tensor in world.family.public_names(module) if not world.family.frozen(name))
    if stage == 0:
        assert moments == [trained, trained]
    else:
        assert trained <= sum(moments) < 1.01 * trained and moments[0] == moments[1]


async def test_a_checkpoint_of_another_stage_is_refused_with_the_way_out(
    world: World, ranks: LearnerGroup, tmp_path: Path
) -> None:
    await rebuild(ranks, two(world, zero_stage=2))
    await ranks.save(tmp_path / "there")
    way_out = r"ZeRO stage 2.*stage 1.*learner\.zero_stage=2.*model\.path=.*there/model"
    with pytest.raises(CheckpointError, match=way_out):
        RankWorker(world.spec(zero_stage=1)).load(tmp_path / "there")


# ---- last: it leaves a rank dead -------------------------------------------------------------------------------------


async def test_a_fault_names_rank_and_call(world: World, ranks: LearnerGroup, tmp_path: Path) -> None:
    await rebuild(ranks, two(world, zero_stage=3))
    refs = [ray.put(batch) for batch in world.experience(groups=2)]
    # An error of the data, or of the disk on one rank, leaves the group usable; a stuck or dead rank does not.
    with pytest.raises(DataError, match="arrived twice"):
        await ranks.prepare([refs[0], refs[0]])
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file"):
        await ranks.export(tmp_path / "file")
    await ranks.prepare(refs)
    # The first rank alone goes on: what a collective too many looks like.
    stuck = ranks._actors[0].forward_backward.remote(PART)
    with pytest.raises(LearnerError, match=r"rank 0 did not finish forward_backward within 1 s"):
        await ranks._gather("forward_backward", [stuck, ray.put(None)], deadline_s=1.0)
    with pytest.raises(LearnerError, match="broken"):
        await ranks.snapshot()
    ranks._failed = None
    ray.kill(ranks._actors[1])
    with pytest.raises(LearnerError, match=r"rank 1.* died in export"):
        await ranks.export(tmp_path / "never")
