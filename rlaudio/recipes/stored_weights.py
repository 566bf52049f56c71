"""A checkpoint's weights into engines that run already, for policies that differ from theirs in nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from rlaudio.config import ModelSettings
from rlaudio.errors import CheckpointError, WeightSyncError
from rlaudio.learner.publishing import Publisher
from rlaudio.models.base import ModelFamily
from rlaudio.models.checkpoints import INDEX_FILE, copy_stored, stored_tensors
from rlaudio.models.families import open_family
from rlaudio.models.identity import encoder_name
from rlaudio.types import WeightVersion
from rlaudio.weights.asking import ask
from rlaudio.weights.base import Broadcast, Delivery, Receivers, ShareRef, SnapshotRef
from rlaudio.weights.deadline import Deadline
from rlaudio.weights.object_store import settle
from rlaudio.weights.receiver import Swap, WeightReceiver
from rlaudio.weights.shares import Share


def differ_in_weights_alone(model: ModelSettings, path: str) -> bool:
    """Whether engines of `model` can go on with the trained weights of `path`: all else is equal, down to the bytes.

    That is the configuration, the frozen encoder, the tokenizer, and every tensor's name and shape.
    """
    try:
        families = [open_family(model), open_family(replace(model, path=path))]
        described = [(encoder_name(family), _shapes(family.path), _files(family.path)) for family in families]
    except CheckpointError:
        return False  # an engine of its own says what is wrong with it
    return described[0] == described[1]


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in stored_tensors(path).items()}


def _files(path: Path) -> dict[str, str]:
    """SHA-256 of what lies beside the weights, notes for people and the configuration (which is compared) left out."""
    beside = [file for file in path.iterdir() if file.is_file() and file.suffix not in (".safetensors", ".md")]
    skipped = ("config.json", INDEX_FILE)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in beside if file.name not in skipped}


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """`SnapshotRef` of what lies in a checkpoint that every engine's node can read.

    Attributes:
        model: its path and family.
        version: what the weights are called from now on.
    """

    model: ModelSettings
    version: WeightVersion
    shares: tuple[ShareRef, ...] = ()


class StoredTransport:
    """`WeightTransport` of `StoredWeights`: every actor reads the checkpoint for itself.

    Args:
        receivers: who gets the weights.
        deadline_s: for each receiver, from the beginning of the broadcast.
    """

    def __init__(self, receivers: Receivers, *, deadline_s: float) -> None:
        self._receivers = receivers
        self._deadline_s = deadline_s

    async def broadcast(self, snapshot: SnapshotRef, *, to: Receivers | None = None) -> Broadcast:
        """See `WeightTransport.broadcast`."""
        receivers, stored = to or self._receivers, cast("StoredWeights", snapshot)
        handles = dict(receivers.handles)
        outcomes = await asyncio.gather(*(self._deliver(stored, name, handle) for name, handle in handles.items()))
        return settle(stored.version, dict(zip(handles, outcomes, strict=True)), receivers=receivers)

    async def _deliver(self, stored: StoredWeights, name: str, handle: Any) -> Delivery | WeightSyncError:
        version, deadline, began_s = stored.version, Deadline(self._deadline_s), time.monotonic()
        try:
            what = f"read the weights of {stored.model.path}"
            num_bytes = await ask(name, handle, ReadCheckpoint(stored), what=what, deadline_s=deadline.left_s)
            read_s = time.monotonic() - began_s
            swap = Swap(version, deadline.own_s)
            report = await ask(name, handle, swap, what=f"swap to weights {version}", deadline_s=deadline.left_s)
        except WeightSyncError as error:
            return error
        return Delivery(read_s, time.monotonic() - began_s, paused_s=report.paused_s, num_bytes=num_bytes)


@dataclass(frozen=True, slots=True)
class ReadCheckpoint:
    """`SyncStep`: bring a checkpoint's trained weights beside the engine. Answers the bytes."""

    stored: StoredWeights

    async def run(self, receiver: WeightReceiver) -> int:
        share = await asyncio.to_thread(_read, self.stored)
        await receiver.stage([share])
        return share.num_bytes


def _read(stored: StoredWeights) -> Share:
    """Raises WeightSyncError: the checkpoint cannot be read, or a value is not finite."""
    wire_dtype = "bfloat16" if stored.model.dtype == "bfloat16" else "float32"
    try:
        family: ModelFamily = open_family(stored.model)
        shapes = {name: shape for name, shape in _shapes(family.path).items() if not family.frozen(name)}
        tensors = {name: torch.empty(shape, dtype=getattr(torch, wire_dtype)) for name, shape in shapes.items()}
        copy_stored(tensors, family.path)
    except CheckpointError as error:
        raise WeightSyncError(f"{stored.model.path} cannot be loaded into a running engine: {error}") from error
    publisher = Publisher(rank=0, world_size=1, wire_dtype=wire_dtype)
    named = [(name, torch.nn.Parameter(tensor, requires_grad=False)) for name, tensor in tensors.items()]
    return publisher.hand_out(named, version=stored.version).share
