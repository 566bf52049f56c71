"""The algorithm, from top to bottom.

    prompts ──admit──▶ play (rollout actors) ──dialogues──▶ judge (reward actors) ──settle──▶ [staleness window]
       ▲                  ▲                                                                        │ take
       │ release          │ weights v+1 (pulled while generating, swapped between tokens)          ▼
       └──── publish ◀────┴──────────────────────── learner group (DeepSpeed ranks) ◀── experience

The driver moves headers and references only: sound, features and experience never enter it.

A step is one batch of `groups_per_step` groups. The learner takes `epochs * minibatches` optimizer steps on it, and
only the weights after the last of them are published. What an algorithm is: `learner/algorithms`; how a batch becomes
advantages and micro-batches, with the log-probabilities that need the model first: `learner/experience_plan.py`.

The ledger (`experience/ledger.py`) knows of every group that is dealt until it was trained on or dropped with a reason:
the loop says what happens to one where it happens, and never waits for the disk.

When a group cannot be played or judged, it is dropped with its reason and the next prompt takes its place; retries and
the eviction of dead actors are the pools' (`actors/pool.py`). Any other error ends `train`. Starting the actors,
the doctor, evaluation before and after, saving on the way out and resuming are in `recipes/`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from rlaudio.actors.pool import RewardPool, RolloutPool, ScoredGroup
from rlaudio.aio import started, undisturbed
from rlaudio.collecting import rare_full_collections
from rlaudio.config import AlgorithmSettings
from rlaudio.errors import DivergenceError, JudgeError, LearnerError, RolloutError, SpoolError
from rlaudio.experience.issuing import Issue, Issuer
from rlaudio.experience.ledger import Ledger
from rlaudio.experience.window import CUT_OFF, DIVERGED, NO_SIGNAL, StalenessWindow, Ticket
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.messages import PublishedSnapshot
from rlaudio.observe.observer import Observer
from rlaudio.types import WeightVersion
from rlaudio.weights.base import WeightTransport


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything the loop drives, running when it begins; `version` is what engines and learner hold then."""

    prompts: Issuer
    ledger: Ledger
    rollouts: RolloutPool
    rewards: RewardPool
    learner: LearnerGroup
    weights: WeightTransport
    observer: Observer
    version: WeightVersion
    save: Callable[[int], Awaitable[None]]


async def train(run: AlgorithmSettings, parts: Parts, *, first_step: int, last_step: int, save_every: int) -> None:
    """Train for steps [first_step, last_step), saving every `save_every` of them and at the end.

    A batch without a finite loss and gradient is dropped and its step taken with the next one: the learner keeps the
    weights of before, and whatever earlier minibatches of the batch made of them goes to the engines.

    Raises:
        StarvedError: group after group was dropped. EngineError, WeightSyncError: every actor of a pool is gone.
        DivergenceError: `max_divergences_in_a_row` batches. LearnerError: a rank died or outlived its deadline.
        StalenessError: a token is older than the window promises.
        All inside an ExceptionGroup.
    """

    def dropped(ticket: Ticket, reason: str) -> None:
        parts.observer.dropped(reason)
        parts.ledger.dropped(ticket.group, reason=reason)

    window: StalenessWindow[ScoredGroup] = StalenessWindow(run, dropped=dropped)

    async def experience_of(issue: Issue) -> ScoredGroup:
        if issue.spooled is not None:
            try:
                return await parts.rewards.recall(issue)
            except SpoolError as error:
                parts.ledger.reissued(issue.group, reason=type(error).__name__)
        dialogues = await parts.rollouts.play(issue.record, group=issue.group)
        experience = await parts.rewards.judge(dialogues)
        parts.ledger.ready(issue.group, experience)
        return experience

    async def roll_and_score(ticket: Ticket, issue: Issue) -> None:
        try:
            experience = await experience_of(issue)
        except (RolloutError, JudgeError) as error:  # expected: data, not a crash
            return await window.drop(ticket, reason=type(error).__name__, detail=str(error))
        if run.drops_groups_without_signal and not experience.has_signal:
            return await window.drop(ticket, reason=NO_SIGNAL)
        return await window.settle(ticket, experience)

    async def produce() -> None:
        async with asyncio.TaskGroup() as groups:
            while True:
                await window.slot()  # the only backpressure
                issue = parts.prompts.next()
                groups.create_task(roll_and_score(window.admit(issue.group), issue))

    async def publish(snapshot: PublishedSnapshot, tickets: Sequence[Ticket]) -> None:
        await parts.weights.broadcast(snapshot)
        window.release(tickets)

    async def learn(tasks: asyncio.TaskGroup) -> None:
        version, step, num_diverged = parts.version, first_step, 0
        publishing: asyncio.Task[None] | None = None
        while step < last_step:
            tickets, groups = zip(*await window.take(consumed_by=version), strict=True)
            snapshot: PublishedSnapshot | None = None
            try:
                # Advantages and reference log-probs; encoder states are fetched by the ranks that lack them.
                prepared = await parts.learner.prepare([one.ref for one in groups], [one.states for one in groups])
                for part in parts.learner.minibatches(prepared):
                    await parts.learner.forward_backward(part)  # raises DivergenceError
                    if publishing is not None:
                        await publishing  # at most one publish in flight
                    # Whole even on Ctrl-C: the ranks go on anyway, and a save must not say less than they did.
                    snapshot = await undisturbed(parts.learner.optimizer_step())  # raises DivergenceError
            except DivergenceError as error:  # the learner holds its last good state
                window.lose(tickets, reason=DIVERGED)
                num_diverged += 1
                if num_diverged >= run.max_divergences_in_a_row:
                    raise DivergenceError(f"{num_diverged} batches in a row, the last: {error}") from error
                if snapshot is None:
                    window.release(tickets)
                else:
                    publishing = await started(tasks, publish(snapshot, tickets))
                    version = snapshot.version
                continue
            except BaseException as error:
                if snapshot is not None and not isinstance(error, LearnerError):
                    window.lose(tickets, reason=CUT_OFF)  # the weights that are saved have seen a part of it
                raise
            assert snapshot is not None, "a batch has a minibatch"
            num_diverged = 0
            parts.ledger.trained([ticket.group for ticket in tickets], step=step)
            parts.observer.step(step, groups=groups, consumed_by=version, snapshot=snapshot, window=window.stats())
            publishing = await started(tasks, publish(snapshot, tickets))
            version, step = snapshot.version, step + 1
            if step % save_every == 0 or step == last_step:
                await parts.save(step)
        if publishing is not None:
            await publishing

    with rare_full_collections():
        async with asyncio.TaskGroup() as tasks:
            producing = tasks.create_task(produce())
            await learn(tasks)
            producing.cancel()
