"""Public layouts there and back: load, train a step, into a running engine, export, load again."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlaudio.config import ModelSettings
from rlaudio.engines.base import Generation, GenerationRequest
from rlaudio.engines.inprocess import InProcessEngine
from rlaudio.errors import WeightSyncError
from rlaudio.models import checkpoints
from rlaudio.models.step_audio import StepAudio, create_tiny
from rlaudio.models.step_audio.modeling import StepAudioModule
from rlaudio.recipes.stored_weights import ReadCheckpoint, StoredWeights, differ_in_weights_alone
from rlaudio.types import WeightVersion
from rlaudio.weights.receiver import WeightReceiver
from rlaudio.weights.snapshot import Snapshot
from tests.ray_local.engine_world import WORDS, World

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

OLD, NEW, NEWEST = (WeightVersion(1, number) for number in range(3))
BOUND_NATS = 1e-4
SHARD_BYTES = 800_000


@pytest.fixture(params=[False, True], ids=["nested, tied, one file", "flat, own head, shards"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    public = create_tiny(tmp_path / "made", words=WORDS, seed=0, flat=request.param, tied=not request.param)
    limit = SHARD_BYTES if request.param else 1 << 30
    module = public.load_module(dtype=torch.float32)
    public.save(module, tmp_path / "public", dtype=torch.float32, max_shard_bytes=limit)
    return World(StepAudio(tmp_path / "public"))


@asynccontextmanager
async def running(world: World) -> AsyncIterator[InProcessEngine]:
    engine = InProcessEngine(world.settings(), version=OLD)
    try:
        yield engine
    finally:
        await engine.close()


def policy_logits(module: StepAudioModule, world: World, request: GenerationRequest, tokens: np.ndarray) -> Any:
    ids = torch.from_numpy(np.concatenate([request.prompt_ids, tokens])).long()[None]
    states = module.encode([world.family.mel(clip.samples) for clip in request.clips])
    spans = [(0, span.start, span.end) for span in request.clip_spans]
    logits = module.logits(module(ids, states=states, spans=spans))[0, len(request.prompt_ids) - 1 : -1]
    banned = torch.tensor(request.sampling.banned_token_ids)
    return logits.index_fill(-1, banned, -torch.inf).log_softmax(-1)


def worst_gap(module: StepAudioModule, world: World, request: GenerationRequest, generation: Generation) -> float:
    tokens = generation.response_ids
    with torch.no_grad():
        logprobs = policy_logits(module, world, request, tokens)
    trainer = logprobs.gather(1, torch.from_numpy(tokens).long()[:, None])[:, 0].numpy()
    return float(np.abs(trainer - generation.logprobs).max())


def train_a_step(module: StepAudioModule, world: World, request: GenerationRequest, tokens: np.ndarray) -> None:
    """Make what was sampled likelier; the encoder stays as it is."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not world.family.frozen(name))
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    logprobs = policy_logits(module, world, request, tokens)
    (-logprobs.gather(1, torch.from_numpy(tokens).long()[:, None]).mean()).backward()
    optimizer.step()


def layout(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], list[str]]:
    """Settings, names with shapes, and the files they lie in."""
    stored = checkpoints.stored_tensors(path)
    settings = json.loads((path / "config.json").read_text())
    return settings, {name: t.shape for name, t in stored.items()}, [t.file.name for t in stored.values()]


async def test_names_shapes_and_values_survive(world: World, tmp_path: Path) -> None:
    family = world.family
    before, trained = (family.load_module(dtype=torch.float32) for _ in range(2))
    request = world.request("r", world.sampling(24), clip_lengths=(9_000, 20_000))
    async with running(world) as engine:
        first = await engine.generate(request)
        assert worst_gap(before, world, request, first) < BOUND_NATS
        train_a_step(trained, world, request, first.response_ids)
        named = [(name, tensor) for name, tensor in family.public_names(trained) if not family.frozen(name)]
        await engine.update_weights(Snapshot.of(named, version=NEW, wire_dtype="float32").to_update(), deadline_s=30.0)
        second = await engine.generate(request)
        assert second.version_spans[0].version == NEW
        partial = Snapshot.of(named[1:], version=NEW, wire_dtype="float32").to_update()
        with pytest.raises(WeightSyncError, match="it must come together with"):
            await engine.update_weights(partial, deadline_s=30.0)
        receiver = WeightReceiver(engine)
        start = StoredWeights(ModelSettings(path=str(family.path), dtype="float32"), NEWEST)
        assert await ReadCheckpoint(start).run(receiver) == sum(tensor.nbytes for _, tensor in named)
        await receiver.swap(NEWEST, deadline_s=30.0)
        third = await engine.generate(request)
        assert third.version_spans[0].version == NEWEST
        assert worst_gap(before, world, request, third) < BOUND_NATS, "the checkpoint is not what the engine has"
    assert worst_gap(trained, world, request, second) < BOUND_NATS
    assert worst_gap(before, world, request, second) > 100 * BOUND_NATS

    shards = len(checkpoints.weight_files(family.path))
    limit = SHARD_BYTES if shards > 1 else 1 << 30
    family.save(trained, tmp_path / "export", dtype=torch.float32, max_shard_bytes=limit)
    assert layout(tmp_path / "export") == layout(family.path)
    assert differ_in_weights_alone(ModelSettings(path=str(family.path)), str(tmp_path / "export"))
    again = StepAudio(tmp_path / "export").load_module(dtype=torch.float32)
    for (name, left), (other, right) in zip(trained.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(left, right), name
    assert worst_gap(again, world, request, second) < BOUND_NATS
