"""Training to its end: through the loss of learner ranks, and saved where it stands when it ends early.

Engines and judges outlive the learner's ranks. When a rank is lost, all ranks end, and as many start again, after a
pause that doubles with every loss without a new checkpoint (`supervision.first_pause_s`, `longest_pause_s`); ledger and
prompts go back to the last checkpoint, and so do the weights, in a new incarnation, which the engines get as they get
any others. What was played and not trained on is used where it is fresh enough, as after `--resume`.
"""

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlaudio.actors.supervisor import pause_before_restart
from rlaudio.aio import first_error
from rlaudio.config import RunConfig
from rlaudio.errors import LearnerError, RanksLostError, RlaudioError, WeightSyncError
from rlaudio.learner.group import LearnerGroup
from rlaudio.loop import Parts, train
from rlaudio.observe.progress import Progress
from rlaudio.recipes.restoring import Memory, gone_back
from rlaudio.runs import RunFolder
from rlaudio.types import WeightVersion
from rlaudio.weights.base import WeightTransport

LOOK_EVERY_S = 15.0
"""How often ranks that wait for a batch are asked whether they live."""


async def train_through_losses(
    config: RunConfig,
    parts: Parts,
    memory: Memory,
    *,
    folder: RunFolder,
    progress: Progress,
    went_back: Callable[[int], None],
) -> None:
    """Train, and export the policy to the run's `model/`. Ranks that are lost meanwhile start again, after a pause.

    Args:
        went_back: hears of the step that training goes on from after a loss.

    Raises:
        RanksLostError: once more than `learner.max_restarts` times without a new checkpoint in between.
        As `train_and_keep`.
    """
    num_losses, pause_s, goes_on = 0, 0.0, True
    jitter = random.Random(f"learner/{config.run.seed}")
    while goes_on:
        try:
            if num_losses:
                await parts.learner.stop()  # what is left of them has nothing to wait for
                await asyncio.sleep(pause_s)
                parts = await _come_back(config, parts, memory)
            await train_and_keep(config, parts, first_step=memory.step, progress=progress)
            await parts.learner.export(folder.path / "model")
            goes_on = False
        except RanksLostError as error:
            limit, has_new = config.learner.max_restarts, memory.store.newest() != memory.checkpoint
            num_losses = 1 if has_new else num_losses + 1
            if num_losses > limit:
                raise RanksLostError(
                    f"{error}; the ranks were started again {limit} times (learner.max_restarts) without a new "
                    "checkpoint: look at their logs, and go on with --resume, with other learner.ranks if need be"
                ) from error
            pause_s = pause_before_restart(num_losses, config.supervision, chance=jitter.random())
            progress.say(
                f"{error}; the ranks start again in {pause_s:.1f} s, {num_losses} of {limit} times without a new "
                "checkpoint"
            )
            memory = gone_back(memory, config, folder=folder, told=progress.say)
            went_back(memory.step)


async def _come_back(config: RunConfig, parts: Parts, memory: Memory) -> Parts:
    learner = config.learner
    await parts.learner.restart(memory.version, least_ranks=learner.least_ranks or learner.ranks)
    try:
        version = await bring_back(parts.learner, parts.weights, memory.checkpoint)
    except WeightSyncError as error:
        if why := await parts.learner.find_lost():
            raise RanksLostError(f"{why}; its weights did not reach the engines: {error}") from error
        raise
    return replace(parts, prompts=memory.prompts, version=version)


async def _watch_idle(learner: LearnerGroup) -> None:
    """Raises RanksLostError: a rank died while nobody asked it for anything.

    Its weights are lost with it. Where all engines are lost too, those that come find none to join with, and there
    would never be a batch that the ranks are asked to train on.
    """
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        if not learner.is_busy and (why := await learner.find_lost()):
            raise RanksLostError(f"{why}, waiting for a batch")


async def bring_back(learner: LearnerGroup, weights: WeightTransport, checkpoint: Path | None) -> WeightVersion:
    """A learner that has just started, and the engines, take the weights of a checkpoint, or of `model.path`."""
    if checkpoint is not None:
        await learner.load(checkpoint)
    restored = await learner.snapshot()
    await weights.broadcast(restored)
    return restored.version


async def train_and_keep(config: RunConfig, parts: Parts, *, first_step: int, progress: Progress) -> None:
    """Train. When that ends early, save what was learned since `first_step`, then let the error go on, bare.

    After a LearnerError nothing is saved: its weights are gone, or not to be trusted.

    Raises:
        RanksLostError: also where the first that was seen of it was another error, of weights that did not come.
    """

    async def keep(why: str) -> None:
        step = parts.observer.steps_done
        if step <= first_step:
            return
        progress.say(f"{why}: saving a checkpoint of step {step}")
        try:
            await parts.save(step)
        except RlaudioError as error:  # must not hide why the run ends
            progress.say(f"the checkpoint could not be saved: {error}")

    try:
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(_watch_idle(parts.learner))
            await train(
                config.algorithm,
                parts,
                first_step=first_step,
                last_step=config.run.steps,
                save_every=config.run.checkpoint_every,
            )
            watching.cancel()
    except asyncio.CancelledError:
        await keep("stopping")
        raise
    except ExceptionGroup as group:
        lost = group.subgroup(RanksLostError)
        error = first_error(lost or group)
        if group.subgroup(LearnerError) is None and (why := await parts.learner.find_lost()):
            raise RanksLostError(f"{why}; training ended by {type(error).__name__}: {error}") from group
        if group.subgroup(LearnerError) is None:
            await keep(f"training ended by {type(error).__name__}")
        raise error from group
