"""Experience from the actor that makes it to the learner: Arrow columns against numpy dataclasses, through Ray's store.

512 experiences (turns): 64 groups of 8 siblings that hear the same sounds. An actor has them as the player leaves them
(`Dialogue`s of numpy arrays) and stores one object per group; another, the learner, takes all of them and ends with
the learner's own rows. Kinds:

    text     ids and log-probabilities alone
    clips    two sounds of 3 s per group: rlaudio's rows name them and each lies once in the clip store, where users'
             sounds are before they are played (writing it there is not measured, reading and checking it is); a
             dataclass holds its samples (16-bit, as the store does)
    states   encoder states of these sounds (12.5 rows a second of width 512, bfloat16): a second batch per group

Sides, all with one object per group:

    arrow    `played_batch` and `states_batch` in the actor, `read_rows` and `read_states` in the learner
    shared   `ray.put` of a list of dataclasses; siblings hold the same array, which is stored once per object
    copied   the same where every sibling holds its own copy, as after a round trip over rows

Both are read without a copy (pickle 5 out of band). Bytes stored are those of the objects as Ray lays them out, and of
the clip store. `--repeats 2` lets each sound be heard by two groups, so that what is stored twice across objects shows.

    python bench/experience.py [--rounds 5] [--repeats 1]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import ray

from rlaudio.audio.store import ClipStore
from rlaudio.experience.builder import played_batch
from rlaudio.experience.states import read_states, states_batch
from rlaudio.learner.batch import Row, read_rows
from rlaudio.types import (
    SAMPLE_RATE_HZ,
    ClipSpan,
    Dialogue,
    EncodedClip,
    Message,
    PromptRecord,
    TextPart,
    Turn,
    VersionSpan,
    WeightVersion,
)

NUM_GROUPS, NUM_SIBLINGS = 64, 8
NUM_PROMPT_IDS, NUM_RESPONSE_IDS = 300, 200
CLIPS_PER_GROUP, CLIP_S = 2, 3.0
STATES_PER_S, STATES_WIDTH = 12.5, 512
KINDS, SIDES = ("text", "clips", "states"), ("arrow", "shared", "copied")
ROOT = Path(__file__).resolve().parents[1]
RECORD = PromptRecord("bench", "t", (Message("user", (TextPart("hi"),)),))


@dataclass(frozen=True, slots=True)
class Experience:
    """One turn as a plain object: the baseline. `sounds` are samples or states."""

    group: int
    sibling: int
    turn: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray
    clips: tuple[ClipSpan, ...]
    sounds: tuple[np.ndarray, ...]
    reward: float
    thinking: str
    reply: str


@dataclass(frozen=True, slots=True)
class Group:
    """What a player leaves: dialogues, and the sounds they heard (samples, or encoder states)."""

    dialogues: list[Dialogue]
    sounds: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Measured:
    """One side's way from actor to learner.

    Attributes:
        stored: bytes in Ray's store and in the clip store.
    """

    write_s: float
    read_s: float
    cpu_s: float
    stored: int


class Writer:
    """The actor that made them."""

    def __init__(self, kind: str, *, repeats: int, clips: str) -> None:
        self._kind = kind
        self._store = ClipStore(clips)
        rng = np.random.default_rng(0)
        self._groups = [make_group(rng, self._store, kind, group) for group in range(NUM_GROUPS)]
        for group, one in enumerate(self._groups):
            self._groups[group] = hearing(one, self._groups[group - group % repeats])

    def useful(self) -> tuple[int, int]:
        """Bytes of ids and log-probabilities; of distinct sounds."""
        turns = [turn for group in self._groups for one in group.dialogues for turn in one.turns]
        tokens = sum(turn.prompt_ids.nbytes + turn.response_ids.nbytes + turn.logprobs.nbytes for turn in turns)
        sounds = {name: sound.nbytes for group in self._groups for name, sound in group.sounds.items()}
        return tokens, sum(sounds.values())

    def write(self, side: str) -> tuple[float, float, int, list[Any]]:
        """Wall and CPU seconds, bytes stored, references."""
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        make: Callable[[Group], Any] = self._arrow if side == "arrow" else plain if side == "shared" else copied
        refs = [ray.put(make(group)) for group in self._groups]
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        stored = sum(stored_bytes(make(group)) for group in self._groups)
        if side == "arrow" and self._kind == "clips":
            stored += sum(path.stat().st_size for path in Path(self._store.root).rglob("*.wav"))
        return wall_s, cpu_s, stored, refs

    def _arrow(self, group: Group) -> Any:
        rows = played_batch(RECORD, group.dialogues)
        if self._kind != "states":
            return rows, None
        clips = (EncodedClip(name, states, "bfloat16", "bench") for name, states in group.sounds.items())
        return rows, states_batch(clips)


class Learner:
    """Takes everything and ends with `Row`s and distinct sounds."""

    def __init__(self, kind: str, *, clips: str) -> None:
        self._kind, self._clips = kind, clips

    def read(self, side: str, refs: list[Any]) -> tuple[float, float, tuple[int, float, int]]:
        """Wall and CPU seconds, and what it found: rows, a sum over their numbers, distinct sounds."""
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        values = ray.get(refs)
        rows, sounds = self._from_arrow(values) if side == "arrow" else from_plain(values)
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        total = sum(int(row.prompt_ids.sum()) + int(row.response_ids.sum()) + float(row.logprobs.sum()) for row in rows)
        return wall_s, cpu_s, (len(rows), total, len(sounds))

    def _from_arrow(self, values: Sequence[Any]) -> tuple[list[Row], dict[str, Any]]:
        rows = read_rows([batch for batch, _ in values])
        sounds: dict[str, Any] = {}
        if self._kind == "states":
            sounds = {clip.sha256: clip.states for _, batch in values for clip in read_states(batch)}
        elif self._kind == "clips":
            store = ClipStore(self._clips)
            for row in rows:
                for clip in row.clips:
                    if clip.sha256 not in sounds:
                        sounds[clip.sha256] = store.get(clip.sha256).samples
        return rows, sounds


def make_group(rng: np.random.Generator, store: ClipStore, kind: str, group: int) -> Group:
    sounds: dict[str, np.ndarray] = {}
    for _ in range(CLIPS_PER_GROUP if kind != "text" else 0):
        if kind == "clips":
            sound = (rng.standard_normal(int(CLIP_S * SAMPLE_RATE_HZ)) * 3000).astype(np.int16)
            sounds[store.put(sound.astype(np.float32) / np.float32(32768.0)).sha256] = sound
        else:
            shape = (int(CLIP_S * STATES_PER_S), STATES_WIDTH)
            sounds[rng.bytes(32).hex()] = rng.integers(0, 1 << 15, shape, dtype=np.uint16)
    dialogues = []
    prompt_ids = rng.integers(0, 150_000, NUM_PROMPT_IDS, dtype=np.int32)
    spans = tuple(ClipSpan(name, 10 + 50 * place, 48 + 50 * place) for place, name in enumerate(sounds))
    for sibling in range(NUM_SIBLINGS):
        response_ids = rng.integers(0, 150_000, NUM_RESPONSE_IDS, dtype=np.int32)
        logprobs = -rng.random(NUM_RESPONSE_IDS, dtype=np.float32)
        version = (VersionSpan(WeightVersion(0, 0), 0, NUM_RESPONSE_IDS),)
        turn = Turn(0, prompt_ids, response_ids, logprobs, version, spans, "so it is", "yes, it is", "stop")
        dialogues.append(Dialogue("bench", group, sibling, (turn,)))
    return Group(dialogues, sounds)


def hearing(group: Group, other: Group) -> Group:
    """A group that hears another's sounds."""
    clips = other.dialogues[0].turns[0].clips
    dialogues = [replace(one, turns=tuple(replace(turn, clips=clips) for turn in one.turns)) for one in group.dialogues]
    return Group(dialogues, other.sounds)


def plain(group: Group) -> list[Experience]:
    """Siblings share the arrays of prompt and sounds."""
    return [
        Experience(
            dialogue.group,
            dialogue.sibling,
            turn.index,
            turn.prompt_ids,
            turn.response_ids,
            turn.logprobs,
            turn.clips,
            tuple(group.sounds[clip.sha256] for clip in turn.clips),
            0.0,
            turn.thinking or "",
            turn.reply,
        )
        for dialogue in group.dialogues
        for turn in dialogue.turns
    ]


def copied(group: Group) -> list[Experience]:
    """Every sibling has its own."""
    return [
        replace(one, prompt_ids=one.prompt_ids.copy(), sounds=tuple(sound.copy() for sound in one.sounds))
        for one in plain(group)
    ]


def from_plain(values: Sequence[list[Experience]]) -> tuple[list[Row], dict[str, Any]]:
    rows: list[Row] = []
    sounds: dict[str, Any] = {}
    dialogues: dict[tuple[int, int], int] = {}
    for group in values:
        for one in group:
            dialogue = dialogues.setdefault((one.group, one.sibling), len(dialogues))
            rows.append(
                Row(
                    dialogue,
                    one.group,
                    one.sibling,
                    one.turn,
                    one.prompt_ids,
                    one.response_ids,
                    one.logprobs,
                    one.clips,
                    (),
                    one.reward,
                )
            )
            sounds |= {clip.sha256: sound for clip, sound in zip(one.clips, one.sounds, strict=True)}
    return rows, sounds


def stored_bytes(value: Any) -> int:
    """As Ray lays an object out, header and out-of-band buffers included. Ray 2.60 has no public way to ask."""
    from ray._private.worker import global_worker

    return int(global_worker.get_serialization_context().serialize(value).total_bytes)


def measure(kind: str, *, rounds: int, repeats: int, folder: str) -> dict[str, object]:
    clips = f"{folder}/{kind}"
    writer = ray.remote(Writer).remote(kind, repeats=repeats, clips=clips)
    learner = ray.remote(Learner).remote(kind, clips=clips)
    tokens, sounds = ray.get(writer.useful.remote())
    found: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        told = set()
        for side, measured in found.items():
            write_s, write_cpu_s, stored, refs = ray.get(writer.write.remote(side))
            read_s, read_cpu_s, what = ray.get(learner.read.remote(side, refs))
            told.add((what[0], round(what[1], 1)))
            if number:  # the first warms up
                measured.append(Measured(write_s, read_s, write_cpu_s + read_cpu_s, stored))
        assert len(told) == 1, told
    return {"tokens_mb": tokens / 1e6, "sounds_mb": sounds / 1e6} | {
        side: figures(measured, found["arrow"], useful=tokens + sounds) for side, measured in found.items()
    }


def figures(measured: Sequence[Measured], arrow: Sequence[Measured], *, useful: int) -> dict[str, object]:
    return {
        "mb_per_s": _spread([useful / 1e6 / (one.write_s + one.read_s) for one in measured]),
        "write_ms": _spread([one.write_s * 1e3 for one in measured]),
        "read_ms": _spread([one.read_s * 1e3 for one in measured]),
        "cpu_ms": _spread([one.cpu_s * 1e3 for one in measured]),
        "time_over_arrow": _spread(
            [(a.write_s + a.read_s) / (b.write_s + b.read_s) for a, b in zip(measured, arrow, strict=True)]
        ),
        "stored_mb": round(measured[0].stored / 1e6, 3),
        "stored_over_useful": round(measured[0].stored / useful, 3),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="groups that hear the same sounds")
    arguments = parser.parse_args()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=500 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}},
    )
    with tempfile.TemporaryDirectory() as folder:
        found = {
            kind: measure(kind, rounds=arguments.rounds, repeats=arguments.repeats, folder=folder) for kind in KINDS
        }
    ray.shutdown()
    print(json.dumps({"repeats": arguments.repeats} | found))
