"""Pools of Ray actors that play and judge. What fails with its actor is asked of another one, under the same ticket."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError

from rlaudio.actors.members import DEATHS, ActorPool, line
from rlaudio.actors.reward import RewardWorker, ScoredHeader
from rlaudio.actors.rollout import PlayedHeader, PlayOrder, RolloutWorker
from rlaudio.actors.serving import serving_environment
from rlaudio.config import RunConfig
from rlaudio.data.records import record_sounds
from rlaudio.errors import EngineError, JudgeError, RolloutError, TurnTimeoutError, VerdictTimeoutError
from rlaudio.evals.summary import DialogueResult
from rlaudio.experience.issuing import Issue
from rlaudio.experience.spool import Spooled
from rlaudio.experience.states import SharedStates, ShippedStates
from rlaudio.observe.metrics import GroupStats
from rlaudio.types import PromptRecord, WeightVersion

_LOG = logging.getLogger("rlaudio.actors")

JUDGE_ATTEMPTS = 2
"""Actors that are asked for one judgment; a group whose judging ends both is dropped."""


StartCall = Callable[[ActorHandle[Any]], ray.ObjectRef]
Place = Callable[[str], Mapping[str, Any]]


def anywhere(role: str) -> Mapping[str, Any]:
    """Leaves it to Ray."""
    return {}


@dataclass(frozen=True, slots=True)
class PlayedGroup:
    """A played group: its header here, its dialogues (Arrow rows) in Ray's object store.

    Attributes:
        ref: the dialogues.
        states: encoder states of their clips; nothing when none are shipped.
    """

    record: PromptRecord
    header: PlayedHeader
    ref: ray.ObjectRef
    states: tuple[ShippedStates, ...]


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A judged group: its header here, its experience (Arrow rows) in Ray's object store.

    Attributes:
        ref: the experience.
        states: encoder states of its clips, as they were played: no reward actor touches them.
        played: the header of the dialogues it was made from.
    """

    record: PromptRecord
    header: ScoredHeader
    ref: ray.ObjectRef
    states: tuple[ShippedStates, ...]
    played: PlayedHeader

    @property
    def has_signal(self) -> bool:
        return self.header.has_signal

    @property
    def stats(self) -> GroupStats:
        return replace(
            self.header.stats,
            num_clips=len(self.played.clips),
            encoder_forwards=self.played.encoder_forwards,
            states_bytes=self.played.states_bytes,
        )

    @property
    def oldest_version(self) -> WeightVersion:
        return self.header.versions[0]

    @property
    def versions(self) -> tuple[WeightVersion, WeightVersion]:
        return self.header.versions

    @property
    def spooled(self) -> Spooled | None:
        return self.header.spooled


class RolloutPool:
    """Plays groups on rollout actors. Infrastructure failures are retried here, under the same ticket.

    Args:
        config: the run's.
        environment: variables of every actor.
        told: see `ActorPool`.
        place: role -> Ray's options that say where its next actor goes.
        running: actors of an earlier run that go on in this one; as many are made as are missing.
        pool: a pool that runs already, for tests; None makes the configured one.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        environment: Mapping[str, str],
        told: Callable[[str], None] = _LOG.warning,
        place: Place = anywhere,
        running: Sequence[ActorHandle[Any]] = (),
        pool: ActorPool | None = None,
    ) -> None:
        self._config = config
        self._purpose = f"run{config.run.seed}"
        self._environment, self._place = environment, place
        self._running = tuple(running)
        self._states = SharedStates()
        self.pool = pool or ActorPool(
            "rollout",
            _named("rollout", config.rollout.actors, running=self._running, make=self.make),
            alive_deadline_s=config.rollout.alive_deadline_s,
            told=told,
        )

    def make(self) -> ActorHandle[Any]:
        """A new actor, not started and no member yet; Ray finds room for it, or waits until there is some."""
        config, rollout = self._config, self._config.rollout
        extra = serving_environment(
            rollout.engine, model=config.model.path, dtype=config.model.dtype, on_gpu=rollout.num_gpus > 0
        )
        options = _actor_options(rollout.num_cpus, rollout.num_gpus, {**self._environment, **extra})
        remote = ray.remote(RolloutWorker).options(**options, **self._place("rollout"))
        return remote.remote(config, on_gpu=rollout.num_gpus > 0)

    async def start(self, version: WeightVersion) -> None:
        """Start every actor; engines of an earlier run hold its weights until the first broadcast."""

        def call(handle: ActorHandle[Any]) -> ray.ObjectRef:
            if handle in self._running:
                return handle.start_over.remote(self._config, version)
            return self.starting(version)(handle)

        await self.pool.start(call, deadline_s=self._config.rollout.start_deadline_s)

    def starting(self, version: WeightVersion) -> StartCall:
        """The call that starts an actor; `version` is what its checkpoint's weights count as."""
        return lambda handle: handle.start.remote(version)

    async def play(self, record: PromptRecord, *, group: int) -> PlayedGroup:
        """Play one training group.

        Raises:
            RolloutError: the group could not be played in `rollout.attempts` tries.
        """
        settings, algorithm = self._config.sampling, self._config.algorithm
        seed = f"{self._purpose}/train/{group}"
        order = PlayOrder(group, algorithm.group_size, settings.temperature, seed, ship_states=True, augment=True)
        return await self._play(record, order)

    async def play_greedy(self, record: PromptRecord, *, index: int, purpose: str, silence: bool) -> PlayedGroup:
        """Play one held-out dialogue without sampling."""
        return await self._play(record, PlayOrder(index, 1, 0.0, f"{self._purpose}/{purpose}", silence=silence))

    async def sample(self, record: PromptRecord, *, index: int, num_siblings: int, purpose: str) -> PlayedGroup:
        """Play so many dialogues of one record as training would, for something else than training.

        Args:
            index: unlike that of any other group in play.

        Raises:
            As `play`.
        """
        seed, temperature = f"{self._purpose}/{purpose}", self._config.sampling.temperature
        return await self._play(record, PlayOrder(index, num_siblings, temperature, seed, augment=True))

    async def _play(self, record: PromptRecord, order: PlayOrder) -> PlayedGroup:
        attempts, deadline_s = self._config.rollout.attempts, self._config.rollout.group_deadline_s
        failures: list[str] = []
        known = self._states.find(part.sha256 for _, part in record_sounds(record)) if order.ship_states else {}
        order = replace(order, shipped=frozenset(known))
        while len(failures) < attempts:
            tried = replace(order, seed=f"{order.seed}/{len(failures)}")
            async with self.pool.lease() as member:
                asked_s = asyncio.get_running_loop().time()
                refs = member.handle.play.options(num_returns=3).remote(record, tried)
                try:
                    header = await self.pool.call(member, refs[0], deadline_s=deadline_s)
                    needed = (known[name] for name in header.clips if name in known)
                    return PlayedGroup(record, header, refs[1], self._states.add(header.shipped, refs[2], known=needed))
                except DEATHS as error:
                    if member.is_leaving:
                        continue  # its pool shrank: handed over, which is no failed attempt
                    self.pool.evict(member.name, reason=line(error))
                    failures.append(f"{member.name} died ({line(error)})")
                except TimeoutError:
                    await self.pool.examine(member, asked_s=asked_s)
                    failures.append(f"{member.name} gave nothing in {deadline_s:g} s")
                except TurnTimeoutError as error:
                    if not await self.pool.examine(member, asked_s=asked_s):
                        raise  # a slow dialogue would be slow again
                    failures.append(f"{member.name}: {line(error)}")
                except RolloutError:
                    raise
                except EngineError as error:
                    failures.append(f"{member.name}: {line(error)}")
        raise RolloutError(
            f"group {order.group} of record {record.id!r} failed {attempts} times: " + "; ".join(failures)
        )


class RewardPool:
    """Judges groups on reward actors. A judgment that dies with its actor is asked of another one.

    Args:
        config: the run's.
        environment: variables of every actor.
        told: see `ActorPool`.
        place, running, pool: as of `RolloutPool`.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        environment: Mapping[str, str],
        told: Callable[[str], None] = _LOG.warning,
        place: Place = anywhere,
        running: Sequence[ActorHandle[Any]] = (),
        pool: ActorPool | None = None,
    ) -> None:
        self._config = config
        self._environment, self._place = environment, place
        self._running = tuple(running)
        self.pool = pool or ActorPool(
            "rewards",
            _named("reward", config.rewards.actors, running=self._running, make=self.make),
            alive_deadline_s=config.rewards.alive_deadline_s,
            told=told,
        )

    def make(self) -> ActorHandle[Any]:
        """As `RolloutPool.make`."""
        config, rewards = self._config, self._config.rewards
        extra: dict[str, str] = {}
        if rewards.judge_model.path:
            extra = serving_environment(
                rewards.judge_model.engine,
                model=rewards.judge_model.path,
                dtype=rewards.judge_model.dtype,
                on_gpu=rewards.num_gpus > 0,
            )
        options = _actor_options(rewards.num_cpus, rewards.num_gpus, {**self._environment, **extra})
        remote = ray.remote(RewardWorker).options(**options, **self._place("rewards"))
        return remote.remote(config, on_gpu=rewards.num_gpus > 0)

    async def start(self) -> None:
        def call(handle: ActorHandle[Any]) -> ray.ObjectRef:
            return handle.start_over.remote(self._config) if handle in self._running else self.starting()(handle)

        await self.pool.start(call, deadline_s=self._config.rewards.start_deadline_s)

    def starting(self) -> StartCall:
        """The call that starts an actor."""
        return lambda handle: handle.start.remote()

    async def judge(self, played: PlayedGroup) -> ScoredGroup:
        """Score a played group and build its experience.

        Raises:
            JudgeError: too few siblings could be judged, a living actor gave no judgment within the deadline, every
                actor that was asked died or was mute, or the dialogues are lost.
            EngineError: no reward actor is alive.
        """
        header, refs = await self._answer(
            lambda handle: handle.judge.options(num_returns=2).remote(played.record, played.ref),
            played.record,
            late=lambda header: str(header.late),
        )
        return ScoredGroup(played.record, header, refs[1], played.states, played.header)

    async def recall(self, issue: Issue) -> ScoredGroup:
        """Experience that an earlier life of the run left in the spool, under this life's names of the same weights.

        Its encoder states are gone: the ranks encode its clips themselves.

        Raises:
            SpoolError: the file is gone or damaged. JudgeError, EngineError: as `judge`.
        """
        (header, played), refs = await self._answer(
            lambda handle: handle.recall.options(num_returns=2).remote(issue.spooled), issue.record
        )
        oldest, newest = (replace(version, incarnation=issue.incarnation) for version in header.versions)
        return ScoredGroup(issue.record, replace(header, versions=(oldest, newest)), refs[1], (), played)

    async def evaluate(self, played: PlayedGroup) -> DialogueResult:
        """Judge one held-out dialogue. A source that was slow is left out of it, one that hangs is asked elsewhere.

        Raises:
            As `judge`.
        """
        result: DialogueResult
        result, _ = await self._answer(
            lambda handle: [handle.evaluate.remote(played.record, played.ref)], played.record
        )
        return result

    async def grade(self, played: PlayedGroup) -> list[DialogueResult]:
        """Judge every sibling of a group by itself. Sources are excused as in `evaluate`.

        Raises:
            As `judge`.
        """
        results: list[DialogueResult]
        results, _ = await self._answer(lambda handle: [handle.grade.remote(played.record, played.ref)], played.record)
        return results

    async def _answer(
        self,
        call: Callable[[ActorHandle[Any]], Sequence[ray.ObjectRef]],
        record: PromptRecord,
        *,
        late: Callable[[Any], str] = lambda answer: "",
    ) -> tuple[Any, Sequence[ray.ObjectRef]]:
        """The first return value of `call`, fetched, and the references to all of them.

        Args:
            late: says of an answer, in words, that a source gave nothing in time and the answer does without it. Its
                actor is then looked at as after a time-out: one that hangs is left out, and another one asked.
        """
        deadline_s = self._config.rewards.group_deadline_s
        losses: list[str] = []
        partial: tuple[Any, Sequence[ray.ObjectRef]] | None = None
        while len(losses) < JUDGE_ATTEMPTS:
            async with self.pool.lease() as member:
                asked_s = asyncio.get_running_loop().time()
                refs = call(member.handle)
                try:
                    answer = await self.pool.call(member, refs[0], deadline_s=deadline_s)
                    slow = late(answer)
                    if not slow or not await self.pool.examine(member, asked_s=asked_s):
                        return answer, refs
                    partial = answer, refs
                    losses.append(f"{member.name}: {slow}")
                except DEATHS as error:
                    if member.is_leaving:
                        continue  # handed over, as in `RolloutPool`
                    self.pool.evict(member.name, reason=line(error))
                    losses.append(f"{member.name} died ({line(error)})")
                except TimeoutError as error:
                    if not await self.pool.examine(member, asked_s=asked_s):
                        raise JudgeError(
                            f"{member.name} gave no judgment of record {record.id!r} within {deadline_s:g} s; "
                            "raise rewards.group_deadline_s"
                        ) from error
                    losses.append(f"{member.name} gave nothing in {deadline_s:g} s")
                except VerdictTimeoutError as error:
                    left_out = await self.pool.examine(member, asked_s=asked_s)
                    if error.partial is not None:
                        partial = error.partial, refs
                    if not left_out:
                        if partial is None:
                            raise
                        return partial
                    losses.append(f"{member.name}: {line(error)}")
                except ObjectLostError as error:
                    raise JudgeError(
                        f"the dialogues of record {record.id!r} are lost with the node that held them ({line(error)})"
                    ) from error
        if partial is not None:
            return partial
        raise JudgeError(f"record {record.id!r} could not be judged: " + "; ".join(losses))


def _named(
    prefix: str, count: int, *, running: Sequence[ActorHandle[Any]], make: Callable[[], ActorHandle[Any]]
) -> dict[str, ActorHandle[Any]]:
    handles = [*running, *(make() for _ in range(len(running), count))]
    return {f"{prefix}-{index}": handle for index, handle in enumerate(handles)}


def _actor_options(num_cpus: float, num_gpus: float, environment: Mapping[str, str]) -> dict[str, Any]:
    return {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "runtime_env": {"env_vars": dict(environment)},
        "max_concurrency": 1000,
    }
