"""Encode once: what a learner step and a whole batch cost with encoder states shipped, and without.

One batch is played by a real rollout worker (vLLM in this process) and trained on by a real rank (DeepSpeed):

    shipped   rollout.encode_once: the actor encodes each clip once, vLLM and the learner take its states
    local     the engine hears sound; the learner encodes each clip once by itself and remembers it
    off       the engine hears sound; every forward of the learner encodes its own clips

The model is random and tiny (1.4M parameters, the quickstart's), so that it runs on two cores without a GPU. Its
encoder is nearly half of it; in a public checkpoint it is 2 to 9 % of the weights. Read the counts as facts and the
ratio of times as this model's: `--encoder-layers` shows how it moves with the encoder's share.

Forwards are counted outside of rlaudio's own bookkeeping, by a hook on every encoder module of the process.

    python bench/encode_once.py [--groups 3] [--rounds 3] [--encoder-layers 2]
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from rlaudio.actors.rollout import PlayOrder, RolloutWorker
from rlaudio.actors.serving import start_engine
from rlaudio.audio.store import ClipStore
from rlaudio.config import AlgorithmSettings, LearnerSettings, ModelSettings, RunConfig
from rlaudio.experience.builder import with_rewards
from rlaudio.learner.messages import MinibatchSpec, TrainerSpec
from rlaudio.learner.optimization import join_ranks
from rlaudio.learner.rank import RankWorker
from rlaudio.models import checkpoints
from rlaudio.models.step_audio import StepAudio, checkpoint
from rlaudio.models.step_audio.config import tiny, tiny_values
from rlaudio.models.step_audio.encoder import AudioEncoder
from rlaudio.models.step_audio.modeling import StepAudioModule
from rlaudio.models.step_audio.tokenizer import StepAudioTokenizer, build_word_tokenizer
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart, Message, PromptRecord, WeightVersion

GROUP_SIZE = 8
TURNS = 3
EPOCHS = 4
MICRO_BATCH_TOKENS = 1024
SIDES = ("shipped", "local", "off")


class ForwardCounter:
    """Clips that went through any encoder of this process, the engine's included, since the last `take`."""

    def __init__(self) -> None:
        self._count = 0
        torch.nn.modules.module.register_module_forward_hook(self._hook)

    def _hook(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if isinstance(module, AudioEncoder):
            self._count += len(inputs[0])

    def take(self) -> int:
        count, self._count = self._count, 0
        return count


@dataclass(frozen=True)
class Group:
    """One played group: experience rows, and the states that came with them (no rows where none did)."""

    rows: pa.RecordBatch
    shipped: tuple[str, ...]
    states: pa.RecordBatch


@dataclass(frozen=True)
class Step:
    """What one learner step of `EPOCHS` epochs took."""

    wall_s: float
    cpu_s: float
    encoder_forwards: int
    loss: float


def write_policy(path: Path, *, encoder_layers: int) -> None:
    """The quickstart's tiny policy with an encoder of any depth."""
    tokenizer = StepAudioTokenizer(build_word_tokenizer([f"w{i}" for i in range(50)]))
    ids = tokenizer.ids
    config = tiny(vocab_size=tokenizer.vocab_size, audio_token_id=ids.audio_pad, turn_end_id=ids.turn_end)
    config.audio_encoder_config.n_audio_layer = encoder_layers
    module = StepAudioModule(config)
    module.initialise(seed=0)
    checkpoints.write_checkpoint(
        path,
        module.state_dict(),
        dtype=torch.float32,
        write_files=partial(checkpoint.write_files, values=tiny_values(config, flat=False), tokenizer=tokenizer),
    )


def make_world(root: Path, *, num_records: int, encoder_layers: int) -> tuple[RunConfig, list[PromptRecord]]:
    """A random tiny checkpoint, and records of three user turns of 1.5 to 4 s of noise each."""
    write_policy(root / "policy", encoder_layers=encoder_layers)
    store = ClipStore(str(root / "data"))
    rng = np.random.default_rng(0)
    records = []
    for number in range(num_records):
        messages = []
        for _ in range(TURNS):
            length = int(rng.uniform(1.5, 4.0) * SAMPLE_RATE_HZ)
            clip = store.put((0.1 * rng.standard_normal(length)).clip(-1, 1).astype(np.float32))
            messages.append(Message("user", (AudioPart(store.uri(clip.sha256), clip.sha256, SAMPLE_RATE_HZ),)))
        records.append(PromptRecord(f"record{number}", "bench", tuple(messages)))
    config = RunConfig()
    config.model.path = str(root / "policy")
    config.data.clips = str(root / "data")
    # A random policy never closes its reasoning.
    config.dialogue.unclosed_thinking = "continue"
    config.sampling.max_new_tokens = 24
    return config, records


@dataclass(frozen=True)
class Played:
    """A batch as one kind of worker played it, and the clips that encoders ran over meanwhile."""

    groups: list[Group]
    warm: Group
    encoder_forwards: int


async def play(config: RunConfig, records: Sequence[PromptRecord], counter: ForwardCounter) -> dict[str, Played]:
    """Every record as a group of eight, on one engine: "sound" lets it hear, "states" encodes once before it.

    The first record only warms up: worker, engine, and later the learner.
    """
    version = WeightVersion(0, 0)
    family = StepAudio(config.model.path)
    engine = await start_engine(
        config.rollout.engine, family=family, dtype=config.model.dtype, on_gpu=False, version=version, seed=0
    )
    played: dict[str, Played] = {}
    for name in ("sound", "states"):
        config.rollout.encode_once = name == "states"
        worker = RolloutWorker(config, on_gpu=False, engine=engine)
        await worker.start(version)
        groups = []
        for number, record in enumerate(records):
            order = PlayOrder(number, GROUP_SIZE, 1.0, f"bench/{number}", ship_states=True)
            header, rows, states = await worker.play(record, order)
            groups.append(Group(rewarded(rows, seed=number), header.shipped, states))
            if number == 0:
                counter.take()
        played[name] = Played(groups[1:], groups[0], counter.take())
    await engine.close()
    return played


def rewarded(rows: pa.RecordBatch, *, seed: int) -> pa.RecordBatch:
    rng = np.random.default_rng(seed)
    keys = zip(rows.column("sibling").to_pylist(), rows.column("turn").to_pylist(), strict=True)
    return with_rewards(rows, mixed={key: float(rng.random()) for key in keys}, judge_s=0.0)


def learner_step(side: str, config: RunConfig, groups: Sequence[Group], warm: Group, counter: ForwardCounter) -> Step:
    """A fresh rank, warmed on another batch (optimizer, reference and kernels are there), then one timed step."""
    spec = TrainerSpec(
        model=ModelSettings(path=config.model.path),
        clips_root=config.data.clips,
        learner=LearnerSettings(lr=1e-4, micro_batch_tokens=MICRO_BATCH_TOKENS),
        cache_mb=0 if side == "off" else 512,
    )
    worker = RankWorker(spec)
    algorithm = AlgorithmSettings(group_size=GROUP_SIZE, epochs=EPOCHS, kl_coef=0.001)
    run_batch(worker, [warm], algorithm, ships=side == "shipped", epochs=1)
    counter.take()
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    loss = run_batch(worker, groups, algorithm, ships=side == "shipped", epochs=EPOCHS)
    return Step(time.perf_counter() - wall_s, time.process_time() - cpu_s, counter.take(), loss)


def run_batch(
    worker: RankWorker, groups: Sequence[Group], algorithm: AlgorithmSettings, *, ships: bool, epochs: int
) -> float:
    sources = [(group.shipped, lambda group=group: group.states) for group in groups] if ships else []
    worker.prepare([group.rows for group in groups], algorithm, states=sources)
    for epoch in range(epochs):
        worker.forward_backward(MinibatchSpec(epoch=epoch, index=0))
        metrics, _ = worker.optimizer_step(snapshot=False)
    return metrics.values["loss"]


def report(
    steps: dict[str, list[Step]], played: dict[str, Played], *, num_clips: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Print the table; return what the last line holds."""
    forwards = {
        side: played["states" if side == "shipped" else "sound"].encoder_forwards + steps[side][0].encoder_forwards
        for side in SIDES
    }
    print(f"{num_clips} clips, {arguments.groups} groups of {GROUP_SIZE}, {TURNS} turns, {EPOCHS} epochs")
    print(
        f"{'':8} {'step s':>8} {'cpu s':>8} {'rollout':>8} {'learner':>8} {'all':>8} {'per clip':>9}  encoder forwards"
    )
    for side in SIDES:
        learner = steps[side][0].encoder_forwards
        print(
            f"{side:8} {statistics.median(s.wall_s for s in steps[side]):8.2f} "
            f"{statistics.median(s.cpu_s for s in steps[side]):8.2f} {forwards[side] - learner:8} {learner:8} "
            f"{forwards[side]:8} {forwards[side] / num_clips:9.2f}"
        )
    ratios = {
        f"{kind}_ratio_{side}": [
            getattr(base, f"{kind}_s") / getattr(shipped, f"{kind}_s")
            for base, shipped in zip(steps[side], steps["shipped"], strict=True)
        ]
        for side in ("off", "local")
        for kind in ("wall", "cpu")
    }
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.2f} (range {min(values):.2f} to {max(values):.2f})")
    return {
        "bench": "encode_once",
        "num_clips": num_clips,
        "encoder_layers": arguments.encoder_layers,
        "rounds": arguments.rounds,
        "step_s": {side: round(statistics.median(s.wall_s for s in steps[side]), 3) for side in SIDES},
        "encoder_forwards": forwards,
        "forwards_per_clip": forwards["shipped"] / num_clips,
        "states_mb": round(sum(group.states.nbytes for group in played["states"].groups) / 2**20, 3),
        **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of all three sides, interleaved")
    parser.add_argument("--encoder-layers", type=int, default=2)
    arguments = parser.parse_args()
    counter = ForwardCounter()
    with tempfile.TemporaryDirectory() as folder:
        config, records = make_world(
            Path(folder), num_records=arguments.groups + 1, encoder_layers=arguments.encoder_layers
        )
        played = asyncio.run(play(config, records, counter))
        join_ranks(rank=0, world_size=1, store=dist.HashStore(), on_gpu=False, timeout_s=60.0)  # type: ignore[attr-defined]
        batch = played["states"]  # one batch for all sides
        steps: dict[str, list[Step]] = {side: [] for side in SIDES}
        for _ in range(arguments.rounds):
            for side in SIDES:
                steps[side].append(learner_step(side, config, batch.groups, batch.warm, counter))
        dist.destroy_process_group()
    clips = {clip["sha256"] for group in batch.groups for row in group.rows.column("clips").to_pylist() for clip in row}
    result = report(steps, played, num_clips=len(clips), arguments=arguments)
    losses = [step.loss for side in SIDES for step in steps[side]]
    assert max(losses) - min(losses) < 1e-4, f"the sides do not train the same thing: losses {losses}"
    forwards = {step.encoder_forwards for step in steps["shipped"]}
    assert forwards == {0}, f"the learner encoded {forwards} clips although their states were shipped"
    assert result["forwards_per_clip"] == 1, f"{result['forwards_per_clip']} forwards per clip instead of exactly 1"
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
