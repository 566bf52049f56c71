"""From the rollout actor's encoder to the learner's gradient: every clip is encoded once, by the right encoder."""

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rlaudio.actors.rollout import PlayOrder, RolloutWorker
from rlaudio.audio.store import ClipStore
from rlaudio.config import AlgorithmSettings, LearnerSettings, ModelSettings, RunConfig
from rlaudio.dialogue.template import ChatTemplate
from rlaudio.errors import LearnerError
from rlaudio.experience.builder import with_rewards
from rlaudio.learner.messages import MinibatchSpec, TrainerSpec
from rlaudio.learner.rank import RankWorker, StatesSource
from rlaudio.models.step_audio import StepAudio, create_tiny
from rlaudio.models.step_audio.encoder import AudioEncoder
from rlaudio.types import AudioClip, AudioPart, EncodedClip, Message, PromptRecord, WeightVersion
from tests.conftest import TINY_WORDS
from tests.fakes import FakeEngine

pytestmark = pytest.mark.usefixtures("one_rank")

ALGORITHM = AlgorithmSettings(group_size=8, epochs=2, kl_coef=0.01)
LENGTHS = [9_000, 16_000, 12_345, 30_000, 7_000]
RECORDS = [(0, 1, 2), (2, 3, 4)]
"""Which clips each record's three turns hear; the groups share one."""


class World:
    """A tiny policy, five clips, two records of three turns."""

    def __init__(self, checkpoint: Path, root: Path) -> None:
        self.family = StepAudio(checkpoint)
        self.config = RunConfig()
        self.config.model = ModelSettings(path=str(checkpoint))
        self.config.data.clips = str(root)
        store, rng = ClipStore(str(root)), np.random.default_rng(0)
        self.clips = [store.put((0.1 * rng.standard_normal(n)).clip(-1, 1).astype(np.float32)) for n in LENGTHS]
        self.records = [
            PromptRecord(
                f"r{number}",
                "t",
                tuple(Message("user", (AudioPart("x", self.clips[clip].sha256, 16_000),)) for clip in clips),
            )
            for number, clips in enumerate(RECORDS)
        ]

    def engine(self) -> FakeEngine:
        response = ChatTemplate(self.family.tokenizer, style=self.family.style).response("one two", "three")
        return FakeEngine(lambda request: response, delay_s=0.001)

    async def play(
        self, engine: FakeEngine, *, shipped: Sequence[str] = (), **changes: Any
    ) -> list[tuple[Any, pa.RecordBatch, pa.RecordBatch]]:
        """Both groups at once: header, experience, states."""
        config = dataclasses.replace(self.config, **changes)
        worker = RolloutWorker(config, on_gpu=False, engine=engine)
        await worker.start(WeightVersion(0, 0))
        order = PlayOrder(0, 8, 1.0, "s", ship_states=True, shipped=frozenset(shipped))
        orders = [dataclasses.replace(order, group=number) for number in range(len(self.records))]
        played = await asyncio.gather(*map(worker.play, self.records, orders))
        return [(header, rewarded(rows), over_the_wire(states)) for header, rows, states in played]

    def rank(self, **settings: Any) -> RankWorker:
        learner = LearnerSettings(lr=1e-4, micro_batch_tokens=400, **settings)
        return RankWorker(TrainerSpec(self.config.model, self.config.data.clips, learner))


def rewarded(rows: pa.RecordBatch) -> pa.RecordBatch:
    keys = list(zip(rows.column("sibling").to_pylist(), rows.column("turn").to_pylist(), strict=True))
    return with_rewards(rows, mixed={key: 0.1 * sum(key) for key in keys}, judge_s=0.0)


def over_the_wire(batch: pa.RecordBatch) -> pa.RecordBatch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tiny_checkpoint, tmp_path_factory.mktemp("clips"))


@pytest.fixture
def encoded() -> Iterator[list[int]]:
    """Mel frames of every clip that goes through any encoder of this process: actor's, trainer's, reference's."""
    seen: list[int] = []

    def note(module: torch.nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if isinstance(module, AudioEncoder):
            seen.extend(mel.shape[-1] for mel in inputs[0])

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    yield seen
    handle.remove()


class Shipped:
    """A states batch that counts how often it is fetched."""

    def __init__(self, batch: pa.RecordBatch, *, lost: bool = False) -> None:
        self._batch, self._lost = batch, lost
        self.fetched = 0

    @property
    def source(self) -> StatesSource:
        return self._batch.column("sha256").to_pylist(), self

    def __call__(self) -> pa.RecordBatch | None:
        self.fetched += 1
        return None if self._lost else self._batch


async def test_eight_siblings_three_turns_two_epochs_and_the_reference_encode_each_clip_once(
    world: World, encoded: list[int]
) -> None:
    engine = world.engine()
    played = await world.play(engine)
    assert len(encoded) == len(LENGTHS) == len(set(encoded))
    assert len(engine.requests) == 2 * 8 * 3
    assert all(isinstance(clip, EncodedClip) for request in engine.requests for clip in request.clips)
    assert sum(header.encoder_forwards for header, _, _ in played) == len(LENGTHS), "the shared clip counts once"
    assert [states.num_rows for _, _, states in played] == [3, 3]

    worker, sources = world.rank(), [Shipped(states) for _, _, states in played]
    rows = [rows for _, rows, _ in played]
    for fetched in (1, 1):  # the same clips again: nothing is fetched, nothing is encoded
        prepared = worker.prepare(rows, ALGORITHM, states=[one.source for one in sources])
        assert [source.fetched for source in sources] == [fetched, fetched]
        for epoch in range(ALGORITHM.epochs):
            worker.forward_backward(MinibatchSpec(epoch=epoch, index=0))
            metrics, _ = worker.optimizer_step(snapshot=False)
        assert prepared.encoder_forwards == metrics.values["encoder_forwards"] == 0
    assert len(encoded) == len(LENGTHS)


async def test_what_did_not_come_is_encoded_by_the_learner_and_counted(world: World, encoded: list[int]) -> None:
    (_, first, states), (_, second, _) = await world.play(world.engine())
    encoded.clear()
    worker = world.rank()
    prepared = worker.prepare([first, second], ALGORITHM, states=[Shipped(states).source])
    assert prepared.encoder_forwards == len(encoded) == 2, "of three clips one came with the other group"
    worker.forward_backward(MinibatchSpec(epoch=0, index=0))
    assert worker.optimizer_step(snapshot=False)[0].values["encoder_forwards"] == 2


async def test_states_that_are_shipped_already_are_not_shipped_again(world: World, encoded: list[int]) -> None:
    (_, first, states), _ = await world.play(world.engine())
    there = states.column("sha256").to_pylist()
    (header, _, nothing), (other, second, rest) = await world.play(world.engine(), shipped=there)
    assert (header.clips, header.shipped, nothing.num_rows, header.states_bytes) == (tuple(there), (), 0, 0)
    assert (set(other.clips) - set(other.shipped), rest.num_rows) == ({there[2]}, 2), "the shared clip came again"
    encoded.clear()
    sources = [Shipped(states), Shipped(rest)]
    prepared = world.rank().prepare([first, second], ALGORITHM, states=[one.source for one in sources])
    assert [source.fetched for source in sources] == [1, 1]
    assert prepared.encoder_forwards == len(encoded) == 0


async def test_states_that_are_lost_are_encoded_by_the_learner(world: World, encoded: list[int]) -> None:
    (_, first, lost), (_, second, states) = await world.play(world.engine())
    encoded.clear()
    sources = [Shipped(lost, lost=True), Shipped(states)]
    prepared = world.rank().prepare([first, second], ALGORITHM, states=[one.source for one in sources])
    assert [source.fetched for source in sources] == [1, 1]
    assert prepared.encoder_forwards == len(encoded) == 2


async def test_log_probabilities_with_states_are_those_with_sound(world: World) -> None:
    played = await world.play(world.engine())
    rows = [rows for _, rows, _ in played]

    def logprobs(sources: list[Shipped]) -> torch.Tensor:
        worker = world.rank()
        worker.prepare(rows, ALGORITHM, states=[one.source for one in sources])
        return torch.cat([worker.trainer.reference_logprobs(batch) for batch in worker._steps[0]])

    shipped, heard = logprobs([Shipped(states) for _, _, states in played]), logprobs([])
    assert len(shipped) == sum(len(ids) for batch in rows for ids in batch.column("response_ids").to_pylist())
    torch.testing.assert_close(shipped, heard, atol=1e-5, rtol=0)
    silent = [states_of_zeros(states) for _, _, states in played]
    assert (logprobs([Shipped(states) for states in silent]) - heard).abs().max() > 1e-2, "states change nothing"


def states_of_zeros(states: pa.RecordBatch) -> pa.RecordBatch:
    data = pa.array([bytes(len(value.as_py())) for value in states.column("data")], pa.large_binary())
    return states.set_column(states.schema.get_field_index("data"), states.schema.field("data"), data)


async def test_states_of_another_checkpoints_encoder_are_refused(world: World, tmp_path: Path) -> None:
    (_, rows, _), _ = await world.play(world.engine())
    stranger = create_tiny(tmp_path / "other", words=TINY_WORDS, seed=1)
    (_, _, states), _ = await world.play(world.engine(), model=ModelSettings(path=str(stranger.path)))
    with pytest.raises(LearnerError, match=r"its states are of encoder \w{16}, this trainer has \w{16}: .*model.path"):
        world.rank().prepare([rows], ALGORITHM, states=[Shipped(states).source])


async def test_a_trained_encoder_is_never_given_states(world: World, encoded: list[int]) -> None:
    (_, _, stale), _ = await world.play(world.engine())
    engine = world.engine()
    learner = dataclasses.replace(world.config.learner, train_encoder=True)
    (header, rows, states), _ = await world.play(engine, learner=learner)
    assert all(isinstance(clip, AudioClip) for request in engine.requests for clip in request.clips)
    assert (header.clips, header.shipped, states.num_rows) == ((), (), 0)

    worker, source = world.rank(train_encoder=True), Shipped(stale)
    names = [worker.trainer.encoder_name]
    encoded.clear()
    for _ in range(2):
        prepared = worker.prepare([rows], ALGORITHM, states=[source.source])
        worker.forward_backward(MinibatchSpec(epoch=0, index=0))
        metrics, _ = worker.optimizer_step(snapshot=False)
        names.append(worker.trainer.encoder_name)
    assert source.fetched == 0
    assert prepared.encoder_forwards <= metrics.values["encoder_forwards"] == len(encoded) / 2
    assert len(set(names)) == 3, "states of one version would be taken for those of the next"
