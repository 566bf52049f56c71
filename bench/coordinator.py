"""The coordinator alone: groups per second that loop, ledger and spool sustain, whatever is in flight.

`rlaudio.loop.train` with the real window, pools, prompt stream, ledger (SQLite on disk, copied at every checkpoint) and
spool. Engines, judges, learner and weights are fakes in this process that cost nothing and make nobody wait, so what is
measured is the driver without Ray's own calls. Reward actors write the spool in processes of their own; here threads of
this process do, so `groups_per_s` holds a cost that the driver of a run does not have; `--no-spool` leaves it out.

    flat     as many groups per second with 10 groups in flight as with 10,000?
    memory   --groups 1000000 --in-flight 1000: the process's resident memory as the run goes on

In flight is what holds a slot of the window. About half of it is being played at any time, and ends in random order.
Batches are half of what is in flight (`--shape wide`, staleness 1), or 5 groups each (`--shape deep`, any staleness).

    python bench/coordinator.py [--groups 20000] [--in-flight 10 100 1000 10000] [--rounds 3] [--shape wide]
"""

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa

from rlaudio.actors.members import ActorPool
from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.actors.reward import ScoredHeader
from rlaudio.actors.rollout import PlayedHeader, PlayOrder
from rlaudio.config import AlgorithmSettings, RunConfig
from rlaudio.data.source import PromptSource
from rlaudio.experience.audit import audit
from rlaudio.experience.builder import make_batch
from rlaudio.experience.issuing import Issuer
from rlaudio.experience.ledger import Ledger
from rlaudio.experience.spool import Spool
from rlaudio.loop import Parts, train
from rlaudio.observe.metrics import GroupStats
from rlaudio.types import Message, PromptRecord, TextPart, WeightVersion

NUM_RECORDS = 1000
NUM_SIBLINGS = 8
NUM_PROMPT_IDS, NUM_RESPONSE_IDS = 100, 50
GROUPS_PER_CHECKPOINT = 6_400
"""50 steps of 128 groups."""
DEEP_GROUPS_PER_STEP = 5
NUM_MARKS = 10
DULL_SHARE = 0.1
MAX_ENDING_AT_ONCE = 64
STATS = GroupStats(NUM_SIBLINGS, NUM_SIBLINGS, {"rule": 0.5}, NUM_SIBLINGS * NUM_RESPONSE_IDS, NUM_SIBLINGS, 4)


def _rows() -> pa.RecordBatch:
    """One group's experience; every group has the same, so that making it is not measured."""
    ids = np.arange(NUM_PROMPT_IDS, dtype=np.int32)
    response = ids[:NUM_RESPONSE_IDS]
    return make_batch(
        prompt_id=["r"] * NUM_SIBLINGS,
        task=["t"] * NUM_SIBLINGS,
        group=[0] * NUM_SIBLINGS,
        sibling=list(range(NUM_SIBLINGS)),
        turn=[0] * NUM_SIBLINGS,
        prompt_ids=[ids] * NUM_SIBLINGS,
        response_ids=[response] * NUM_SIBLINGS,
        logprobs=[response.astype(np.float32)] * NUM_SIBLINGS,
        clips=[[]] * NUM_SIBLINGS,
        thinking=["so"] * NUM_SIBLINGS,
        reply=["yes"] * NUM_SIBLINGS,
    )


ROWS = _rows()


@dataclass(frozen=True, slots=True)
class Measured:
    """One run.

    Attributes:
        groups: trained on.
        issued: with those that were dropped.
        resident_mb: of the process, after each tenth of the steps.
        ledger_mb, spool_mb: on disk at the end.
        saves_s: seconds that checkpoints took in all.
    """

    groups: int
    issued: int
    wall_s: float
    cpu_s: float
    saves_s: float
    resident_mb: list[float]
    ledger_mb: float
    spool_mb: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a fake's call returns: the work is done when it is awaited."""

    work: Callable[[], Awaitable[Any]]

    def __await__(self) -> Generator[Any, None, Any]:
        return self.work().__await__()


class Call:
    """A method as an actor handle has it."""

    def __init__(self, call: Callable[..., list[Any]]) -> None:
        self.remote = call

    def options(self, **_: object) -> "Call":
        return self


class Engines:
    """Plays groups: holds half of what is in flight, and ends some at random when more comes, or nothing does."""

    def __init__(self, *, num_playing: int, seed: int) -> None:
        self.version = WeightVersion(0, 0)
        self.play = Call(self._play)
        self._num_playing = num_playing
        self._rng = random.Random(seed)
        self._playing: list[asyncio.Future[None]] = []
        self._num_come = 0

    def _play(self, record: PromptRecord, order: PlayOrder) -> list[Any]:
        return [Answer(self._played), (order.group, self.version), None]

    async def _played(self) -> PlayedHeader:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._playing.append(done)
        self._num_come += 1
        await done
        return PlayedHeader(NUM_SIBLINGS, NUM_PROMPT_IDS, NUM_RESPONSE_IDS)

    async def run(self) -> None:
        """End groups, for ever."""
        come = 0
        while True:
            idle, come = come == self._num_come, self._num_come
            ending = len(self._playing) if idle else len(self._playing) - self._num_playing
            for _ in range(min(ending, MAX_ENDING_AT_ONCE)):
                place = self._rng.randrange(len(self._playing))
                self._playing[place], self._playing[-1] = self._playing[-1], self._playing[place]
                self._playing.pop().set_result(None)
            await asyncio.sleep(0)


class Judges:
    """Judges groups; a tenth have no signal. Writes what can be trained on to the spool."""

    def __init__(self, spool: Spool | None, *, seed: int) -> None:
        self.judge = Call(self._judge)
        self._spool = spool
        self._rng = random.Random(seed)

    def _judge(self, record: PromptRecord, played: tuple[int, WeightVersion]) -> list[Any]:
        return [Answer(lambda: self._judged(*played)), None]

    async def _judged(self, group: int, version: WeightVersion) -> ScoredHeader:
        header = ScoredHeader(self._rng.random() >= DULL_SHARE, (version, version), STATS)
        if self._spool is None or not header.has_signal:
            return header
        written = {"has_signal": True, "versions": [[version.incarnation, version.number]] * 2}
        spooled = await asyncio.to_thread(self._spool.write, ROWS, group=group, header=written)
        return replace(header, spooled=spooled)


class Learner:
    """Learner, weights, observer and checkpoints of a run: they count, and copy the ledger where a run would."""

    def __init__(self, engines: Engines, ledger: Ledger, *, folder: Path, num_steps: int) -> None:
        self._engines, self._ledger, self._folder = engines, ledger, folder
        self._marks = {num_steps * tenth // NUM_MARKS for tenth in range(1, NUM_MARKS + 1)}
        self._version = WeightVersion(0, 0)
        self.resident_mb: list[float] = []
        self.saves_s = 0.0

    async def prepare(self, refs: Sequence[Any], states: Sequence[Any]) -> None: ...

    def minibatches(self, prepared: None) -> list[int]:
        return [0]

    async def forward_backward(self, part: int) -> None: ...

    async def optimizer_step(self) -> Any:
        self._version = WeightVersion(0, self._version.number + 1)
        return SimpleNamespace(version=self._version)

    async def broadcast(self, snapshot: Any) -> None:
        self._engines.version = snapshot.version

    def dropped(self, reason: str) -> None: ...

    def step(self, step: int, **_: object) -> None:
        if step + 1 in self._marks:
            self.resident_mb.append(resident_mb())

    async def save(self, step: int) -> None:
        began_s = time.perf_counter()
        copy = self._folder / "copy.sqlite"
        copy.unlink(missing_ok=True)
        await asyncio.to_thread(self._ledger.snapshot, copy)
        self._ledger.durable(step=step, version=self._version)
        self.saves_s += time.perf_counter() - began_s


async def coordinate(folder: Path, *, in_flight: int, groups: int, shape: str, spooled: bool, seed: int) -> Measured:
    """One run over `groups` groups; its ledger must add up."""
    per_step = DEEP_GROUPS_PER_STEP if shape == "deep" else in_flight // 2
    staleness = in_flight // per_step - 1
    num_steps = max(2, groups // per_step)
    settings = AlgorithmSettings(group_size=NUM_SIBLINGS, groups_per_step=per_step, max_staleness=staleness)
    records = [PromptRecord(f"r{index}", "t", (Message("user", (TextPart("hi"),)),)) for index in range(NUM_RECORDS)]
    spool = Spool(str(folder / "spool"))
    ledger = Ledger.create(folder / "ledger.sqlite", discard=spool.remove, max_file_bytes=4096 << 20)
    config = RunConfig(algorithm=settings)
    engines = Engines(num_playing=in_flight // 2, seed=seed)
    judges = Judges(spool if spooled else None, seed=seed)
    learner: Any = Learner(engines, ledger, folder=folder, num_steps=num_steps)
    parts = Parts(
        prompts=Issuer(PromptSource(records, seed=seed), ledger),
        ledger=ledger,
        rollouts=RolloutPool(config, environment={}, pool=_pool("rollout", engines)),
        rewards=RewardPool(config, environment={}, pool=_pool("reward", judges)),
        learner=learner,
        weights=learner,
        observer=learner,
        version=WeightVersion(0, 0),
        save=learner.save,
    )
    save_every = max(1, GROUPS_PER_CHECKPOINT // per_step)
    gc.collect()
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    playing = asyncio.create_task(engines.run())
    await train(settings, parts, first_step=0, last_step=num_steps, save_every=save_every)
    playing.cancel()
    await asyncio.to_thread(ledger.flush)
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    await asyncio.to_thread(ledger.close)
    sums = audit(folder / "ledger.sqlite", covered=folder / "copy.sqlite")
    assert sums.problems == () and sums.durable == num_steps * per_step, sums
    return Measured(
        groups=sums.durable,
        issued=sums.num_groups,
        wall_s=wall_s,
        cpu_s=cpu_s,
        saves_s=learner.saves_s,
        resident_mb=learner.resident_mb,
        ledger_mb=(folder / "ledger.sqlite").stat().st_size / 1e6,
        spool_mb=spool.num_bytes() / 1e6,
    )


def _pool(role: str, actor: Any) -> ActorPool:
    return ActorPool(role, {f"{role}-0": actor}, alive_deadline_s=60.0, end=lambda _: None, give_up=lambda _: None)


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def main(arguments: argparse.Namespace) -> dict[str, object]:
    found: dict[int, list[Measured]] = {in_flight: [] for in_flight in arguments.in_flight}
    for number in range(arguments.rounds):
        for in_flight, rounds in found.items():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                run = coordinate(
                    Path(folder),
                    in_flight=in_flight,
                    groups=arguments.groups,
                    shape=arguments.shape,
                    spooled=arguments.spool,
                    seed=number,
                )
                rounds.append(asyncio.run(run))
            print(f"round {number}, {in_flight} in flight: {rounds[-1]}", file=sys.stderr, flush=True)
    first = found[arguments.in_flight[0]]
    return {
        "shape": arguments.shape,
        "spool": arguments.spool,
        "in_flight": {
            str(in_flight): {
                "groups_per_s": _spread([one.issued / one.wall_s for one in rounds]),
                "groups_per_cpu_s": _spread([one.issued / one.cpu_s for one in rounds]),
                "cpu_over_first": _spread(
                    [(a.cpu_s / a.issued) / (b.cpu_s / b.issued) for a, b in zip(rounds, first, strict=True)]
                ),
                "saves_share": _spread([one.saves_s / one.wall_s for one in rounds]),
                "resident_mb": rounds[-1].resident_mb,
                "ledger_mb": round(rounds[-1].ledger_mb, 1),
                "spool_mb": round(rounds[-1].spool_mb, 1),
                "groups": rounds[-1].groups,
            }
            for in_flight, rounds in found.items()
        },
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=20_000, help="to train on, per run")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[10, 100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape", choices=["wide", "deep"], default="wide")
    parser.add_argument("--no-spool", dest="spool", action="store_false")
    parser.add_argument("--folder", help="where ledgers and spools lie; a temporary folder else")
    print(json.dumps(main(parser.parse_args())))
