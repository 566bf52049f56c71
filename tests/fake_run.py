"""What `loop.train` drives, on a virtual clock: engines that swap weights between turns, faults on schedule.

The window and the pools are the real ones; actors, learner and transport are fakes. What a schedule shows is written
down from outside, token version by token version.
"""

import asyncio
import itertools
import random
import selectors
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from rlaudio.actors.members import ActorPool
from rlaudio.actors.pool import PlayedGroup, RewardPool, RolloutPool, ScoredGroup
from rlaudio.actors.supervisor import Hiring, PoolSize, Supervisor
from rlaudio.config import AlgorithmSettings, RewardSettings, RolloutSettings, RunConfig, SupervisionSettings
from rlaudio.data.source import PromptSource
from rlaudio.errors import DivergenceError, JudgeError, RolloutError, SpoolError, WeightSyncError
from rlaudio.experience.issuing import Issue, Issuer, why_not_again
from rlaudio.experience.ledger import Entry, Ledger
from rlaudio.experience.states import ShippedStates
from rlaudio.loop import Parts, train
from rlaudio.types import AudioPart, Message, PromptRecord, WeightVersion
from rlaudio.weights.joining import JoinableWeights
from tests.fake_actors import Ailment, FakeActor

RECORDS = [
    PromptRecord(f"r{i}", "t", tuple(Message("user", (AudioPart("x", f"c{(i + k) % 3}", 16_000),)) for k in range(2)))
    for i in range(7)
]
"""They share three sounds: encoder states of one group serve another."""
_IDS = itertools.count(1)
MAX_TURNS_OF_THE_LOOP = 200_000


class HungError(Exception):
    """Nothing is scheduled and nothing is ready, or the loop spins without end: the real run would stand still."""


class _NeverSleeps(selectors.SelectSelector):
    """Where a loop would sleep, its clock jumps to the next timer; without a timer, it would sleep for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self._turns = 0

    def select(self, timeout: float | None = None) -> list[Any]:
        self._turns += 1
        if self._turns == MAX_TURNS_OF_THE_LOOP:
            raise HungError(f"still spinning after {self._turns} turns of the event loop, at {self.now_s:g} s")
        events = super().select(0)
        if not events and timeout is None:
            raise HungError(f"every task waits for another, at {self.now_s:g} s")
        if not events and timeout:
            self.now_s += timeout
        return events


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """An event loop in which hours pass at once, and a deadlock is an error instead of a wait."""

    def __init__(self) -> None:
        self._virtual = _NeverSleeps()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


@dataclass(frozen=True, slots=True)
class Weights:
    """A snapshot, and whatever else the loop may read of one."""

    version: WeightVersion


class WrittenDownLedger(Ledger):
    """A ledger that remembers which groups were said to have ended, and how."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ended: list[int] = []

    def trained(self, groups: Sequence[int], *, step: int) -> None:
        super().trained(groups, step=step)
        self.ended += groups

    def dropped(self, group: int, *, reason: str) -> None:
        super().dropped(group, reason=reason)
        self.ended.append(group)


@dataclass
class FakeRun:
    """Actors, learner, transport, observer and checkpoints in one object that writes everything down.

    Args:
        fail_share, dull_share, diverge_share, slow_share, refuse_share, lost_share: chances per group; of
            divergence per minibatch; of weights that are refused per engine and publish; of a spooled file.
        stop_s: when it is stopped from outside, on the virtual clock.
        before: a run that has ended, of which this one is the next life.
        fatal: method -> (how many calls go well before, the error). `fatal_raised` says which came to pass.
        ailments: actor -> (how many calls go well before, what it has from then on).
        supervision: lost actors are started again, pools resized; None: whoever is lost stays away.
        ill_share: chance that an actor which comes later falls ill as well.
        resizes: (when, pool, to how many).
    """

    settings: AlgorithmSettings
    seed: int = 0
    num_engines: int = 2
    num_judges: int = 1
    steps: int = 6
    delay_s: float = 1.0
    fail_share: float = 0.0
    dull_share: float = 0.0
    slow_share: float = 0.0
    diverge_share: float = 0.0
    refuse_share: float = 0.0
    lost_share: float = 0.1
    stop_s: float | None = None
    before: "FakeRun | None" = None
    fatal: dict[str, tuple[int, Exception]] = field(default_factory=dict)
    ailments: dict[str, tuple[int, Ailment]] = field(default_factory=dict)
    supervision: SupervisionSettings | None = None
    ill_share: float = 0.0
    resizes: Sequence[tuple[float, str, int]] = ()
    attempts: int = 2

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.prompts = PromptSource(RECORDS, seed=0)
        self.ledger = WrittenDownLedger.in_memory()
        self.version = self.saved_version = WeightVersion(0, 0)
        self.first_step = 0
        self.returned: list[Entry] = []
        self.recalled: list[int] = []
        self.inherited: dict[int, ScoredGroup] = {}
        # What the numbers of versions hide: every weights there ever were have an id, and these are the present ones'
        # ancestors by number.
        self.chain, self.saved_chain = [0], [0]
        self.seen: dict[int, list[int]] = {}  # id -> the batch that made these weights of those before
        self.seen_again: list[int] = []  # groups that were taken when the weights had seen them
        self.sampled_by: dict[int, set[int]] = {}  # group -> ids
        self.abandoned: list[int] = []  # groups that were trained on with tokens of weights that are no ancestors
        self.saved_prompts: dict[str, Any] = {}
        if self.before is not None:
            self._go_on(self.before)
        self.first_version = self.consumed_by = self.version
        self.group_deadline_s, self.turn_deadline_s = 15 * self.delay_s, 10 * self.delay_s
        self.alive_deadline_s, self.sync_deadline_s = 2 * self.delay_s, 5 * self.delay_s
        self.told: list[str] = []  # of actors that were left out
        config = RunConfig(
            algorithm=self.settings,
            rollout=RolloutSettings(group_deadline_s=self.group_deadline_s, attempts=self.attempts),
            rewards=RewardSettings(group_deadline_s=self.group_deadline_s),
        )
        self.actors = {
            name: FakeActor(name, self, ailment=self.ailments.get(name))
            for role, num in (("rollout", self.num_engines), ("reward", self.num_judges))
            for name in (f"{role}-{i}" for i in range(num))
        }
        self.rollouts = RolloutPool(config, environment={}, pool=self._pool("rollout", "rollout-"))
        self.rewards = RewardPool(config, environment={}, pool=self._pool("rewards", "reward-"))
        self.supervisors: dict[str, Supervisor] = {}
        self.joined: list[tuple[str, WeightVersion, set[WeightVersion]]] = []  # who, with what, what the others held
        self.calls: Counter[str] = Counter()
        self.played: dict[int, tuple[WeightVersion, ...]] = {}
        self.heard: dict[int, tuple[str, ...]] = {}
        self.judged: dict[int, ScoredGroup] = {}
        self.failed: set[int] = set()
        self.started: set[int] = set()
        self.cut_off: set[int] = set()  # failed, cancelled, or hit by the fatal fault
        self.taken: list[int] = []  # in the order of the batches that the learner was given
        self.ages: list[int] = []  # of those, in versions at the moment they came
        self.trained: list[int] = []  # groups of the steps that were reported as done
        self.steps_done: list[int] = []
        self.diverged = 0  # in a row
        self.drops: list[str] = []
        self.ends: list[str] = []  # of groups, in time: the reason of a drop, or nothing for a group worth training on
        self.saved: list[int] = []
        self.fatal_raised: list[Exception] = []
        self.publishing = 0
        self.sizes: dict[str, PoolSize] = {}  # when the run ended
        self.windows: list[Any] = []
        self.took_s = 0.0

    def _go_on(self, before: "FakeRun") -> None:
        """From its last save, with its ledger, after a restore that finds some spooled groups gone."""
        self.ledger = before.ledger
        self.ledger.ended = []
        self.first_step = before.saved[-1] if before.saved else before.first_step
        origin = self.saved_version = before.saved_version
        spool: Any = SimpleNamespace(holds=lambda spooled: self.rng.random() >= self.lost_share)
        problem = partial(why_not_again, ledger=self.ledger, origin=origin, settings=self.settings, spool=spool)
        self.returned = self.ledger.restore(step=self.first_step, origin=origin, problem=problem)
        self.inherited = before.inherited | before.judged
        self.chain = list(before.saved_chain)
        self.saved_chain, self.saved_prompts = before.saved_chain, before.saved_prompts
        self.sampled_by, self.seen = before.sampled_by, before.seen
        if self.saved_prompts:
            self.prompts.restore(self.saved_prompts)
        self.version = WeightVersion(self.ledger.incarnation, origin.number)

    def _pool(self, role: str, prefix: str) -> ActorPool:
        handles: Any = {name: actor for name, actor in self.actors.items() if name.startswith(prefix)}
        return ActorPool(
            role,
            handles,
            alive_deadline_s=self.alive_deadline_s,
            told=self.told.append,
            end=lambda actor: actor.end(),  # type: ignore[attr-defined]
            give_up=lambda ref: None,  # whoever awaits a fake's answer does its work, and was cancelled
        )

    @property
    def live(self) -> list[WeightVersion]:
        """What the engines hold that are still in the pool."""
        return [actor.version for actor in self.rollouts.pool.handles.values()]  # type: ignore[attr-defined]

    def run(self) -> None:
        """`loop.train` from its first to its last step. Raises what it raises, bare where it is a single error."""
        with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
            try:
                runner.run(self._train())
            finally:
                self.took_s = runner.get_loop().time()

    async def _train(self) -> None:
        here: Any = self
        weights: Any = self
        if self.supervision is not None:
            weights = JoinableWeights(here, receivers=self.rollouts.pool, version=self.version)
            self._supervise(weights, self.supervision)
        resizing = asyncio.create_task(self._resize())
        try:
            await self._train_with(weights)
        finally:
            self.sizes = {name: one.size for name, one in self.supervisors.items()}
            resizing.cancel()
            await asyncio.wait([resizing])
            for supervisor in self.supervisors.values():
                await supervisor.stop()

    def _supervise(self, weights: JoinableWeights, settings: SupervisionSettings) -> None:
        async def join_rollout(name: str, handle: Any, take_in: Callable[[], None]) -> None:
            def write_down() -> None:
                self.joined.append((name, handle.version, set(self.live)))
                take_in()

            await weights.join(name, handle, take_in=write_down)

        async def join_reward(name: str, handle: Any, take_in: Callable[[], None]) -> None:
            take_in()

        for pool, join in ((self.rollouts.pool, join_rollout), (self.rewards.pool, join_reward)):
            hiring = Hiring(self.make, lambda handle: handle.start.remote(), self.group_deadline_s, join)
            self.supervisors[pool.role] = Supervisor(
                pool, hiring, settings=settings, seed=self.seed, told=self.told.append
            )

    def make(self, name: str) -> Any:
        """A new actor, healthy or not."""
        ailment: tuple[int, Ailment] | None = None
        if self.rng.random() < self.ill_share:
            ailment = (self.rng.randrange(-5, 20), self.rng.choice(["mute", "stuck", "hung", "dead", "engine dead"]))
        self.actors[name] = FakeActor(name, self, ailment=self.ailments.get(name, ailment))
        return self.actors[name]

    async def _resize(self) -> None:
        for at_s, role, size in self.resizes:
            await asyncio.sleep(max(0.0, at_s - asyncio.get_running_loop().time()))
            self.supervisors[role].resize(size)

    async def _train_with(self, weights: Any) -> None:
        here: Any = self
        parts = Parts(
            prompts=Issuer(self.prompts, self.ledger, returned=self.returned),
            ledger=self.ledger,
            rollouts=here,
            rewards=here,
            learner=here,
            weights=weights,
            observer=SimpleNamespace(dropped=self.dropped, step=self.step),  # type: ignore[arg-type]
            version=self.version,
            save=self.save,
        )
        last_step = self.first_step + self.steps
        async with asyncio.timeout(self.stop_s):
            await train(self.settings, parts, first_step=self.first_step, last_step=last_step, save_every=4)

    def keep(self) -> None:
        """What `train_and_keep` does when a run ends early: a save of what the learner holds."""
        if self.steps_done and self.saved[-1:] != [self.steps_done[-1] + 1]:
            self.saved.append(self.steps_done[-1] + 1)
            self.ledger.durable(step=self.saved[-1], version=self.version)
            self.saved_version, self.saved_chain = self.version, list(self.chain)
            self.saved_prompts = self.prompts.state()

    async def pass_time(self, call: str, *, longest_s: float | None = None) -> None:
        """Some work; and the fault that is due."""
        longest_s = self.delay_s if longest_s is None else longest_s
        # Half of all work ends at once or in the same tick as other work: ties are where races hide.
        await asyncio.sleep(self.rng.choice([0.0, 0.0, longest_s, self.rng.uniform(0, longest_s)]))
        self.calls[call] += 1
        num_good, error = self.fatal.get(call, (-1, None))
        if error is not None and self.calls[call] > num_good:
            self.fatal_raised.append(error)
            raise error

    # ---- pools ---------------------------------------------------------------------------------------------------

    async def play(self, prompt: PromptRecord, *, group: int) -> PlayedGroup:
        self.started.add(group)
        try:
            return await self.rollouts.play(prompt, group=group)
        except BaseException as error:
            self._cut_off(group, error)
            raise

    async def judge(self, played: PlayedGroup) -> ScoredGroup:
        group: Any = played.ref
        try:
            judged = self.judged[group] = await self.rewards.judge(played)
        except BaseException as error:
            self._cut_off(group, error)
            raise
        if judged.has_signal:
            self.ends.append("")
        return judged

    async def recall(self, issue: Issue) -> ScoredGroup:
        self.started.add(issue.group)
        await self.pass_time("judge")
        if self.rng.random() < self.lost_share:
            raise SpoolError("its bytes are not those that were written")
        self.recalled.append(issue.group)
        found = self.inherited[issue.group]
        oldest, newest = (replace(version, incarnation=issue.incarnation) for version in found.versions)
        self.judged[issue.group] = replace(
            found,
            states=(),
            header=SimpleNamespace(  # type: ignore[arg-type]
                has_signal=found.has_signal, versions=(oldest, newest), spooled=issue.spooled
            ),
        )
        self.ends.append("")
        return self.judged[issue.group]

    def _cut_off(self, group: int, error: BaseException) -> None:
        self.cut_off.add(group)
        if isinstance(error, RolloutError | JudgeError):
            self.failed.add(group)

    def maybe_fail(self, error: Exception) -> None:
        if self.rng.random() < self.fail_share / 2:  # a group meets this twice
            raise error

    # ---- learner -------------------------------------------------------------------------------------------------

    async def prepare(self, refs: Sequence[int], states: Sequence[Sequence[ShippedStates]]) -> list[int]:
        for ref, shipped in zip(refs, states, strict=True):
            there = {name for one in shipped for name in one.names}
            heard = set() if ref in self.recalled else set(self.heard[ref])
            assert heard <= there, "a clip's states are with no batch of its group"
        self.consumed_by = self.version
        self.taken += refs
        self.ages += [self.version.number - self.judged[ref].oldest_version.number for ref in refs]
        self.abandoned += [ref for ref in refs if not self.sampled_by[ref] <= set(self.chain)]
        known = {group for one in self.chain[1:] for group in self.seen[one]}
        self.seen_again += [ref for ref in refs if ref in known]
        await self.pass_time("prepare")
        return list(refs)

    def minibatches(self, prepared: Sequence[int]) -> list[int]:
        return list(range(self.settings.epochs * self.settings.minibatches))

    async def forward_backward(self, part: int) -> None:
        await self.pass_time("forward_backward")
        self._maybe_diverge("loss is nan")

    async def optimizer_step(self) -> Weights:
        assert self.publishing == 0, "two publishes would be in flight"
        await self.pass_time("optimizer_step", longest_s=self.delay_s / 10)
        self._maybe_diverge("gradient norm is inf")
        self.version = replace(self.version, number=self.version.number + 1)
        self.chain.append(next(_IDS))
        self.seen[self.chain[-1]] = self.taken[-self.settings.groups_per_step :]
        return Weights(self.version)

    def _maybe_diverge(self, what: str) -> None:
        if self.rng.random() < self.diverge_share / 2:
            self.diverged += 1
            error = DivergenceError(what)
            if self.diverged == self.settings.max_divergences_in_a_row:
                self.fatal_raised.append(error)
            raise error

    async def broadcast(self, snapshot: Weights, *, to: Any = None) -> None:
        """Engines swap one after another, each between two turns of what it plays; those that do not are left out."""
        receivers = to or self.rollouts.pool
        self.publishing += to is None
        try:
            for name, actor in self.rng.sample(list(self.actors.items()), len(self.actors)):
                if name in receivers.handles and not await actor.take_weights(snapshot.version):
                    receivers.evict(name, reason=f"it did not take weights {snapshot.version}")
                    if to is not None:
                        raise WeightSyncError(f"{name} did not take weights {snapshot.version}")
            if to is None and not receivers.num_alive:
                raise WeightSyncError(f"weights {snapshot.version} reached no engine")
        finally:
            self.publishing -= to is None

    # ---- what the loop reports -----------------------------------------------------------------------------------

    def dropped(self, reason: str) -> None:
        self.drops.append(reason)
        self.ends.append(reason)

    def step(
        self, step: int, *, groups: Sequence[ScoredGroup], consumed_by: WeightVersion, snapshot: Weights, window: Any
    ) -> None:
        assert (consumed_by, snapshot.version) == (self.consumed_by, self.version), "ages counted from other weights"
        self.steps_done.append(step)
        self.trained += [group.ref for group in groups]  # type: ignore[misc]
        self.windows.append(window)
        self.diverged = 0

    async def save(self, step: int) -> None:
        prompts = self.prompts.state()
        await self.pass_time("save")
        self.saved_prompts = prompts
        self.ledger.durable(step=step, version=self.version)
        self.saved_version, self.saved_chain = self.version, list(self.chain)
        self.saved.append(step)
