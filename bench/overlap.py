"""Overlap: what learning beside generation gains over taking turns, and how much of the ideal that is.

The quickstart with a random policy of its size, in its spoken world: engine on core 0, learner rank on core 1,
everything else (driver, Ray's own processes, the reward actor with rules alone) where the system puts it. All
sides are `rlaudio.loop.train` on the same actors and the same groups:

    one batch     generation alone, one batch in flight: groups are played and judged, the learner answers at once
    two batches   the same, two batches in flight
    learning      the groups just played are handed out again; prepare, backward, step and publish are real
    synchronous   `max_staleness: 0`
    asynchronous  `max_staleness: 1`

Generation alone is the faster of the two in its round. A random policy talks up to the limit, so the limit is what
balances generation and learning: it is calibrated first, in the same run. Seconds are per batch, between the ends of
steps, so that filling the pipeline counts on no side. The learning rate is nothing: every side plays the same
dialogues. Caches of sounds are emptied before each side: every clip is encoded and shipped once, as in a first epoch.

    python bench/overlap.py [--rounds 5] [--steps 5]
"""

import argparse
import asyncio
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from rlaudio.actors.pool import PlayedGroup, RewardPool, RolloutPool, ScoredGroup
from rlaudio.actors.rollout import ServingParts
from rlaudio.config import RunConfig
from rlaudio.config_loader import load_config
from rlaudio.data.run_data import RunData, read_data
from rlaudio.data.source import PromptSource
from rlaudio.experience.issuing import Issuer
from rlaudio.experience.ledger import Ledger
from rlaudio.learner.messages import MinibatchSpec, PreparedBatch, PublishedSnapshot, StepMetrics
from rlaudio.loop import Parts, train
from rlaudio.models.step_audio import create_tiny
from rlaudio.observe.observer import Observer
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import JsonlTracker, MlflowTracker, Tracker, Trackers
from rlaudio.recipes.cluster import joined_ray
from rlaudio.recipes.rl import RunActors, resource_needs, running_actors
from rlaudio.rewards.base import JudgeServices, Scores
from rlaudio.types import Dialogue, Judgment, PromptRecord, WeightVersion
from rlaudio.weights.base import WeightTransport

if TYPE_CHECKING:
    from rlaudio.learner.rank import RankWorker

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
SIDES = ("one batch", "two batches", "learning", "synchronous", "asynchronous")
WARM_STEPS = 2
ENGINE_CORE, LEARNER_CORE = 0, 1


# ---- what stands for a half that is not measured --------------------------------------------------------------------


class NoLearner:
    """Stands for learner and transport: every batch is learned from and published at once, to no effect."""

    def __init__(self, version: WeightVersion) -> None:
        self._version = version

    async def prepare(self, refs: Sequence[Any], states: Sequence[Any]) -> None: ...

    def minibatches(self, prepared: PreparedBatch | None) -> list[MinibatchSpec]:
        return [MinibatchSpec(epoch=0, index=0)]

    async def forward_backward(self, part: MinibatchSpec) -> None: ...

    async def optimizer_step(self) -> PublishedSnapshot:
        return PublishedSnapshot(self._version, (), StepMetrics(self._version, {}))

    async def broadcast(self, snapshot: PublishedSnapshot) -> None: ...


class Replay:
    """Stands for both pools: answers every prompt with the group of that number that was played before."""

    def __init__(self, recorded: dict[int, ScoredGroup], weights: WeightTransport, version: WeightVersion) -> None:
        self._recorded, self._weights, self._version = recorded, weights, version

    async def play(self, record: PromptRecord, *, group: int) -> ScoredGroup:
        return self._recorded.get(group, self._recorded[0])  # those behind the last batch are never trained on

    async def judge(self, group: ScoredGroup) -> ScoredGroup:
        """As if it had been sampled just now: ages are counted from the header."""
        return replace(group, header=replace(group.header, versions=(self._version, self._version)))

    async def broadcast(self, snapshot: PublishedSnapshot) -> None:
        await self._weights.broadcast(snapshot)
        self._version = snapshot.version


class Recorder:
    """Both pools, remembering what they made of each group."""

    def __init__(self, rollouts: RolloutPool, rewards: RewardPool) -> None:
        self._rollouts, self._rewards = rollouts, rewards
        self.groups: dict[int, ScoredGroup] = {}

    async def play(self, record: PromptRecord, *, group: int) -> tuple[int, PlayedGroup]:
        return group, await self._rollouts.play(record, group=group)

    async def judge(self, played: tuple[int, PlayedGroup]) -> ScoredGroup:
        scored = self.groups[played[0]] = await self._rewards.judge(played[1])
        return scored


# ---- clocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Wall seconds, CPU-seconds by role since the processes began, response tokens trained on so far."""

    wall_s: float
    cpu_s: dict[str, float]
    num_tokens: int


class SteppedObserver(Observer):
    """The run's observer, which also reads the clocks at the end of every step."""

    def __init__(self, processes: "Processes", *, tracker: Tracker, progress: Progress, num_steps: int) -> None:
        super().__init__(tracker=tracker, progress=progress, num_steps=num_steps)
        self._processes = processes
        self.readings: list[Reading] = []

    def step(self, step: int, **told: Any) -> None:
        super().step(step, **told)
        self.readings.append(Reading(time.perf_counter(), self._processes.cpu_s(), self.totals.num_response_tokens))


class Processes:
    """This process and all that it started, by what they are for."""

    def __init__(self) -> None:
        self._roles = dict(_tree(os.getpid()))

    def pids(self, role: str) -> list[int]:
        return [pid for pid, its in self._roles.items() if its == role]

    def pin(self, role: str, core: int) -> None:
        """Every thread there is; those to come inherit it from the one that starts them."""
        (pid,) = self.pids(role)
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})

    def cpu_s(self) -> dict[str, float]:
        spent = dict.fromkeys(self._roles.values(), 0.0)
        for pid, role in self._roles.items():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            spent[role] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return spent


def _tree(root: int) -> Iterator[tuple[int, str]]:
    """(pid, role) of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    yield root, "driver"
    left = children.get(root, [])
    while left:
        pid = left.pop()
        yield pid, _role(pid)
        left += children.get(pid, [])


def _role(pid: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_text()
    names = {"ray::RolloutWorker": "engine", "ray::RankActor": "learner", "ray::RewardWorker": "rewards"}
    return next((role for name, role in names.items() if command.startswith(name)), "ray")


# ---- the sides ------------------------------------------------------------------------------------------------------


class ForgetSounds:
    """Run inside a rank: no clip's states are left. Rollout actors are given too small a cache instead."""

    def run(self, worker: "RankWorker", *batches: Any) -> None:
        worker.trainer._sounds.clear()


@dataclass(frozen=True)
class TalkUpTo:
    """Run inside a rollout actor: from now on a turn has so many tokens at most."""

    num_tokens: int

    async def run(self, parts: ServingParts, *payload: Any) -> None:
        parts.config.sampling.max_new_tokens = self.num_tokens


class Drawn:
    """A reward source that draws: a random policy earns nothing by rules, and then there would be no gradient."""

    unplayed = 0.0

    def __init__(self, services: JudgeServices, *, name: str) -> None:
        self.name = name

    async def score(self, record: PromptRecord, dialogues: Sequence[Dialogue]) -> Scores:
        return Scores(
            tuple(
                Judgment(self.name, dialogue.sibling, turn.index, random.Random(repr(turn.response_ids)).random())
                for dialogue in dialogues
                for turn in dialogue.turns
            )
        )


class Bench:
    """The actors of one run, and the sides that are measured on them."""

    def __init__(
        self, config: RunConfig, data: RunData, actors: RunActors, *, tracker: Tracker, progress: Progress
    ) -> None:
        self._config, self._data, self._actors = config, data, actors
        self._tracker, self._progress = tracker, progress
        self._recorded: dict[int, ScoredGroup] = {}
        self._processes = Processes()
        self._processes.pin("engine", ENGINE_CORE)
        self._processes.pin("learner", LEARNER_CORE)

    async def balance(self) -> int:
        """Let turns be as long as makes generating and learning take the same time; how long that is."""
        for side in SIDES[:3]:
            await self.measure(side)  # kernels, caches and the optimizer are there from now on
        gaps = {}
        for length in (24, 40, 56):
            await self._talk_up_to(length)
            one, two, learning = [(await self.measure(side)).wall_s for side in SIDES[:3]]
            gaps[length] = min(one, two) - learning
            print(
                f"{length} tokens per turn: generation {one:.2f} or {two:.2f} s, learning {learning:.2f} s", flush=True
            )
        slope, offset = np.polyfit(list(gaps), list(gaps.values()), 1)
        balanced = max(16, min(64, round(-offset / slope))) if slope > 0 else 40
        await self._talk_up_to(balanced)
        print(f"measured at {balanced} tokens per turn", flush=True)
        return balanced

    async def _talk_up_to(self, num_tokens: int) -> None:
        for handle in self._actors.rollouts.pool.handles.values():
            await handle.probe.remote(TalkUpTo(num_tokens))

    async def measure(self, side: str) -> "Taken":
        """Run one side; what a batch took between the end of the warm steps and the last."""
        actors = self._actors
        await asyncio.sleep(0.3)  # what the side before left in the engine is aborted meanwhile
        # The swap also empties vLLM's caches.
        snapshot = await actors.learner.snapshot()
        await actors.learner.probe(ForgetSounds())
        await actors.weights.broadcast(snapshot)
        observer = SteppedObserver(
            self._processes, tracker=self._tracker, progress=self._progress, num_steps=self._config.run.steps
        )
        ledger = Ledger.in_memory()
        parts = Parts(
            prompts=Issuer(PromptSource(self._data.train, seed=self._config.run.seed), ledger),
            ledger=ledger,
            rollouts=actors.rollouts,
            rewards=actors.rewards,
            learner=actors.learner,
            weights=actors.weights,
            observer=observer,
            version=snapshot.version,
            save=_not_saved,
        )
        if side in SIDES[:2]:
            recorder, nobody = Recorder(actors.rollouts, actors.rewards), NoLearner(snapshot.version)
            self._recorded = recorder.groups
            parts = _with(parts, rollouts=recorder, rewards=recorder, learner=nobody, weights=nobody)
        elif side == "learning":
            replay = Replay(self._recorded, actors.weights, snapshot.version)
            parts = _with(parts, rollouts=replay, rewards=replay, weights=replay)
        algorithm = replace(self._config.algorithm, max_staleness=0 if side in ("one batch", "synchronous") else 1)
        await train(algorithm, parts, first_step=0, last_step=self._config.run.steps, save_every=10**9)
        assert not observer.totals.drops, f"{side}: groups were dropped: {observer.totals.drops}"
        return Taken.between(observer.readings[WARM_STEPS - 1 :])


def _with(parts: Parts, **stand_ins: Any) -> Parts:
    """`Parts` with objects that answer like the real ones as far as the loop asks."""
    return replace(parts, **stand_ins)


async def _not_saved(step: int) -> None:
    """Checkpoints are not what is measured."""


@dataclass(frozen=True)
class Taken:
    """What a batch took on one side in one round."""

    wall_s: float
    cpu_s: dict[str, float]
    num_tokens: float

    @classmethod
    def between(cls, readings: Sequence[Reading]) -> "Taken":
        first, last, num = readings[0], readings[-1], len(readings) - 1
        return cls(
            (last.wall_s - first.wall_s) / num,
            {role: (last.cpu_s[role] - first.cpu_s[role]) / num for role in first.cpu_s},
            (last.num_tokens - first.num_tokens) / num,
        )


def make_world(folder: Path, *, num_records: int) -> None:
    counts = ["--train", str(num_records), "--heldout", "2", "--heldout-voices", "2"]
    command = [sys.executable, "-m", "spoken_world.make", "--out", str(folder), *counts]
    subprocess.run(command, cwd=QUICKSTART, check=True, timeout=300, stdout=subprocess.DEVNULL)


def settings(world: Path, root: Path, arguments: argparse.Namespace) -> RunConfig:
    """The quickstart's, judged by the verifier alone, and so that every side plays the same dialogues."""
    config = load_config(
        RunConfig,
        QUICKSTART / "config.yaml",
        [
            *(f"data.train={world}/train.jsonl", f"data.clips={world}", f"run.root={root}"),
            f"run.steps={WARM_STEPS + arguments.steps}",
            "rewards.sources=[{name: verified, judge: 'rlaudio.rewards.verified:VerifiedReward'},"
            "{name: drawn, judge: 'overlap:Drawn'}]",
            f"model.path={root}/policy",
            "dialogue.unclosed_thinking=continue",
            "dialogue.max_turns=2",
            "rollout.engine.max_model_len=640",
            "rollout.engine.kv_cache_mb=256",  # 64 do not hold what two batches of such turns ask for
            "algorithm.kl_coef=0",  # as DAPO and Dr. GRPO; a reference only shifts the balance to longer turns
            "rewards.judge_model.path=''",
            "learner.lr=1e-12",
            "algorithm.dynamic_sampling=false",
            "rollout.encoder_cache_mb=1",
            *arguments.override,
        ],
    )
    config.data.heldout = {}  # nothing is evaluated
    return config


async def run(config: RunConfig, data: RunData, arguments: argparse.Namespace, root: Path) -> dict[str, list[Taken]]:
    taken: dict[str, list[Taken]] = {side: [] for side in SIDES}
    tracker = Trackers(
        JsonlTracker(root / "metrics.jsonl"),
        MlflowTracker(run_root=root, run_folder=root / "bench", experiment="bench"),
    )
    with Progress(stream=io.StringIO()) as progress:
        actors = running_actors(config, version=WeightVersion(0, 0), checkpoint=None, told=print)
        async with actors as live:
            bench = Bench(config, data, live, tracker=tracker, progress=progress)
            arguments.balanced_tokens = await bench.balance()
            for number in range(arguments.rounds):
                for side in SIDES:
                    one = await bench.measure(side)
                    cpu = " ".join(f"{role} {spent:.2f}" for role, spent in one.cpu_s.items())
                    print(
                        f"{number} {side:13} {one.wall_s:6.2f} s  {one.num_tokens:6.0f} tokens  cpu {cpu}", flush=True
                    )
                    taken[side].append(one)
    tracker.finish("FINISHED")
    return taken


def report(taken: dict[str, list[Taken]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Print the table; return what the last line holds. Ratios are taken within a round."""
    walls = {side: [one.wall_s for one in ones] for side, ones in taken.items()}
    rounds = [
        (min(one, two), learning, synchronous, asynchronous)
        for one, two, learning, synchronous, asynchronous in zip(*(walls[side] for side in SIDES), strict=True)
    ]
    ratios = {
        "balance": [min(generation, learning) / max(generation, learning) for generation, learning, _, _ in rounds],
        "synchronous_of_sum": [(generation + learning) / both for generation, learning, both, _ in rounds],
        "asynchronous_of_ideal": [max(generation, learning) / both for generation, learning, _, both in rounds],
        "asynchronous_over_synchronous": [synchronous / both for _, _, synchronous, both in rounds],
    }
    print(f"{'':14}{'s per batch':>22}{'tokens':>8}   CPU-seconds per batch")
    for side, ones in taken.items():
        cpu = {role: statistics.median(one.cpu_s[role] for one in ones) for role in ones[0].cpu_s}
        spent = " ".join(f"{role} {value:.2f}" for role, value in cpu.items())
        tokens = statistics.median(one.num_tokens for one in ones)
        print(f"{side:14}{_with_range(walls[side]):>22}{tokens:8.0f}   all {sum(cpu.values()):.2f}: {spent}")
    for name, values in ratios.items():
        print(f"{name:30} {_with_range(values)}")
    return {
        "bench": "overlap",
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "settings": arguments.override,
        "tokens_per_turn": arguments.balanced_tokens,
        "batch_s": {side: round(statistics.median(values), 3) for side, values in walls.items()},
        "cpu_s": {
            side: round(statistics.median(sum(one.cpu_s.values()) for one in ones), 3) for side, ones in taken.items()
        },
        "tokens": {side: round(statistics.median(one.num_tokens for one in ones)) for side, ones in taken.items()},
        **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
    }


def _with_range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH")])
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of all five sides, interleaved")
    parser.add_argument("--steps", type=int, default=5, help="measured per side")
    parser.add_argument("--world", type=Path, help="a spoken world that is there; default: make one")
    parser.add_argument("override", nargs="*", help="settings, key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        world = arguments.world or root / "world"
        if arguments.world is None:
            make_world(world, num_records=(WARM_STEPS + arguments.steps + 2) * 8)
        create_tiny(root / "policy", words=[f"w{number}" for number in range(160)], seed=0)
        config = settings(world, root, arguments)
        data = read_data(config.data)
        (root / "bench").mkdir()
        with joined_ray(resource_needs(config)):
            taken = asyncio.run(run(config, data, arguments, root))
    result = report(taken, arguments)
    tokens = result["tokens"].values()
    assert max(tokens) <= 1.05 * min(tokens), f"the sides do not do the same work: {result['tokens']} tokens per batch"
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
