"""A run's experience fed to a learner again: the same batches in the same order, without engines or judges.

With the run's own settings, ranks and device this takes the steps that the run took; with others it answers what they
would have made of the same experience. Encoder states are not in the spool: ranks encode the clips by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import ray

from rlaudio.config import RunConfig
from rlaudio.errors import DivergenceError, SpoolError
from rlaudio.experience.spool import Spool, Spooled
from rlaudio.experience.trained import TrainedBatch, trained_batches
from rlaudio.learner.group import LearnerGroup
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import Tracker
from rlaudio.recipes.checkpoints import CheckpointStore
from rlaudio.recipes.cluster import actor_environment
from rlaudio.recipes.doctor import trainer_spec
from rlaudio.recipes.restoring import ledger_path, spool_root
from rlaudio.runs import RunFolder, write_json_atomic
from rlaudio.types import WeightVersion

if TYPE_CHECKING:
    import pyarrow as pa

_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was done: the content of `replay.json`.

    Attributes:
        run: whose experience it was.
        first_step, last_step: steps [first, last) of that run.
        groups: trained on.
        diverged: steps whose batch gave no finite loss or gradient, and was left out.
        number: of the weights in `model/`: optimizer steps since `model.path`.
    """

    run: str
    first_step: int
    last_step: int
    groups: int
    diverged: list[int]
    number: int


def batches_to_replay(
    config: RunConfig, *, run: RunFolder, first_step: int, last_step: int | None
) -> list[TrainedBatch]:
    """Batches [first_step, last_step) of a run, every group of them in its spool.

    Args:
        config: the run's own.
        last_step: None takes all there are.

    Raises:
        LedgerError: it cannot be read. SpoolError: no such steps, or files of them are gone.
    """
    found = trained_batches(ledger_path(config, run), first_step=first_step)
    wanted = [batch for batch in found if last_step is None or batch.step < last_step]
    end = first_step + len(wanted) if last_step is None else last_step
    if not wanted or [batch.step for batch in wanted] != list(range(first_step, end)):
        upto = "on" if last_step is None else f"to {last_step - 1}"
        have = f"{found[0].step} to {found[-1].step}" if found else "none"
        raise SpoolError(
            f"{run.path} was not trained on every step from {first_step} {upto}; of those it has {have}: choose others "
            "with --from and --to"
        )
    spool = Spool(spool_root(config, run))
    gone = [
        f"group {one.group} of step {batch.step}"
        for batch in wanted
        for one in batch.groups
        if one.spooled is None or not spool.holds(one.spooled)
    ]
    if gone:
        more = f" and {len(gone) - _MAX_NAMED} more" if len(gone) > _MAX_NAMED else ""
        raise SpoolError(
            f"{spool.root} does not hold {', '.join(gone[:_MAX_NAMED])}{more}: a run keeps what it was trained on only "
            "with run.keep_spool=true; make it so, or replay other steps with --from and --to"
        )
    return wanted


async def run_replay(
    config: RunConfig,
    batches: Sequence[TrainedBatch],
    *,
    root: str,
    run: RunFolder,
    folder: RunFolder,
    tracker: Tracker,
    progress: Progress,
) -> Replayed:
    """Train a new learner on `batches`; the policy goes to `model/` of `folder`, curves to its metrics.

    Args:
        config: of the learner and its algorithm: the run's own, or what is to be tried.
        batches: as of `batches_to_replay`. From a later step than 0 the learner begins with the run's checkpoint of it.
        root: of the run's spool.

    Raises:
        SpoolError: a file is damaged. CheckpointError: no whole checkpoint of the first step.
        DivergenceError: `max_divergences_in_a_row` batches. DataError, AudioError: a row cannot be trained on.
        LearnerError: a rank died.
    """
    first_step = batches[0].step
    checkpoint = CheckpointStore(run.checkpoints).examined(first_step) if first_step else None
    version = WeightVersion(0, 0)
    learner = LearnerGroup(trainer_spec(config, version), algorithm=config.algorithm, env_vars=actor_environment())
    progress.stage("starting the learner")
    diverged: list[int] = []
    in_a_row = 0
    try:
        await learner.start()
        if checkpoint is not None:
            version = (await learner.load(checkpoint)).version
        progress.stage("training")
        for done, batch in enumerate(batches, start=1):
            try:
                version = await _trained_on(learner, batch, root=root, tracker=tracker)
                in_a_row = 0
            except DivergenceError as error:  # the learner holds its last good state
                diverged.append(batch.step)
                in_a_row += 1
                progress.say(f"step {batch.step} is left out: {error}")
                if in_a_row >= config.algorithm.max_divergences_in_a_row:
                    raise DivergenceError(f"{in_a_row} batches in a row, the last: {error}") from error
            progress.update(done, len(batches), {})
        await learner.export(folder.path / "model")
    finally:
        await learner.stop()
    replayed = Replayed(
        run=str(run.path),
        first_step=first_step,
        last_step=batches[-1].step + 1,
        groups=sum(len(batch.groups) for batch in batches if batch.step not in diverged),
        diverged=diverged,
        number=version.number,
    )
    write_json_atomic(folder.path / "replay.json", asdict(replayed))
    return replayed


async def _trained_on(learner: LearnerGroup, batch: TrainedBatch, *, root: str, tracker: Tracker) -> WeightVersion:
    """All optimizer steps on one batch; rows go from the spool to the ranks, past the driver."""
    read = ray.remote(num_cpus=0)(_read)
    prepared = await learner.prepare([read.remote(root, one.spooled) for one in batch.groups])
    metrics = None
    for part in learner.minibatches(prepared):
        await learner.forward_backward(part)
        metrics = (await learner.optimizer_step()).metrics
    assert metrics is not None, "a batch has a minibatch"
    tracker.log(metrics.values | {"advantage_std": prepared.advantage_std}, step=batch.step)
    return metrics.version


def _read(root: str, spooled: Spooled) -> pa.RecordBatch:
    _, batch = Spool(root).read(spooled)
    return batch
