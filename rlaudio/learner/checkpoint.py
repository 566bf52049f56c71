"""A learner checkpoint on disk: all of it or none of it.

PATH/
  model/          the policy in its family's public layout, loads anywhere
  engine/         DeepSpeed's shards: weights and optimizer. For other ranks they are dealt anew: `universal.py`
  rank_N.pt       random state of rank N
  learner.json    version, step, world size: written last, so a folder without it is not a checkpoint
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from rlaudio.errors import CheckpointError
from rlaudio.types import WeightVersion

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MODEL_FOLDER = "model"
META_FILE = "learner.json"
ENGINE_TAG = "engine"


@dataclass(frozen=True, slots=True)
class LearnerMeta:
    """What must be known before the shards can be read.

    Attributes:
        version: of the weights.
        step_index: optimizer steps taken in this run or phase: the place in the schedule.
        world_size, zero_stage: the shards fit no other; see `universal` for other ranks.
        phase: fields of `PhaseSettings`, or None for the run itself.
    """

    version: WeightVersion
    step_index: int
    world_size: int
    zero_stage: int
    phase: dict[str, Any] | None


@contextmanager
def staged(path: Path, *, rank: int) -> Iterator[Path]:
    """A folder beside `path` that becomes `path` when the block ends well on every rank. Entered on every rank.

    Raises:
        CheckpointError: the folder cannot be written, or another rank failed in the block.
    """
    staging = path.with_name(path.name + ".partial")
    try:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        written = False
        try:
            yield staging
            written = True
        finally:
            everywhere = on_every_rank(written)
        if not everywhere:
            raise CheckpointError(f"{path} was not written: another rank failed, see its error")
        if rank == 0:
            _swap(staging, path)
        dist.barrier()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); check free space and access") from error


def on_every_rank(true: bool) -> bool:
    """Whether it is true on every rank. Collective."""
    flag = torch.tensor(int(true), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def _swap(staging: Path, path: Path) -> None:
    replaced = path.with_name(path.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if path.exists():
        os.replace(path, replaced)
    os.replace(staging, path)
    shutil.rmtree(replaced, ignore_errors=True)


def write_engine(engine: DeepSpeedEngine, folder: Path, *, rank: int, meta: LearnerMeta) -> None:
    """Write this rank's part. Called on every rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.save_checkpoint(str(folder), tag=ENGINE_TAG, save_latest=False)
    torch.save(_random_state(), folder / f"rank_{rank}.pt")
    dist.barrier()
    if rank == 0:
        (folder / META_FILE).write_text(json.dumps(asdict(meta), indent=2) + "\n")


def read_meta(path: Path) -> LearnerMeta:
    """Raises CheckpointError: there is no complete checkpoint at `path`."""
    try:
        values = json.loads((path / META_FILE).read_text())
        return LearnerMeta(**(values | {"version": WeightVersion(**values["version"])}))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} has no {META_FILE}: not a complete learner checkpoint, pick another") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / META_FILE} cannot be read ({error}): pick another checkpoint") from error


def read_engine(engine: DeepSpeedEngine, path: Path, *, rank: int) -> None:
    """Restore this rank's weights and optimizer, as it wrote them. Called on every rank.

    Raises:
        CheckpointError: a shard is missing or does not fit the model.
    """
    try:
        with warnings.catch_warnings(), plainly_named(path) as plain:
            warnings.simplefilter("ignore")
            found, _ = engine.load_checkpoint(str(plain), tag=ENGINE_TAG, load_lr_scheduler_states=False)
    except (OSError, RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{path}: rank {rank} cannot read its shard ({error}); was the model changed?") from error
    if found is None:
        raise CheckpointError(f"{path / ENGINE_TAG} holds no shard for rank {rank}: pick another checkpoint")


@contextmanager
def plainly_named(path: Path) -> Iterator[Path]:
    """Another path to a folder: DeepSpeed 0.19 makes patterns of its paths, and finds no shards under a `[`."""
    with tempfile.TemporaryDirectory(prefix="rlaudio-shards-") as plain:
        link = Path(plain) / "there"
        link.symlink_to(path.resolve(), target_is_directory=True)
        yield link


def read_random_state(path: Path, *, rank: int) -> None:
    """Go on with the random state that `rank` had.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    file = path / f"rank_{rank}.pt"
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:  # torch's unpickler raises whatever torn bytes lead it to
        raise CheckpointError(f"{file} cannot be read ({error}): pick another checkpoint") from error
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _random_state() -> dict[str, torch.Tensor | None]:
    # Everything else that is random is derived from the seed and the version: torch covers dropout in foreign models.
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
