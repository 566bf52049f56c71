"""`loop.train` with real reward actors: the policy's replies are scripted and the learner is a stub, the rest is real.

Pools, window, observer, trap monitor, trackers and report are those of a run. A group's replies depend on its number
alone, so runs differ only in what happens to their judges.
"""

import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "quickstart"))

from spoken_world.tasks import TASKS, Line

from rlaudio.actors.pool import PlayedGroup, RewardPool, ScoredGroup
from rlaudio.actors.rollout import PlayedHeader
from rlaudio.config import RunConfig
from rlaudio.data.source import PromptSource
from rlaudio.experience.builder import played_batch
from rlaudio.experience.issuing import Issuer
from rlaudio.experience.ledger import Ledger
from rlaudio.loop import Parts, train
from rlaudio.observe.judge_watch import JudgeWatch
from rlaudio.observe.observer import Observer
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import Tracker
from rlaudio.recipes.rl import _judges_health, trap_monitor
from rlaudio.types import Dialogue, Message, PromptRecord, RubricItem, TextPart, Turn, VersionSpan, WeightVersion

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"
NUM_LINES = 12


@dataclass(frozen=True, slots=True)
class Manners:
    """How a policy answers: chances that a reply is right, and that it is warm."""

    right: float
    warm: float


def make_lines(num: int = NUM_LINES) -> dict[str, Line]:
    """Questions whose gold replies can be bare or warm, by the id of their record."""
    random, found = Random(7), dict[str, Line]()
    while len(found) < num:
        lines = TASKS[random.choice(tuple(TASKS))](random).lines
        line = random.choice([line for line in lines if line.rule is None] or [lines[0]])
        if line.rule is None:
            found[f"line-{len(found)}"] = line
    return found


def make_records(lines: Mapping[str, Line]) -> list[PromptRecord]:
    """One turn each; the judge is asked about warmth alone, so that right and liked can part."""
    rubric = (RubricItem("reply is warm"),)
    return [
        PromptRecord(
            name,
            "told",
            (
                Message(
                    "user",
                    (TextPart(line.text),),
                    answer=line.answer,
                    reference_response=line.reply(Random(name), warm=True),
                    rubric=rubric,
                ),
            ),
        )
        for name, line in lines.items()
    ]


@dataclass
class JudgedRun:
    """One run over actors that outlive it.

    Args:
        manners: of the policy at a step.
        faults: step -> what happens just before its optimizer step, while later groups are being judged.
    """

    config: RunConfig
    rewards: RewardPool
    tracker: Tracker
    progress: Progress
    manners: Callable[[int], Manners] = lambda step: Manners(right=0.6, warm=0.5)
    faults: Mapping[int, Callable[[], Awaitable[None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lines = make_lines()
        self.prompts = PromptSource(make_records(self.lines), seed=0)
        self.ledger = Ledger.in_memory()
        self.trap = trap_monitor(self.config)
        self.version = WeightVersion(0, 0)
        self.windows: list[Any] = []
        self._steps = 0

    async def run(self) -> Observer:
        """Train to the end. Raises what `train` raises."""
        here: Any = self
        watch = JudgeWatch(
            lambda: _judges_health(self.rewards.pool),
            told=self.progress.say,
            slow_after_s=self.config.rewards.slow_after_s,
        )
        observer = Observer(
            tracker=self.tracker,
            progress=self.progress,
            num_steps=self.config.run.steps,
            pools=(self.rewards.pool,),
            gauges=watch.gauges,
            trap=self.trap,
        )
        parts = Parts(
            prompts=Issuer(self.prompts, self.ledger),
            ledger=self.ledger,
            rollouts=here,
            rewards=self.rewards,
            learner=here,
            weights=here,
            observer=_Listening(observer, self),  # type: ignore[arg-type]
            version=self.version,
            save=self.save,
        )
        settings = self.config.algorithm
        async with watch.watching():
            await train(settings, parts, first_step=0, last_step=self.config.run.steps, save_every=1000)
        return observer

    # ---- rollouts ------------------------------------------------------------------------------------------------

    async def play(self, record: PromptRecord, *, group: int) -> PlayedGroup:
        settings = self.config.algorithm
        manners = self.manners(group // settings.groups_per_step)
        dialogues = [self._dialogue(record, group, sibling, manners) for sibling in range(settings.group_size)]
        batch = played_batch(record, dialogues)
        header = PlayedHeader(len(dialogues), 4 * len(dialogues), 4 * len(dialogues))
        return PlayedGroup(record, header, ray.put(batch), None)

    def _dialogue(self, record: PromptRecord, group: int, sibling: int, manners: Manners) -> Dialogue:
        random, line = Random(f"{group}/{sibling}"), self.lines[record.id]
        right, warm = random.random() < manners.right, random.random() < manners.warm
        said = line if right else replace(line, answer="red green")
        reply = said.reply(random, warm=warm)
        ids = np.arange(4, dtype=np.int32)
        spans = (VersionSpan(self.version, 0, 4),)
        turn = Turn(0, ids, ids, np.full(4, -0.5, np.float32), spans, (), "hm", reply, "stop")
        return Dialogue(record.id, group, sibling, (turn,))

    # ---- learner and weights -------------------------------------------------------------------------------------

    async def prepare(self, refs: Sequence[Any], states: Sequence[Any]) -> int:
        return len(refs)

    def minibatches(self, prepared: int) -> list[int]:
        return [0]

    async def forward_backward(self, part: int) -> None:
        if fault := self.faults.get(self._steps):
            await fault()

    async def optimizer_step(self) -> Any:
        self._steps += 1
        self.version = WeightVersion(0, self.version.number + 1)
        return SimpleNamespace(version=self.version, metrics=SimpleNamespace(values={"loss": 0.0}))

    async def broadcast(self, snapshot: Any) -> None: ...

    async def save(self, step: int) -> None: ...


class _Listening:
    """The observer, overheard: which groups were trained on, and what the window said."""

    def __init__(self, observer: Observer, run: JudgedRun) -> None:
        self._observer, self._run = observer, run

    def dropped(self, reason: str) -> None:
        self._observer.dropped(reason)

    def step(self, step: int, *, groups: Sequence[ScoredGroup], window: Any, **told: Any) -> None:
        self._run.windows.append(window)
        self._observer.step(step, groups=groups, window=window, **told)
