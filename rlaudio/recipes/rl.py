"""One reinforcement-learning run from start to report: builds the parts, evaluates, trains, evaluates, writes."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray.actor import ActorHandle

from rlaudio.actors.members import DEATHS, ActorPool
from rlaudio.actors.pool import RewardPool, RolloutPool
from rlaudio.config import RunConfig
from rlaudio.data.run_data import RunData
from rlaudio.doctor.sides import RaySides
from rlaudio.errors import DataError
from rlaudio.evals.heldout import evaluate
from rlaudio.evals.summary import EvaluationResult, Phase, Report, read_evaluation, summarise, write_evaluation
from rlaudio.learner.group import LearnerGroup
from rlaudio.loop import Parts
from rlaudio.observe.judge_watch import JudgeWatch
from rlaudio.observe.observer import Observer
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import Tracker, read_curves
from rlaudio.observe.trap import TrapMonitor, held_out_trap
from rlaudio.recipes.cluster import actor_environment, num_nodes
from rlaudio.recipes.control import commanded
from rlaudio.recipes.doctor import PROBE_DEADLINE_S, examine_before_training, trainer_spec
from rlaudio.recipes.kept import Kept
from rlaudio.recipes.places import reserve
from rlaudio.recipes.restoring import Memory, remembering, require_shared_roots, with_spool
from rlaudio.recipes.scaling import Scaling, autoscaling, supervised
from rlaudio.recipes.training import bring_back, train_through_losses
from rlaudio.registry import load_object
from rlaudio.rewards.generative import GenerativeJudge
from rlaudio.rewards.serving import JudgeHealth
from rlaudio.runs import RunFolder
from rlaudio.types import WeightVersion
from rlaudio.weights.base import Broadcast, WeightTransport
from rlaudio.weights.joining import JoinableWeights
from rlaudio.weights.transports import sync_metrics, transport_of

_HEALTH_DEADLINE_S = 5.0
"""For an actor to say how its judges are: it answers at once, unless its process hangs."""


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """What a finished run leaves for its report.

    Attributes:
        before, after: one evaluation per held-out set.
        report: the content of `report.json`.
    """

    before: list[EvaluationResult]
    after: list[EvaluationResult]
    report: Report


async def run_rl(
    config: RunConfig,
    *,
    data: RunData,
    folder: RunFolder,
    tracker: Tracker,
    progress: Progress,
    resume: bool,
    timings_s: Mapping[str, float],
    kept: Kept | None = None,
) -> RunOutcome:
    """Run the whole recipe inside a joined Ray cluster.

    A run that ends early (Ctrl-C, starved, engines lost) saves where it stands, so it can be resumed.

    Args:
        kept: engines and judges of the stage before, and for the stage after, in a pipeline.
    """
    require_shared_roots(config, folder, num_nodes=num_nodes())
    with remembering(config, data=data, folder=folder, resume=resume, told=progress.say) as memory:
        return await _run(
            config,
            data=data,
            folder=folder,
            tracker=tracker,
            progress=progress,
            memory=memory,
            timings_s=timings_s,
            kept=kept,
        )


async def _run(
    config: RunConfig,
    *,
    data: RunData,
    folder: RunFolder,
    tracker: Tracker,
    progress: Progress,
    memory: Memory,
    timings_s: Mapping[str, float],
    kept: Kept | None,
) -> RunOutcome:
    started = time.monotonic()
    goes_on = kept is not None and kept.waits
    progress.stage(f"starting {'the learner, engines go on' if goes_on else 'engines and learner'}")
    async with (
        running_actors(
            with_spool(config, folder),
            version=memory.version,
            checkpoint=memory.checkpoint,
            told=progress.say,
            synced=lambda sent: tracker.log(sync_metrics(sent), step=sent.version.number),
            kept=kept,
        ) as actors,
        resizable(config, actors, folder=folder.path, told=progress.say),
    ):
        startup_s = time.monotonic() - started
        await examine_before_training(
            config,
            config_path=folder.config_yaml,
            records=data.train,
            sides=RaySides(actors.rollouts, actors.learner, actors.weights, deadline_s=PROBE_DEADLINE_S),
            path=folder.path / "doctor.json",
            tracker=tracker,
            progress=progress,
        )

        def trap_before(step: int) -> TrapMonitor:
            return trap_monitor(config, curves=folder.metrics / "metrics.jsonl", before=step)

        observer = Observer(
            tracker=tracker,
            progress=progress,
            num_steps=config.run.steps,
            pools=(actors.rollouts.pool, actors.rewards.pool),
            gauges=actors.watch.gauges,
            trap=trap_before(memory.step),
        )
        before = await evaluated(
            config, data, actors, phase="before", step=memory.step, folder=folder, progress=progress
        )
        parts = Parts(
            prompts=memory.prompts,
            ledger=memory.ledger,
            rollouts=actors.rollouts,
            rewards=actors.rewards,
            learner=actors.learner,
            weights=actors.weights,
            observer=observer,
            version=actors.version,
            save=memory.saver(actors.learner),
        )
        train_started = time.monotonic()
        progress.stage("training")
        await train_through_losses(
            config,
            parts,
            memory,
            folder=folder,
            progress=progress,
            went_back=lambda step: observer.went_back(step, trap=trap_before(step)),
        )
        train_s = time.monotonic() - train_started
        after = await evaluated(
            config, data, actors, phase="after", step=config.run.steps, folder=folder, progress=progress
        )
    totals = observer.totals
    report = summarise(
        before,
        after,
        seed=config.run.seed,
        throughput={
            "dialogues_per_s": totals.num_dialogues / max(train_s, 1e-9),
            "turns_per_s": totals.num_turns / max(train_s, 1e-9),
            "response_tokens_per_s": totals.num_response_tokens / max(train_s, 1e-9),
            "steps_per_s": (config.run.steps - memory.step) / max(train_s, 1e-9),
        },
        timings_s={**timings_s, "startup": startup_s, "train": train_s},
        num_resamples=config.evaluation.bootstrap,
    )
    held_out = held_out_trap(report, preference=trap_sources(config)["preference"])
    # Of this process: what an earlier attempt of a resumed run did is in its curves.
    report["groups"] = {"trained": totals.num_groups, "dropped": dict(totals.drops)}
    report["trap"] = {"training": observer.trap.report() if observer.trap else {}, "held_out": held_out}
    return RunOutcome(before, after, report)


def trap_sources(config: RunConfig) -> dict[str, list[str]]:
    """Kind ("verified", "preference") -> names of its sources: as configured, else by what their classes measure."""
    named = {"verified": config.trap.verified, "preference": config.trap.preference}
    found: dict[str, list[str]] = {kind: list(names) for kind, names in named.items()}
    for source in config.rewards.sources:
        judge = load_object(source.judge)
        is_preference = isinstance(judge, type) and issubclass(judge, GenerativeJudge)
        kind = "preference" if is_preference else getattr(judge, "measures", "")
        if kind in named and not named[kind]:
            found[kind].append(source.name)
    return found


def trap_monitor(config: RunConfig, *, curves: Path | None = None, before: int = 0) -> TrapMonitor:
    """What watches this run's curves, and has seen those that were written of the steps before."""
    trap = TrapMonitor(config.trap, sources=trap_sources(config), num_steps=config.run.steps)
    if curves is not None and before:
        trap.replay(read_curves(curves, prefix="reward/"), before=before)
    return trap


class Evaluators(Protocol):
    """The actors that an evaluation needs."""

    @property
    def rollouts(self) -> RolloutPool: ...

    @property
    def rewards(self) -> RewardPool: ...


@dataclass(frozen=True, slots=True)
class RunActors:
    """Everything of a run that lives in processes of its own; `version` is what engines and learner hold."""

    rollouts: RolloutPool
    rewards: RewardPool
    learner: LearnerGroup
    weights: WeightTransport
    watch: JudgeWatch
    version: WeightVersion
    scaling: Scaling


@asynccontextmanager
async def running_actors(
    config: RunConfig,
    *,
    version: WeightVersion,
    checkpoint: Path | None,
    told: Callable[[str], None],
    synced: Callable[[Broadcast], None] | None = None,
    kept: Kept | None = None,
) -> AsyncIterator[RunActors]:
    """The actors that `config` asks for, from `checkpoint` if there is one; ended on the way out.

    Args:
        told: hears of actors that are left out.
        synced: hears of every broadcast of weights.
        kept: has some of an earlier run, perhaps, and gets them when all went well and the next run can use them.
    """
    environment = actor_environment()
    async with AsyncExitStack() as ends:
        left = kept.take() if kept is not None else None
        places = left.places if left is not None else await reserve(config, told=told)
        ends.callback(places.release)
        engines, judges = await left.living() if left is not None else ((), ())
        places.taken_over("rollout", len(engines))
        places.taken_over("rewards", len(judges))
        rollouts = RolloutPool(config, environment=environment, told=told, place=places.options, running=engines)
        ends.callback(rollouts.pool.stop)
        rewards = RewardPool(config, environment=environment, told=told, place=places.options, running=judges)
        ends.callback(rewards.pool.stop)
        learner = LearnerGroup(
            trainer_spec(config, version),
            algorithm=config.algorithm,
            env_vars=environment,
            place=lambda: places.own("learner"),
        )
        ends.push_async_callback(learner.stop)
        transport = transport_of(
            config.sync,
            receivers=rollouts.pool,
            senders=learner,
            on_gpu=config.learner.num_gpus > 0,
            told=synced,
        )
        weights = JoinableWeights(transport, receivers=rollouts.pool, version=version)
        await asyncio.gather(rollouts.start(version), rewards.start(), learner.start())
        watch = JudgeWatch(lambda: _judges_health(rewards.pool), told=told, slow_after_s=config.rewards.slow_after_s)
        async with (
            supervised(
                config, rollouts=rollouts, rewards=rewards, weights=weights, version=version, told=told
            ) as scaling,
            watch.watching(),
        ):
            if checkpoint is not None or left is not None:
                version = await bring_back(learner, weights, checkpoint)
            yield RunActors(rollouts, rewards, learner, weights, watch, version, scaling)
        if kept is not None:
            kept.leave(config, places=places, rollouts=rollouts.pool, rewards=rewards.pool)


@asynccontextmanager
async def resizable(
    config: RunConfig, actors: RunActors, *, folder: Path, told: Callable[[str], None]
) -> AsyncIterator[None]:
    """Take commands, and follow the queue where `autoscale` says so, until the block ends."""
    scaling = actors.scaling
    queue = autoscaling(
        config, scaling, rollouts=actors.rollouts.pool, rewards=actors.rewards.pool, learner=actors.learner, told=told
    )
    desk = commanded(folder, ask=scaling.ask, sizes=scaling.sizes, environment=actor_environment(), told=told)
    async with desk, queue:
        yield


async def _judges_health(pool: ActorPool) -> dict[str, Mapping[str, JudgeHealth] | None]:
    """What `JudgeWatch` asks; an actor that died is left out, for its pool says so."""

    async def one(handle: ActorHandle[Any]) -> Mapping[str, JudgeHealth] | None:
        async def answer() -> Mapping[str, JudgeHealth]:
            health: Mapping[str, JudgeHealth] = await handle.health.remote()
            return health

        try:
            return await asyncio.wait_for(answer(), _HEALTH_DEADLINE_S)
        except TimeoutError:
            return None
        except DEATHS:
            return {}

    handles = pool.handles
    return dict(zip(handles, await asyncio.gather(*(one(handle) for handle in handles.values())), strict=True))


async def evaluated(
    config: RunConfig,
    data: RunData,
    actors: Evaluators,
    *,
    phase: Phase,
    step: int,
    folder: RunFolder,
    progress: Progress,
) -> list[EvaluationResult]:
    """Evaluate the weights of `step`, or read what this run has evaluated already.

    A resumed run's start is that of the first attempt; its end is read only where it was evaluated at this very step.

    Raises:
        DataError: a resumed run has a held-out set that was not evaluated at its start, which is gone.
    """
    moment = phase if phase == "before" else f"after-step{step:06d}"
    files = {name: folder.path / f"evaluation-{moment}-{name}.json" for name in data.heldout}
    if files and all(path.is_file() for path in files.values()):
        return [read_evaluation(path) for path in files.values()]
    if phase == "before" and step > 0:
        missing = ", ".join(name for name, path in files.items() if not path.is_file())
        if missing:
            raise DataError(
                f"this run was not evaluated on {missing} before training, and is at step {step} now: resume with the "
                "held-out sets that it began with, or start a new run"
            )
    progress.stage(f"held-out dialogues {phase} training")
    results = await evaluate(
        data.heldout,
        phase=phase,
        rollouts=actors.rollouts,
        rewards=actors.rewards,
        settings=config.evaluation,
        progressed=progress.update,
        told=progress.say,
    )
    for result in results:
        write_evaluation(files[result.name], result)
    return results


def resource_needs(config: RunConfig) -> dict[str, tuple[float, float]]:
    """role -> (CPUs, GPUs) of all its actors together."""
    rollout, rewards, learner = config.rollout, config.rewards, config.learner
    return {
        "rollout": (rollout.actors * rollout.num_cpus, rollout.actors * rollout.num_gpus),
        "rewards": (rewards.actors * rewards.num_cpus, rewards.actors * rewards.num_gpus),
        "learner": (learner.ranks * learner.num_cpus, learner.ranks * learner.num_gpus),
    }
