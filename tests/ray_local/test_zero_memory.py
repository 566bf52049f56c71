"""What two ranks hold: a module divided as it is read, a reference that lies elsewhere, one gradient however packed."""

import dataclasses

import pytest
import ray
import torch

from rlaudio.config import PhaseSettings
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.messages import MinibatchSpec, TrainerSpec
from rlaudio.learner.rank import RankWorker
from tests.ray_local.learner_world import ALGORITHM, LR, MIXES, World
from tests.ray_local.zero_world import (
    NO_REFERENCE,
    PART,
    Change,
    EngineSettings,
    Forget,
    Gradients,
    Load,
    OwnGradients,
    ReferenceSays,
    rebuild,
    two,
)

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.timeout(480)]


@pytest.fixture(scope="module")
def world(learner_world: World) -> World:
    return learner_world


# ---- construction --------------------------------------------------------------------------------------------------


async def test_at_stage_3_no_rank_holds_the_whole_module_while_it_is_read(world: World, ranks: LearnerGroup) -> None:
    """Bytes by torch's own account of its allocator: the frozen encoder, half of the rest, and what is just read.

    The account is of the whole process, and a broadcast's thread lets go of what it sent some tensors later or sooner:
    the least of several loads is what loading itself needs.
    """
    await rebuild(ranks, two(world))
    loads = [await ranks._all("probe", Load(divided=True)) for _ in range(5)]
    loaded = [min(of_rank, key=lambda load: load[0]) for of_rank in zip(*loads, strict=True)]
    plainly = [(await ranks._all("probe", Load(divided=False)))[0] for _ in range(3)]
    assert max(peak for peak, *_ in plainly) >= plainly[0][1], "the measure sees a whole module where there is one"
    for peak, total, apart, largest, _ in loaded:
        assert peak < apart + (total - apart) / 2 + 4 * largest + (64 << 10) < 0.9 * total
    plain = dict(world.family.public_names(world.family.load_module(dtype=torch.float32)))
    for name, tensor in plain.items():
        first, second = (rank[4][name] for rank in loaded)
        if world.family.frozen(name):
            assert torch.equal(first, tensor) and torch.equal(second, tensor), name
        else:
            assert first.numel() == second.numel() == -(-tensor.numel() // 2), name
            assert torch.equal(torch.cat([first, second])[: tensor.numel()], tensor.detach().flatten()), name


async def test_a_phase_without_sound_is_trained_at_stage_3_and_the_next_goes_on(
    world: World, ranks: LearnerGroup
) -> None:
    """Pseudo-audio asks for the decoder's width before anything is gathered; then the encoder is divided, then not."""
    phases = [
        PhaseSettings(name="pseudo", steps=1, lr=LR, warmup_steps=0, pseudo_audio=True),
        PhaseSettings(name="joint", steps=1, lr=LR, warmup_steps=0, ctc_weight=0.3, train_encoder=True),
        PhaseSettings(name="cold", steps=1, lr=LR, warmup_steps=0),
    ]
    batches = world.experience(groups=2)
    alone = RankWorker(world.spec())
    expected = [alone.supervised_step(batches, phase).values for phase in phases]
    await rebuild(ranks, two(world, zero_stage=3))
    refs = [ray.put(batch) for batch in batches]
    for phase, values in zip(phases, expected, strict=True):
        found = (await ranks.supervised_step(refs, phase)).values
        for name in ("loss", "grad_norm"):
            assert found[name] == pytest.approx(values[name], rel=2e-4), (phase.name, name)


# ---- reference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 3])
async def test_the_reference_says_the_same_wherever_it_lies(world: World, ranks: LearnerGroup, stage: int) -> None:
    await rebuild(ranks, two(world, zero_stage=stage))
    ranks._algorithm = ALGORITHM
    refs = [ray.put(batch) for batch in world.experience()]
    total = sum(
        tensor.numel() for _, tensor in world.family.public_names(world.family.load_module(dtype=torch.float32))
    )
    said, held = {}, {}
    for kind in ("whole", "sharded", "offload", ""):
        await ranks._all("probe", Change({"reference": kind}))
        for _ in range(2):  # the second time DeepSpeed knows in which order layers come
            await ranks.prepare(refs)
        answers = await ranks._all("probe", ReferenceSays())
        said[kind] = [answer[0] for answer in answers]
        held[kind] = answers[0][1]
        frozen = answers[0][2]
        assert (await ranks._all("probe", EngineSettings()))[0][2] is (kind == "offload")
    ranks._algorithm = NO_REFERENCE
    assert held["whole"] == total - frozen and frozen > 0, "no second copy of the frozen encoder"
    assert held["sharded"] == held["offload"] < 0.51 * held["whole"]
    assert held[""] == held["sharded" if stage == 3 else "whole"]
    for kind, ranks_said in said.items():
        for one, other in zip(ranks_said, said["whole"], strict=True):
            assert len(one) == len(other) > 0
            for found, expected in zip(one, other, strict=True):
                assert found.abs().min() > 0
                assert torch.equal(found, expected), kind


# ---- gradients -----------------------------------------------------------------------------------------------------


async def test_two_ranks_have_the_gradient_of_one_however_rows_are_packed(world: World, ranks: LearnerGroup) -> None:
    batches = world.experience(groups=4, seed=7)
    alone = RankWorker(world.spec(micro_batch_tokens=100_000))
    alone.prepare(batches, NO_REFERENCE)
    alone.forward_backward(PART)
    expected = Gradients().run(alone)
    assert sum(float(gradient.square().sum()) for gradient in expected.values()) > 1e-2
    await rebuild(ranks, two(world))
    ranks._algorithm = NO_REFERENCE
    refs = [ray.put(batch) for batch in batches]
    shapes = set()
    for budget in (1, 150, 260, 100_000):
        await ranks._all("probe", Change({"micro_batch_tokens": budget}))
        prepared = await ranks.prepare(refs)
        await ranks.forward_backward(PART)
        for found in await ranks._all("probe", Gradients()):
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=f"{budget} {name}")
        shapes.add(prepared.num_cells)
        await ranks._all("probe", Forget())
    assert len(shapes) >= 3, "budgets pack otherwise"


async def test_with_minibatches_each_step_has_the_gradient_of_its_own_tokens(world: World, ranks: LearnerGroup) -> None:
    """The second minibatch is normalised by itself, on two ranks as on one."""
    algorithm = dataclasses.replace(NO_REFERENCE, minibatches=2)
    batches = world.experience(groups=4, seed=8)
    alone = RankWorker(world.spec())
    alone.prepare(batches, algorithm)
    await rebuild(ranks, two(world))
    ranks._algorithm = algorithm
    await ranks.prepare([ray.put(batch) for batch in batches])
    for index in range(2):
        part = MinibatchSpec(epoch=0, index=index)
        alone.forward_backward(part)
        await ranks.forward_backward(part)
        found = (await ranks._all("probe", Gradients()))[0]
        for name, gradient in Gradients().run(alone).items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=f"{index} {name}")
        alone.optimizer_step(snapshot=False)
        await ranks.optimizer_step()
    ranks._algorithm = NO_REFERENCE


@pytest.mark.parametrize(("stage", "offload"), [(1, "none"), (2, "none"), (2, "cpu"), (3, "none")])
async def test_bfloat16_gradients_add_up_in_float32(
    world: World, ranks: LearnerGroup, stage: int, offload: str
) -> None:
    """Two ranks with two micro-batches each have the sum of one rank with four, to float32's rounding.

    Each micro-batch's gradient is of bfloat16 and the same on both sides (nobody hears: what is encoded together would
    show in it); bfloat16's rounding of a sum is 4e-3. How a rank's part is divided is DeepSpeed's affair, so values are
    compared in order of size.
    """
    batch = world.mixed(MIXES["nobody hears"])
    settings = {"zero_stage": stage, "offload_optimizer": offload, "micro_batch_tokens": 1}
    alone = RankWorker(in_bfloat16(world.spec(**settings)))
    alone.prepare([batch], NO_REFERENCE)
    alone.forward_backward(PART)
    expected = torch.cat(OwnGradients().run(alone))
    more = expected[expected != 0]
    assert (more.bfloat16().float() != more).float().mean() > 0.5, "else a bfloat16 sum would do"
    await rebuild(ranks, in_bfloat16(two(world, **settings)))
    ranks._algorithm = NO_REFERENCE
    refs = [ray.put(batch)]
    for _ in range(2):  # the second time what was forgotten does not come back
        await ranks.prepare(refs)
        await ranks.forward_backward(PART)
        found = torch.cat([piece for pieces in await ranks._all("probe", OwnGradients()) for piece in pieces])
        assert found.dtype == expected.dtype == torch.float32
        num = max(len(found), len(expected))  # parts are filled up with zeros
        ordered = [torch.nn.functional.pad(one, (0, num - len(one))).sort().values for one in (found, expected)]
        torch.testing.assert_close(*ordered, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        await ranks._all("probe", Forget())


def in_bfloat16(spec: TrainerSpec) -> TrainerSpec:
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, dtype="bfloat16"))
