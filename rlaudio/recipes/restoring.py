"""What a run remembers between its lives, put together: checkpoint, ledger, spool, prompts."""

import asyncio
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlaudio.aio import undisturbed
from rlaudio.config import RunConfig
from rlaudio.data.run_data import RunData, prompt_source
from rlaudio.data.source import PromptSource
from rlaudio.errors import ConfigError, LedgerError
from rlaudio.experience.issuing import Issuer, why_not_again
from rlaudio.experience.ledger import Ledger, reach
from rlaudio.experience.spool import Spool, is_local
from rlaudio.learner.group import LearnerGroup
from rlaudio.recipes.checkpoints import LEDGER_COPY, CheckpointStore, DriverState
from rlaudio.runs import RunFolder
from rlaudio.types import WeightVersion

_MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Memory:
    """Where a run stands when it begins or goes on.

    Attributes:
        checkpoint: what the learner loads; None: it begins with `model.path`.
        step: batches trained on.
        version: of the weights, in this life.
        source, prompts: the stream, and what deals from it.
    """

    store: CheckpointStore
    checkpoint: Path | None
    step: int
    version: WeightVersion
    source: PromptSource
    ledger: Ledger
    prompts: Issuer

    def saver(self, learner: LearnerGroup) -> "Saver":
        return Saver(self.store, learner, self.source, self.ledger)


@contextmanager
def remembering(
    config: RunConfig, *, data: RunData, folder: RunFolder, resume: bool, told: Callable[[str], None]
) -> Iterator[Memory]:
    """A run's memory, reconciled with its last checkpoint if it goes on; recorded to the end on the way out.

    Raises:
        CheckpointError, LedgerError, SpoolError: what was kept cannot be used. DataError: the records changed.
    """
    store = CheckpointStore(folder.checkpoints)
    latest = store.latest(told=told) if resume else None
    checkpoint, state = latest or (None, DriverState(step=0, incarnation=0, number=0, prompts={}))
    source = prompt_source(data, seed=config.run.seed)
    if checkpoint is not None:
        source.restore(state.prompts)
    spool = Spool(spool_root(config, folder))
    ledger = _open(config, folder, checkpoint=checkpoint, spool=spool, resume=resume, told=told)
    try:
        if resume:
            problem = partial(
                why_not_again, ledger=ledger, origin=state.version, settings=config.algorithm, spool=spool
            )
            returned = ledger.restore(step=state.step, origin=state.version, problem=problem)
            if not config.run.keep_spool:
                spool.sweep(keep={entry.spooled.name for entry in returned if entry.spooled})
            num_ready = sum(entry.state == "ready" for entry in returned)
            told(
                f"going on from step {state.step}: of {len(returned)} groups that come back {num_ready} are ready and "
                f"{len(returned) - num_ready} are played again"
            )
        else:
            returned = []
        yield Memory(
            store=store,
            checkpoint=checkpoint,
            step=state.step,
            version=WeightVersion(ledger.incarnation, state.number),
            source=source,
            ledger=ledger,
            prompts=Issuer(source, ledger, returned=returned),
        )
    finally:
        ledger.close()


class Saver:
    """Saves learner, driver and ledger together; the ledger says last that the checkpoint is there."""

    def __init__(self, store: CheckpointStore, learner: LearnerGroup, source: PromptSource, ledger: Ledger) -> None:
        self._store, self._learner, self._source, self._ledger = store, learner, source, ledger

    async def __call__(self, step: int) -> None:
        """Save as of `step` batches trained, to the end even on Ctrl-C; what is whole already is not saved again."""
        if not self._store.holds(step):
            await undisturbed(self._save(step))

    async def _save(self, step: int) -> None:
        path = self._store.begin(step)
        prompts = self._source.state()
        version = await self._learner.save(path)
        # After the stream's state, so that the copy knows of every prompt that the state says was dealt.
        await asyncio.to_thread(self._ledger.snapshot, path / LEDGER_COPY)
        state = DriverState(step=step, incarnation=version.incarnation, number=version.number, prompts=prompts)
        await asyncio.to_thread(self._store.finish, path, state)
        self._ledger.durable(step=step, version=version)


def ledger_path(config: RunConfig, folder: RunFolder) -> Path:
    """The live ledger of a run: in its folder, or under its name in `run.ledger`."""
    if config.run.ledger:
        return Path(config.run.ledger) / f"{folder.path.name}.sqlite"
    return folder.path / "ledger.sqlite"


def spool_root(config: RunConfig, folder: RunFolder) -> str:
    """Where a run's judged groups lie."""
    return f"{config.run.spool.rstrip('/')}/{folder.path.name}" if config.run.spool else str(folder.path / "spool")


def with_spool(config: RunConfig, folder: RunFolder) -> RunConfig:
    """The configuration that a run's actors get: `run.spool` is this run's own."""
    return replace(config, run=replace(config.run, spool=spool_root(config, folder)))


def require_shared_roots(config: RunConfig, folder: RunFolder, *, num_nodes: int) -> None:
    """Refuse roots that only one of several nodes has: what is written there would be gone when it is needed.

    Raises:
        ConfigError: naming the roots.
    """
    roots = {"run.root": config.run.root, "run.spool": spool_root(config, folder)}
    local = {name: root for name, root in roots.items() if is_local(root)}
    if num_nodes > 1 and local and not config.run.shared_root:
        named = ", ".join(f"{name} ({root})" for name, root in local.items())
        raise ConfigError(
            f"the cluster has {num_nodes} nodes, and {named} is a path of one machine: put run.root on a disk that all "
            "nodes see at the same path and say so with run.shared_root=true, with the ledger on this machine "
            "(run.ledger); run.spool may also be an s3:// or gs:// URI"
        )


def _open(
    config: RunConfig,
    folder: RunFolder,
    *,
    checkpoint: Path | None,
    spool: Spool,
    resume: bool,
    told: Callable[[str], None],
) -> Ledger:
    """The live ledger; where a resumed run has lost it, or finds an older one, the copy in the checkpoint."""
    path = ledger_path(config, folder)
    options: dict[str, Any] = {
        "discard": spool.remove,
        "keep_files": config.run.keep_spool,
        "max_file_bytes": 0 if config.run.keep_spool else config.run.spool_mb * _MB,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if not resume:
        return Ledger.create(path, **options)
    copy = checkpoint / LEDGER_COPY if checkpoint is not None else None
    try:
        ledger = Ledger.open(path, **options)
        if copy is None or (ledger.incarnation, ledger.num_groups) >= reach(copy):
            return ledger
        ledger.close()
        problem = f"the ledger {path} is older than the checkpoint"
    except LedgerError as error:
        problem = str(error)
    told(f"{problem}: what happened after the last checkpoint is not known, its groups are dealt anew")
    for file in path.parent.glob(f"{path.name}*"):
        file.rename(file.with_name(f"damaged-{file.name}"))
    if copy is None:
        return Ledger.create(path, **options)
    shutil.copyfile(copy, path)
    return Ledger.open(path, **options)
