"""A checkpoint for another number of ranks: DeepSpeed's Universal Checkpoints, made when one is read.

Shards fit the ranks that wrote them. Rank 0 has DeepSpeed take them apart, into a file per parameter and kind of state,
in a folder beside the checkpoint; every rank then reads its part of each, and the folder goes. The checkpoint itself is
not touched. It takes the disk space of the shards once more, and the time of writing and reading them.
"""

from __future__ import annotations

import io
import shutil
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from rlaudio.errors import CheckpointError
from rlaudio.learner.checkpoint import ENGINE_TAG, MODEL_FOLDER, on_every_rank, plainly_named
from rlaudio.learner.messages import DEALT_ANEW
from rlaudio.learner.sharding import full_shape, is_sharded, put_whole
from rlaudio.models.checkpoints import copy_stored

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def read_for_other_ranks(
    engine: DeepSpeedEngine,
    named: Sequence[tuple[str, nn.Parameter]],
    path: Path,
    *,
    rank: int,
    step_index: int,
) -> None:
    """Restore this rank's part of a checkpoint that other ranks wrote. Called on every rank.

    Args:
        engine: at the ZeRO stage of the checkpoint, 1 or more.
        named: (public name, parameter) of the policy.
        path: the checkpoint, on a disk that all ranks see. Its shards are pickles: of this run's own making.
        step_index: steps that its optimizer had taken.

    Raises:
        CheckpointError: it is damaged, does not fit the model, or there is no room to deal it out.
    """
    if step_index == 0:  # the optimizer has no state yet, and DeepSpeed's converter would miss it
        read_weights(dict(named), path / MODEL_FOLDER)
        engine.optimizer.refresh_fp32_params()
        engine.optimizer.optimizer.state.clear()
        return
    with universal(path, rank=rank) as folder:
        read_universal(engine, folder)
    read_weights({name: parameter for name, parameter in named if not parameter.requires_grad}, path / MODEL_FOLDER)


@contextmanager
def universal(path: Path, *, rank: int) -> Iterator[Path]:
    """The shards of a checkpoint for any number of ranks, in the folder that is yielded. Entered on every rank.

    Raises:
        CheckpointError: the shards cannot be taken apart, or there is no room for it.
    """
    folder = path.with_name(DEALT_ANEW + path.name)
    problem: BaseException | None = None
    if rank == 0:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            (folder / ENGINE_TAG).mkdir(parents=True)
            _take_apart(path / ENGINE_TAG, folder / ENGINE_TAG)
        except Exception as error:  # DeepSpeed asserts, unpickles and indexes: whatever torn shards lead it to
            problem = error
    try:
        if not on_every_rank(problem is None):
            told = f"{type(problem).__name__}: {problem}" if problem else "see rank 0's error"
            raise CheckpointError(
                f"{path / ENGINE_TAG} cannot be dealt out to another number of ranks ({told}): check free space, "
                "resume with the ranks that wrote it, or pick another checkpoint"
            ) from problem
        yield folder
    finally:
        dist.barrier()  # nobody reads any more
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _take_apart(shards: Path, into: Path) -> None:
    """DeepSpeed's converter, in this process, quietly."""
    from deepspeed.checkpoint import ds_to_universal

    with plainly_named(shards) as source, plainly_named(into) as target:
        order = Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,  # more are forks of this process, which has threads
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds_to_universal.main(order)


def read_universal(engine: DeepSpeedEngine, folder: Path) -> None:
    """This rank's part of what `universal` made: trained weights and optimizer. Called on every rank.

    Raises:
        CheckpointError: it does not fit the model.
    """
    # A setting of the whole engine in DeepSpeed; here it is known when a checkpoint is at hand.
    engine._config.load_universal_checkpoint = True
    try:
        with warnings.catch_warnings(), plainly_named(folder) as plain:
            warnings.simplefilter("ignore")
            found, _ = engine.load_checkpoint(str(plain), tag=ENGINE_TAG, load_lr_scheduler_states=False)
    except (OSError, RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise CheckpointError(f"{folder}: the shards do not fit ({error}); was the model changed?") from error
    finally:
        engine._config.load_universal_checkpoint = False
    if found is None:
        raise CheckpointError(f"{folder / ENGINE_TAG} holds no shards: pick another checkpoint")
    # At stage 3 DeepSpeed 0.19 gives all sub-groups one and the same counter, which each of their steps would raise.
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


@torch.no_grad()
def read_weights(named: Mapping[str, nn.Parameter], path: Path) -> None:
    """Parameters as an exported model has them, divided or not. Called on every rank.

    Raises:
        CheckpointError: one is not there, or of another shape.
    """
    copy_stored({name: parameter for name, parameter in named.items() if not is_sharded(parameter)}, path)
    for name, parameter in named.items():
        if is_sharded(parameter):
            whole = torch.empty(full_shape(parameter), dtype=parameter.dtype)
            copy_stored({name: whole}, path)
            put_whole(parameter, whole)
