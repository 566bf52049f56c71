"""Supervised training in phases, on the same learner group as RL: mid-training, cold start, and judges."""

import asyncio
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray

from rlaudio.aio import undisturbed
from rlaudio.audio.store import ClipStore
from rlaudio.config import PhaseSettings, SftConfig
from rlaudio.data.mixture import Interleaver
from rlaudio.data.records import read_records
from rlaudio.dialogue.render import supervised_turns
from rlaudio.errors import DataError
from rlaudio.experience.builder import check_schema, make_batch
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.messages import TrainerSpec
from rlaudio.models.base import ModelFamily
from rlaudio.models.families import open_family
from rlaudio.observe.progress import Progress
from rlaudio.observe.tracker import Tracker
from rlaudio.recipes.checkpoints import CheckpointStore, DriverState
from rlaudio.recipes.cluster import actor_environment
from rlaudio.types import PromptRecord

_SMOOTHING = 0.98
"""Of the loss that `stop_at_loss` is compared with: about the last 50 steps."""


async def run_sft(
    config: SftConfig,
    *,
    tracker: Tracker,
    progress: Progress,
    stopped: Path,
    rows: Mapping[str, pa.RecordBatch] | None = None,
    checkpoints: Path,
    resume: bool = False,
) -> None:
    """Run every phase in order and export the checkpoint to `run.output`.

    Args:
        rows: by the path of a phase's data, where they are made already.
        checkpoints: resume points go here, every `run.checkpoint_every` steps.
        resume: go on from the last of them, if there is one: what comes out is what a run in one go gives.

    A cancelled run (Ctrl-C) saves where it stands, and exports what was trained so far to the new folder `stopped`: to
    start another run from.

    Raises:
        As `load_rows`.
    """
    shares = [phase_shares(phase) for phase in config.phases]
    batches = dict(rows or {})
    if missing := sorted({path for share in shares for path in share} - batches.keys()):
        family = open_family(config.model)
        batches |= {path: load_rows(path, family=family, clips=config.clips) for path in missing}
    store = CheckpointStore(checkpoints)
    latest = store.latest() if resume else None
    spec = TrainerSpec(model=config.model, clips_root=config.clips, learner=config.learner, seed=config.run.seed)
    learner = LearnerGroup(spec, env_vars=actor_environment())
    progress.stage("starting the learner")
    try:
        await learner.start()
        training = _Training(config, learner=learner, store=store, tracker=tracker, progress=progress)
        if latest is not None:
            await learner.load(latest[0])
            training.place = Place(**latest[1].prompts)
            progress.say(f"going on from step {training.place.step}")

        async def save_and_export(path: Path) -> None:
            await training.save()
            await learner.export(path)

        async with exported_if_cancelled(save_and_export, stopped, say=progress.say):
            for number, (phase, parts) in enumerate(zip(config.phases, shares, strict=True)):
                await training.run(number, phase, [(batches[path], weight) for path, weight in parts.items()])
        await learner.export(Path(config.run.output))
    finally:
        await learner.stop()


@asynccontextmanager
async def exported_if_cancelled(
    export: Callable[[Path], Awaitable[None]], path: Path, *, say: Callable[[str], None]
) -> AsyncIterator[None]:
    """Export to `path` when the block is cancelled, and go on being cancelled; `path` is whole or not there."""
    try:
        yield
    except asyncio.CancelledError:
        say("stopping: saving the weights so far")
        partial = path.with_name(f".{path.name}.partial")
        # The task is told once; the export itself must not be cut off by it. It waits for the step under way.
        await asyncio.shield(export(partial))
        shutil.rmtree(path, ignore_errors=True)  # of an earlier stop
        partial.rename(path)
        raise


@dataclass(frozen=True, slots=True)
class Place:
    """Where supervised training stands; what a checkpoint keeps of the driver.

    Attributes:
        phase, phase_step: the phase, and how many of its steps are done.
        step: all steps, of earlier phases too.
        smoothed: loss, as `stop_at_loss` looks at it.
        ended: the phase is over, by its number of steps or by its loss.
    """

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    smoothed: float | None = None
    ended: bool = False


class _Training:
    """The steps of all phases, from any place on."""

    def __init__(
        self, config: SftConfig, *, learner: LearnerGroup, store: CheckpointStore, tracker: Tracker, progress: Progress
    ) -> None:
        self._config, self._learner, self._store = config, learner, store
        self._tracker, self._progress = tracker, progress
        self.place = Place()

    async def run(self, number: int, phase: PhaseSettings, parts: Sequence[tuple[pa.RecordBatch, float]]) -> None:
        """Train what is left of a phase; nothing where it was over before."""
        place = self.place
        if number < place.phase or (number == place.phase and place.ended):
            return
        if number > place.phase:
            place = self.place = Place(number, 0, place.step)
        self._progress.stage(phase.name)
        draws = draw_mixture(parts, phase.rows_per_step, seed=self._config.run.seed)
        for rows in islice(draws, place.phase_step, phase.steps):
            # Whole steps only: a stop in the middle of one would leave a place between two.
            await undisturbed(self._step(phase, rows))
            await asyncio.sleep(0)  # where a stop that was put off takes effect
            every = self._config.run.checkpoint_every
            if every and self.place.step % every == 0:
                await self.save()
            if self.place.ended:
                break

    async def _step(self, phase: PhaseSettings, rows: pa.RecordBatch) -> None:
        metrics = await self._learner.supervised_step([ray.put(rows)], phase)
        values, before = metrics.values, self.place
        loss = values["loss"]
        smoothed = loss if before.smoothed is None else _SMOOTHING * before.smoothed + (1 - _SMOOTHING) * loss
        done = before.phase_step + 1
        self._tracker.log({f"{phase.name}/{name}": value for name, value in values.items()}, step=before.step)
        self._progress.update(done, phase.steps, {"loss": smoothed, **_accuracy(values)})
        low = smoothed < phase.stop_at_loss
        if low:
            self._progress.say(f"{phase.name}: loss {smoothed:.3f} is below {phase.stop_at_loss:g} after {done} steps")
        self.place = Place(before.phase, done, before.step + 1, smoothed, ended=low or done == phase.steps)

    async def save(self) -> None:
        """Save as of the steps done, to the end even on Ctrl-C; what is whole already is not saved again."""
        place = self.place
        if place.step and not self._store.holds(place.step):
            await undisturbed(self._save(place))

    async def _save(self, place: Place) -> None:
        path = self._store.begin(place.step)
        await self._learner.save(path)
        self._store.finish(path, DriverState(step=place.step, incarnation=0, number=place.step, prompts=asdict(place)))


def _accuracy(values: dict[str, float]) -> dict[str, float]:
    return {"accuracy": values["accuracy"]} if "accuracy" in values else {}


def draw_rows(rows: pa.RecordBatch, count: int, *, seed: int) -> Iterator[pa.Array]:
    """Endless draws of `count` row indices: every row once per epoch, rows of like length together (less padding)."""
    lengths = np.array(
        [len(p) + len(r) for p, r in zip(rows.column("prompt_ids"), rows.column("response_ids"), strict=True)]
    )
    random = np.random.default_rng(seed)
    pool_size = 8 * count
    while True:
        order = random.permutation(len(lengths))
        for start in range(0, len(order), pool_size):
            pool = order[start : start + pool_size]
            pool = pool[np.argsort(lengths[pool], kind="stable")]
            cuts = range(0, len(pool), count)
            for cut in random.permutation(list(cuts)):
                yield pa.array(pool[cut : cut + count])


def phase_shares(phase: PhaseSettings) -> dict[str, float]:
    """File -> its share of the rows of every step."""
    return {part.path: part.weight for part in phase.mixture} or {phase.data: 1.0}


def draw_mixture(parts: Sequence[tuple[pa.RecordBatch, float]], count: int, *, seed: int) -> Iterator[pa.RecordBatch]:
    """Endless batches of `count` rows, of each part its share: over n steps exact to within one row.

    Equal weights on D_audio and D_text are equation 1 of arXiv:2511.15848: the sum of two expectations. Of one part it
    is `draw_rows`.
    """
    if len(parts) == 1:
        (rows, _), *_ = parts
        yield from (rows.take(chosen) for chosen in draw_rows(rows, count, seed=seed))
        return
    turns = Interleaver([weight for _, weight in parts])
    total = sum(weight for _, weight in parts)
    streams = [
        chain.from_iterable(draw_rows(rows, max(1, round(count * weight / total)), seed=seed + index))
        for index, (rows, weight) in enumerate(parts)
    ]
    while True:
        places = Counter(turns.next() for _ in range(count))
        drawn = [
            rows.take(pa.array([index.as_py() for index in islice(streams[part], places[part])]))
            for part, (rows, _) in enumerate(parts)
            if places[part]
        ]
        yield pa.concat_batches(drawn)


# ---- rows ---------------------------------------------------------------------------------------------------------


def load_rows(path: str, *, family: ModelFamily, clips: str) -> pa.RecordBatch:
    """Supervised rows of a data file: records with given replies (JSONL), or rows made before (`.arrow`).

    Raises:
        DataError: the file cannot be read, holds nothing to learn from, or a reply that cannot be learned.
    """
    rows = _loaded(path, family=family, clips=clips)
    require_learnable(rows, path=path, banned=family.tokenizer.ids.banned)
    return rows


def _loaded(path: str, *, family: ModelFamily, clips: str) -> pa.RecordBatch:
    if path.endswith(".arrow"):
        try:
            table = pa.ipc.open_file(path).read_all().combine_chunks()
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{path} is not an Arrow file ({error}): make it again") from error
        (batch,) = table.to_batches()
        check_schema(batch)
        return batch
    store = ClipStore(clips)
    return supervised_batch(read_records(path, complete=True, clips=store), family=family, clips=store)


def require_learnable(rows: pa.RecordBatch, *, path: str, banned: Sequence[int]) -> None:
    """Raises DataError when a reply holds an id that is masked out of sampling: its loss would be past all bounds."""
    column = rows.column("response_ids")
    ids = column.flatten().to_numpy()
    bad = np.flatnonzero(np.isin(ids, np.asarray(banned, dtype=np.int64)))
    if not len(bad):
        return
    row = int(np.searchsorted(np.cumsum(column.value_lengths().to_numpy()), bad[0], side="right"))
    first = {name: rows.column(name)[row].as_py() for name in ("prompt_id", "turn", "thinking", "reply")}
    raise DataError(
        f"{path}: replies hold {len(bad)} ids that a policy never samples; the first is {ids[bad[0]]}, in "
        f"{first['prompt_id']!r}, turn {first['turn']}: {first['thinking'] or ''!r}, {first['reply']!r}. Words that "
        "the tokenizer does not know become such ids: take them out, or begin with a checkpoint that knows them"
    )


def supervised_batch(records: list[PromptRecord], *, family: ModelFamily, clips: ClipStore) -> pa.RecordBatch:
    """Every given assistant turn of the records as one row."""
    turns = [turn for record in records for turn in supervised_turns(record, family=family, clips=clips)]
    group_of = {record.id: number for number, record in enumerate(records)}
    return make_batch(
        prompt_id=[turn.record.id for turn in turns],
        task=[turn.record.task for turn in turns],
        group=[group_of[turn.record.id] for turn in turns],
        sibling=[0] * len(turns),
        turn=[turn.turn for turn in turns],
        prompt_ids=[turn.prompt_ids for turn in turns],
        response_ids=[turn.response_ids for turn in turns],
        clips=[turn.clips for turn in turns],
        clip_targets=[turn.clip_targets for turn in turns],
        thinking=[turn.thinking for turn in turns],
        reply=[turn.reply for turn in turns],
    )
