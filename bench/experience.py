"""Experience from the actor that makes it to the learner: Arrow columns against numpy dataclasses, through Ray's store.

512 experiences (turns): 64 groups of 8 siblings that hear the same sounds. An actor has them as the player leaves them
(`Dialogue`s of numpy arrays) and stores them; another, the learner, takes all of them and ends with the learner's own
rows. Kinds:

    text     ids and log-probabilities alone
    clips    two sounds of 3 s per group: rlaudio's rows name them and each lies once in the clip store, where users'
             sounds are before they are played (writing it there is not measured, reading and checking it is); a
             dataclass holds its samples (16-bit, as the store does). Both end as the float32 samples that are encoded
    states   encoder states of these sounds (12.5 rows a second of width 512, bfloat16): a second batch per object

Sides:

    arrow    `played_batch` and `states_batch` in the actor, `read_rows` and `read_states` in the learner; as in a run,
             `SharedStates` says which sounds' states another object in the store holds, and they are not stored again
    shared   `ray.put` of a list of dataclasses that hold what a row holds, importable (a class of `__main__` would be
             stored with every object); siblings hold the same array, which is stored once per object
    copied   the same where every sibling holds its own copy, as after a round trip over rows

Shapes: one object per group, as rollout actors return them, or all in one object. Both sides read without a copy
(pickle 5 out of band). Bytes stored are those of the objects as Ray lays them out, and of the clip store: over the ids
and log-probabilities of every row plus distinct sounds (`stored_over_useful`), and the same with prompts that siblings
share counted once (`stored_over_distinct`). `--repeats 2` lets each sound be heard by two groups, so that what is
stored twice across objects shows.

    python bench/experience.py [--rounds 5] [--repeats 1] [--groups-per-object 1 64]
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
os.environ.setdefault("RAY_worker_niceness", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import ray

from rlaudio.audio.store import ClipStore
from rlaudio.experience.builder import played_batch
from rlaudio.experience.states import SharedStates, ShippedStates, read_states, states_batch
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
FULL_SCALE = np.float32(32768.0)
ROOT = Path(__file__).resolve().parents[1]
RECORD = PromptRecord("bench", "t", (Message("user", (TextPart("hi"),)),))


@dataclass(frozen=True, slots=True)
class Experience:
    """One turn as a plain object: the baseline, with what a row of ours says. `sounds` are samples or states."""

    prompt_id: str
    task: str
    group: int
    sibling: int
    turn: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray
    version_spans: tuple[VersionSpan, ...]
    clips: tuple[ClipSpan, ...]
    sounds: tuple[np.ndarray, ...]
    reward: float
    thinking: str | None
    reply: str
    finish_reason: str
    generate_s: float
    judge_s: float


@dataclass(frozen=True, slots=True)
class Group:
    """What a player leaves: dialogues, and the sounds they heard (samples, or encoder states)."""

    dialogues: list[Dialogue]
    sounds: dict[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Measured:
    """One side's way from actor to learner."""

    write_s: float
    read_s: float
    cpu_s: float


class Writer:
    """The actor that made them."""

    def begin(self, kind: str, *, repeats: int, together: int, clips: str) -> tuple[int, int, int]:
        """Make groups of a kind, and say how big they are: bytes of ids and log-probabilities; of these, prompts that
        repeat another; of distinct sounds.
        """
        self._kind = kind
        self._store = ClipStore(clips)
        rng = np.random.default_rng(0)
        self._groups = [make_group(rng, self._store, kind, group) for group in range(NUM_GROUPS)]
        for group, one in enumerate(self._groups):
            self._groups[group] = hearing(one, self._groups[group - group % repeats])
        self._groups = [merged(self._groups[first : first + together]) for first in range(0, NUM_GROUPS, together)]
        turns = [turn for group in self._groups for one in group.dialogues for turn in one.turns]
        tokens = sum(turn.prompt_ids.nbytes + turn.response_ids.nbytes + turn.logprobs.nbytes for turn in turns)
        distinct = {id(turn.prompt_ids): turn.prompt_ids.nbytes for turn in turns}
        sounds = {name: sound.nbytes for group in self._groups for name, sound in group.sounds.items()}
        return tokens, sum(turn.prompt_ids.nbytes for turn in turns) - sum(distinct.values()), sum(sounds.values())

    def write(self, side: str) -> tuple[float, float, list[Any]]:
        """Wall and CPU seconds, references."""
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        refs = self._written(side, ray.put)
        return time.perf_counter() - began_s, time.process_time() - began_cpu_s, refs

    def stored(self, side: str) -> int:
        """Bytes in Ray's store and in the clip store."""
        objects: list[Any] = []
        self._written(side, objects.append)
        stored = sum(map(stored_bytes, objects))
        if side == "arrow" and self._kind == "clips":
            heard = {name for group in self._groups for name in group.sounds}
            stored += sum(path.stat().st_size for path in Path(self._store.root).rglob("*.wav") if path.stem in heard)
        return stored

    def _written(self, side: str, put: Callable[[Any], Any]) -> list[Any]:
        """What `put` made of every object; of a pair of batches, a pair."""
        if side != "arrow":
            make = {"shared": plain, "copied": copied}[side]
            return [put(make(group)) for group in self._groups]
        shared, kept = SharedStates(), []
        for group in self._groups:
            rows = put(played_batch(RECORD, group.dialogues))
            states: tuple[ShippedStates, ...] = ()
            if self._kind == "states":
                known = shared.find(group.sounds)
                new = [
                    EncodedClip(name, s, "bfloat16", "bench") for name, s in group.sounds.items() if name not in known
                ]
                ref = put(states_batch(new)) if new else None
                states = shared.add([clip.sha256 for clip in new], ref, known=known.values())
            kept.append((rows, states))
        return kept


class Learner:
    """Takes everything and ends with `Row`s and distinct sounds."""

    def begin(self, kind: str, *, clips: str) -> None:
        self._kind, self._clips = kind, clips

    def read(self, side: str, refs: list[Any]) -> tuple[float, float, tuple[int, float, int]]:
        """Wall and CPU seconds, and what it found: rows, a sum over their numbers, distinct sounds."""
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        rows, sounds = self._from_arrow(refs) if side == "arrow" else from_plain(ray.get(refs), kind=self._kind)
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        total = sum(int(row.prompt_ids.sum()) + int(row.response_ids.sum()) + float(row.logprobs.sum()) for row in rows)
        return wall_s, cpu_s, (len(rows), total, len(sounds))

    def _from_arrow(self, refs: Sequence[tuple[Any, tuple[ShippedStates, ...]]]) -> tuple[list[Row], dict[str, Any]]:
        rows = read_rows(ray.get([ref for ref, _ in refs]))
        sounds: dict[str, Any] = {}
        if self._kind == "states":
            # As `LearnerGroup.prepare` and `RankWorker.prepare`: every batch of states once.
            distinct = dict.fromkeys(shipped for _, states in refs for shipped in states)
            batches = ray.get([shipped.ref for shipped in distinct])
            sounds = {clip.sha256: clip.states for batch in batches for clip in read_states(batch)}
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
            sounds[store.put(sound.astype(np.float32) / FULL_SCALE).sha256] = sound
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


def merged(groups: Sequence[Group]) -> Group:
    """Several groups as one object holds them."""
    sounds = {name: sound for group in groups for name, sound in group.sounds.items()}
    return Group([dialogue for group in groups for dialogue in group.dialogues], sounds)


def hearing(group: Group, other: Group) -> Group:
    """A group that hears another's sounds."""
    clips = other.dialogues[0].turns[0].clips
    dialogues = [replace(one, turns=tuple(replace(turn, clips=clips) for turn in one.turns)) for one in group.dialogues]
    return Group(dialogues, other.sounds)


def plain(group: Group) -> list[Experience]:
    """Siblings share the arrays of prompt and sounds."""
    return [
        Experience(
            dialogue.prompt_id,
            RECORD.task,
            dialogue.group,
            dialogue.sibling,
            turn.index,
            turn.prompt_ids,
            turn.response_ids,
            turn.logprobs,
            turn.version_spans,
            turn.clips,
            tuple(group.sounds[clip.sha256] for clip in turn.clips),
            0.0,
            turn.thinking,
            turn.reply,
            turn.finish_reason,
            turn.generate_s,
            0.0,
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


def from_plain(values: Sequence[list[Experience]], *, kind: str) -> tuple[list[Row], dict[str, Any]]:
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
            for clip, sound in zip(one.clips, one.sounds, strict=True):
                if clip.sha256 not in sounds:
                    sounds[clip.sha256] = sound.astype(np.float32) / FULL_SCALE if kind == "clips" else sound
    return rows, sounds


def stored_bytes(value: Any) -> int:
    """As Ray lays an object out, header and out-of-band buffers included. Ray 2.60 has no public way to ask."""
    from ray._private.worker import global_worker

    return int(global_worker.get_serialization_context().serialize(value).total_bytes)


def measure(actors: Sequence[Any], kind: str, *, rounds: int, repeats: int, together: int, folder: str) -> object:
    writer, learner = actors
    clips = f"{folder}/{kind}-{together}"
    tokens, repeated, sounds = ray.get(writer.begin.remote(kind, repeats=repeats, together=together, clips=clips))
    ray.get(learner.begin.remote(kind, clips=clips))
    stored = {side: ray.get(writer.stored.remote(side)) for side in SIDES}
    found: dict[str, list[Measured]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        told = set()
        for side, measured in found.items():
            write_s, write_cpu_s, refs = ray.get(writer.write.remote(side))
            read_s, read_cpu_s, what = ray.get(learner.read.remote(side, refs))
            told.add((what[0], round(what[1], 1), what[2]))
            if number:  # the first warms up
                measured.append(Measured(write_s, read_s, write_cpu_s + read_cpu_s))
        assert len(told) == 1, told
    return {"tokens_mb": tokens / 1e6, "repeated_mb": repeated / 1e6, "sounds_mb": sounds / 1e6} | {
        side: figures(measured, found["arrow"], mb=(tokens + sounds) / 1e6)
        | {
            "stored_mb": round(stored[side] / 1e6, 3),
            "stored_over_useful": round(stored[side] / (tokens + sounds), 3),
            "stored_over_distinct": round(stored[side] / (tokens - repeated + sounds), 3),
        }
        for side, measured in found.items()
    }


def figures(measured: Sequence[Measured], arrow: Sequence[Measured], *, mb: float) -> dict[str, object]:
    rounds = list(zip(measured, arrow, strict=True))
    return {
        "mb_per_s": _spread([mb / (one.write_s + one.read_s) for one in measured]),
        "write_ms": _spread([one.write_s * 1e3 for one in measured]),
        "read_ms": _spread([one.read_s * 1e3 for one in measured]),
        "cpu_ms": _spread([one.cpu_s * 1e3 for one in measured]),
        "time_over_arrow": _spread([(one.write_s + one.read_s) / (a.write_s + a.read_s) for one, a in rounds]),
        "cpu_over_arrow": _spread([one.cpu_s / a.cpu_s for one, a in rounds]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)
    }  # fmt: skip


def main(arguments: argparse.Namespace) -> dict[str, object]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=500 << 20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}},
    )
    found: dict[str, object] = {"repeats": arguments.repeats}
    actors = [ray.remote(Writer).remote(), ray.remote(Learner).remote()]
    with tempfile.TemporaryDirectory() as folder:
        for together in arguments.groups_per_object:
            sizes = {"rounds": arguments.rounds, "repeats": arguments.repeats, "together": together}
            kinds = {kind: measure(actors, kind, **sizes, folder=folder) for kind in KINDS}
            found[f"{together}_per_object"] = kinds
    ray.shutdown()
    return found


if __name__ == "__main__":
    import experience  # this very file: what belongs to `__main__` is pickled with every object that holds it

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=1, help="groups that hear the same sounds")
    parser.add_argument("--groups-per-object", type=int, nargs="+", default=[1, NUM_GROUPS])
    print(json.dumps(experience.main(parser.parse_args())))
