"""The learner with its real parts: Step-Audio module, DeepSpeed, gloo, Ray actors."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from rlaudio.audio.store import ClipStore
from rlaudio.config import PhaseSettings
from rlaudio.errors import CheckpointError, DivergenceError, LearnerError
from rlaudio.experience.schema import EXPERIENCE
from rlaudio.learner.batch import RowTerms, collate, read_rows, response_logprobs
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.messages import MinibatchSpec
from rlaudio.learner.rank import RankWorker
from rlaudio.models.step_audio import StepAudio
from rlaudio.types import WeightVersion
from tests.ray_local.learner_world import ALGORITHM, World, take_step

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture
def world(learner_world: World) -> World:
    return learner_world


def module_of(worker: RankWorker) -> Any:  # the concrete torch module behind the protocol
    return worker.trainer.policy


# ---- one rank, in this process -------------------------------------------------------------------------------------


def test_the_loss_covers_exactly_the_sampled_tokens_of_the_real_module(world: World) -> None:
    policy: Any = world.family.load_module(dtype=torch.float32)
    rows = read_rows(world.experience())
    batch = collate(
        rows, [RowTerms(weight=1.0)] * len(rows), pad=world.family.tokenizer.ids.pad, device=torch.device("cpu")
    )
    clips = ClipStore(str(world.clips_root))
    with torch.no_grad():
        mels = {name: world.family.mel(clips.get(name).samples) for name in set(batch.clips)}
        audio = policy.adapt(policy.encode([mels[name] for name in batch.clips]))
        hidden = policy.decode(batch.input_ids, rows=audio, spans=batch.spans)
    hidden.requires_grad_()
    logprobs, _ = response_logprobs(policy, hidden, positions=batch.positions, targets=batch.targets)
    logprobs.sum().backward()
    touched = hidden.grad.abs().sum(-1) > 0

    offset = 0
    for line, row in enumerate(rows):
        first, last = len(row.prompt_ids) - 1, row.num_tokens - 2
        assert touched[line].nonzero()[:, 0].tolist() == list(range(first, last + 1))
        # Alone and unpadded, by plain indexing: what an engine computed while it sampled.
        ids = torch.tensor([[*row.prompt_ids, *row.response_ids]], dtype=torch.int64)
        with torch.no_grad():
            states = policy.encode([mels[clip.sha256] for clip in row.clips])
            spans = [(0, clip.start, clip.end) for clip in row.clips]
            alone = policy.logits(policy(ids, states=states, spans=spans))[0].log_softmax(-1)
        expected = [alone[place - 1, ids[0, place]] for place in range(len(row.prompt_ids), row.num_tokens)]
        count = len(row.response_ids)
        torch.testing.assert_close(logprobs[offset : offset + count], torch.stack(expected), atol=1e-5, rtol=0)
        offset += count


def gradients(world: World, **changes: Any) -> dict[str, torch.Tensor]:
    worker = RankWorker(world.spec(**changes))
    worker.prepare(world.experience(), ALGORITHM)
    worker.forward_backward(MinibatchSpec(epoch=0, index=0))
    named = module_of(worker).named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def test_packing_changes_no_gradient(world: World) -> None:
    whole, rows_alone = gradients(world, micro_batch_tokens=100_000), gradients(world, micro_batch_tokens=1)
    assert sum(float(gradient.square().sum()) for gradient in whole.values()) > 1e-2
    torch.testing.assert_close(rows_alone, whole, atol=1e-6, rtol=1e-4)


def test_computing_layers_again_changes_no_gradient(world: World) -> None:
    torch.testing.assert_close(gradients(world, gradient_checkpointing=True), gradients(world), atol=0, rtol=0)


def test_minibatches_and_epochs_step_as_often_as_they_say(world: World) -> None:
    worker = RankWorker(world.spec())
    algorithm = dataclasses.replace(ALGORITHM, minibatches=2, epochs=2)
    prepared = worker.prepare(world.experience(), algorithm)
    assert (prepared.num_minibatches, prepared.epochs, prepared.num_rows, prepared.num_dialogues) == (2, 2, 8, 6)
    for part in LearnerGroup(world.spec()).minibatches(prepared):
        worker.forward_backward(part)
        metrics, _ = worker.optimizer_step(snapshot=False)
    assert metrics.version == WeightVersion(1, 4)


def test_a_frozen_encoder_neither_moves_nor_travels(world: World) -> None:
    worker = RankWorker(world.spec())
    before = {name: tensor.clone() for name, tensor in module_of(worker).named_parameters()}
    snapshot = take_step(worker, world.experience())
    moved = {name for name, tensor in module_of(worker).named_parameters() if not torch.equal(tensor, before[name])}
    assert not any(name.startswith("encoder.") for name in moved | snapshot.tensors.keys())
    assert moved == snapshot.tensors.keys()
    assert snapshot.version == WeightVersion(1, 1)


def test_supervised_phases_learn_and_train_what_they_say(world: World) -> None:
    worker = RankWorker(world.spec())
    batches = world.experience(groups=2)
    phases = [
        PhaseSettings(name="pseudo", steps=8, lr=1e-3, warmup_steps=1, pseudo_audio=True),
        PhaseSettings(name="ctc", steps=8, lr=1e-3, warmup_steps=1, lm_weight=0.0, ctc_weight=1.0, train_encoder=True),
        PhaseSettings(name="joint", steps=8, lr=1e-3, warmup_steps=1, ctc_weight=0.3, train_encoder=True),
        PhaseSettings(name="cold", steps=8, lr=1e-3, warmup_steps=1),
    ]
    for phase in phases:
        encoder = module_of(worker).encoder.conv1.weight.detach().clone()
        losses = [worker.supervised_step(batches, phase).values["loss"] for _ in range(phase.steps)]
        assert losses[-1] < 0.9 * losses[0], (phase.name, losses)
        moved = not torch.equal(module_of(worker).encoder.conv1.weight, encoder)
        assert moved is phase.train_encoder, phase.name
    assert worker.trainer.version == WeightVersion(1, 32)


@pytest.mark.parametrize("kind", ["policy", "supervised"])
def test_a_restored_run_goes_on_bit_for_bit(world: World, tmp_path: Path, kind: str) -> None:
    spec = world.spec(warmup_steps=3, decay_steps=9)
    phase = PhaseSettings(name="joint", steps=6, warmup_steps=3, ctc_weight=0.3, train_encoder=True)

    def advance(worker: RankWorker, seed: int) -> None:
        if kind == "policy":
            take_step(worker, world.experience(seed=seed))
        else:
            worker.supervised_step(world.experience(seed=seed), phase)

    uninterrupted = RankWorker(spec)
    for seed in range(2):
        advance(uninterrupted, seed)
    uninterrupted.save(tmp_path / "step2")
    for seed in range(2, 4):
        advance(uninterrupted, seed)

    later = dataclasses.replace(spec, version=WeightVersion(2, 0))
    resumed = RankWorker(later)
    assert resumed.load(tmp_path / "step2").version == WeightVersion(2, 2)
    for seed in range(2, 4):
        advance(resumed, seed)
    expected, found = uninterrupted.snapshot(), resumed.snapshot()
    assert expected is not None and found is not None
    assert found.version == WeightVersion(2, 4)
    assert found.checksums == expected.checksums
    # The exported half of the checkpoint is a policy of its own.
    StepAudio(tmp_path / "step2" / "model").load_module(dtype=torch.float32)
    assert not (tmp_path / "step2.partial").exists()


def test_half_a_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    worker = RankWorker(world.spec())
    with pytest.raises(CheckpointError, match=r"learner\.json"):
        worker.load(tmp_path)
    worker.save(tmp_path / "whole")
    (tmp_path / "whole" / "rank_0.pt").unlink()
    with pytest.raises(CheckpointError, match=r"rank_0\.pt"):
        worker.load(tmp_path / "whole")


def test_divergence_leaves_the_weights_and_the_next_step_alone(world: World) -> None:
    worker = RankWorker(world.spec())
    batches = world.experience()
    logprobs = batches[0]["logprobs"].to_pylist()
    logprobs[0][0] = float("nan")  # the other tokens leave a gradient behind that must be forgotten
    column = batches[0].schema.get_field_index("logprobs")
    values = pa.array(logprobs, pa.large_list(pa.float32()))
    broken = [batches[0].set_column(column, EXPERIENCE.field("logprobs"), values), *batches[1:]]
    with pytest.raises(DivergenceError, match="loss is nan"):
        take_step(worker, broken)
    with pytest.raises(LearnerError, match="forward_backward"):
        worker.optimizer_step()
    after, undisturbed = take_step(worker, world.experience()), take_step(RankWorker(world.spec()), world.experience())
    assert after.checksums == undisturbed.checksums


# ---- several ranks: test_zero.py has the rest -----------------------------------------------------------------------


async def test_a_rank_that_does_not_come_up_in_time_is_named(world: World, ray_session: None) -> None:
    group = LearnerGroup(world.spec(start_deadline_s=0.01))
    try:
        with pytest.raises(LearnerError, match="rank 0 did not finish open_store within 0.01 s"):
            await group.start()
    finally:
        await group.stop()


async def test_a_group_that_was_not_started_says_so(world: World) -> None:
    with pytest.raises(LearnerError, match="call start first"):
        await LearnerGroup(world.spec()).save("anywhere")
