"""Two learner ranks that several files share, and what is asked inside them."""

import gc
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import torch

from rlaudio.config import SyncSettings
from rlaudio.learner.batch import Row, read_rows
from rlaudio.learner.experience_plan import ExperiencePlan, plan_experience
from rlaudio.learner.group import LearnerGroup
from rlaudio.learner.messages import MinibatchSpec, PublishedSnapshot, StepMetrics, TrainerSpec
from rlaudio.learner.optimization import DTYPES, _reduced_gradients, discard_gradients, division_config
from rlaudio.learner.rank import RankWorker
from rlaudio.learner.sharding import Sharder, full_shape, is_sharded, own_share
from rlaudio.weights.shares import assemble
from rlaudio.weights.snapshot import Snapshot
from tests.ray_local.learner_world import ALGORITHM, World

NO_REFERENCE = replace(ALGORITHM, kl_coef=0.0)
PART = MinibatchSpec(epoch=0, index=0)
COLLECTIVE = SyncSettings(transport="collective", delta=True)


async def rebuild(group: LearnerGroup, spec: TrainerSpec) -> None:
    """Other ranks in the same processes: importing everything again would take half a minute."""
    await group._all("build", spec, None)


async def step(group: LearnerGroup, refs: list[ray.ObjectRef[pa.RecordBatch]]) -> tuple[StepMetrics, Snapshot]:
    await group.prepare(refs)
    await group.forward_backward(PART)
    published = await group.optimizer_step()
    return published.metrics, await whole(published)


async def whole(published: PublishedSnapshot) -> Snapshot:
    return assemble([await share.ref for share in published.shares])


async def check_shares(group: LearnerGroup) -> None:
    """Put together, the ranks' shares are bit for bit what rank 0 gathers; no rank has more to send than another."""
    published = await group.snapshot()
    found, expected = await whole(published), await group.probe(Gathered())
    assert sorted(found.tensors) == sorted(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].tobytes() == tensor.tobytes(), name
        assert found.tensors[name].shape == tensor.shape, name
    assert (found.version, found.dtypes, found.checksums) == (expected.version, expected.dtypes, expected.checksums)
    sizes = [share.header.num_bytes for share in published.shares]
    assert sum(sizes) == expected.num_bytes
    assert max(sizes) <= 1.01 * min(sizes)


def two(world: World, **changes: object) -> TrainerSpec:
    """A row per micro-batch, so that ranks meet different sounds at the same time and need dummies."""
    return world.spec(**({"ranks": 2, "micro_batch_tokens": 1} | changes))


def planned(batches: list[pa.RecordBatch]) -> tuple[list[Row], ExperiencePlan]:
    rows = read_rows(batches)
    return rows, plan_experience(rows, algorithm=ALGORITHM, num_ranks=2, micro_batch_tokens=1)


# ---- probes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """The weights as rank 0 gathers them, by a collective."""

    def run(self, worker: RankWorker) -> Snapshot | None:
        return worker.snapshot()


@dataclass(frozen=True)
class Change:
    """Other settings of the learner from here on, and no reference yet; the policy and its optimizer stay."""

    settings: Mapping[str, Any]

    def run(self, worker: RankWorker) -> None:
        trainer = worker.trainer
        trainer.spec = replace(trainer.spec, learner=replace(trainer.spec.learner, **self.settings))
        trainer._reference = None


@dataclass(frozen=True)
class ReferenceSays:
    """What the batch at hand carries of the reference, and how many values of it this rank holds."""

    def run(self, worker: RankWorker) -> tuple[list[torch.Tensor], int, int]:
        reference = worker.trainer._reference
        assert reference is not None
        lent = {parameter.data_ptr() for _, parameter in worker.trainer.parameters if parameter.numel()}
        held = borrowed = 0
        for parameter in all_parameters(reference):
            size = parameter.ds_tensor.numel() if is_sharded(parameter) else parameter.numel()
            if not is_sharded(parameter) and parameter.data_ptr() in lent:
                borrowed += size
            else:
                held += size
        said = [batch.reference for micro in worker._steps for batch in micro if batch.reference is not None]
        return said, held, borrowed


def all_parameters(reference: Any) -> list[Any]:
    """Also of parts that were taken out of the module tree."""
    policy = reference.policy
    found = {id(parameter): parameter for parameter in reference._trainee.parameters()}
    for name in ("encoder", "adapter"):
        found |= {id(parameter): parameter for parameter in getattr(policy, name).parameters()}
    return list(found.values())


@dataclass(frozen=True)
class Load:
    """Loads the module under torch's allocator trace.

    Returns this rank's (peak bytes, bytes of the whole, bytes of what stays whole, bytes of the largest parameter,
    shares by name).
    """

    divided: bool

    def run(self, worker: RankWorker) -> tuple[int, int, int, int, dict[str, torch.Tensor]]:
        family = worker.trainer.family
        config = division_config(dtype="float32", offload=False, frozen=False)
        sharder = Sharder(config, device=torch.device("cpu"), apart=family.frozen) if self.divided else None
        activities = [torch.profiler.ProfilerActivity.CPU]
        gc.collect()  # or what an earlier trainer left is freed while we count
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            module = family.load_module(dtype=DTYPES["float32"], placing=sharder)
        here = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                here += event.nbytes()
                peak = max(peak, here)
        # A reader maps the file; torch counts the mapping, which takes no memory.
        peak -= sum(file.stat().st_size for file in family.path.glob("*.safetensors"))
        sizes = {name: 4 * full_shape(tensor).numel() for name, tensor in family.public_names(module)}
        shares = {name: own_share(parameter) for name, parameter in family.public_names(module)}
        apart = sum(size for name, size in sizes.items() if family.frozen(name))
        return peak, sum(sizes.values()), apart, max(sizes.values()), shares


@dataclass(frozen=True)
class Digest:
    """One number over every weight and every tensor of the optimizer's state; and how many values Adam remembers."""

    def run(self, worker: RankWorker) -> tuple[int, int]:
        trainer = worker.trainer
        crc = 0
        for _, parameter in trainer.parameters:
            crc = _crc(own_share(parameter), crc)
        optimizer = trainer._live_engine().optimizer
        state = optimizer.state_dict()
        crc = _digest(state, crc)
        inner = getattr(optimizer, "optimizer", optimizer)
        return crc, sum(slot["exp_avg"].numel() for slot in inner.state.values() if "exp_avg" in slot)


def _digest(value: Any, crc: int) -> int:
    if isinstance(value, torch.Tensor):
        return _crc(value.detach().cpu(), crc)
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            crc = _digest(value[key], crc)
    elif isinstance(value, list | tuple):
        for item in value:
            crc = _digest(item, crc)
    elif isinstance(value, bool | int | float):
        crc = zlib.crc32(repr(value).encode(), crc)
    return crc


def _crc(tensor: torch.Tensor, crc: int) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)


@dataclass(frozen=True)
class Overflow:
    """From now on (or no longer) the gradient of one adaptor weight overflows, on one rank alone; the loss does not."""

    rank: int
    on: bool

    def run(self, worker: RankWorker) -> None:
        trainer = worker.trainer
        if trainer.rank != self.rank:
            return
        [parameter] = [parameter for name, parameter in trainer.parameters if name == "adapter.linear1.weight"]
        if self.on:
            worker.overflow = parameter.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[attr-defined]
        else:
            worker.overflow.remove()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Gradients:
    """The reduced gradient at ZeRO stage 0, by public name."""

    def run(self, worker: RankWorker) -> dict[str, torch.Tensor]:
        named = worker.trainer.parameters
        return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


@dataclass(frozen=True)
class OwnGradients:
    """This rank's part of the reduced gradient, piece by piece as DeepSpeed holds it; from ZeRO stage 1 on."""

    def run(self, worker: RankWorker) -> list[torch.Tensor]:
        pieces = _reduced_gradients(worker.trainer._live_engine(), stage=worker.trainer.spec.learner.zero_stage)
        return [piece.detach().flatten().clone() for piece in pieces]


@dataclass(frozen=True)
class Forget:
    """The gradient of the last forward_backward."""

    def run(self, worker: RankWorker) -> None:
        discard_gradients(worker.trainer._live_engine(), stage=worker.trainer.spec.learner.zero_stage)


@dataclass(frozen=True)
class EngineSettings:
    """What DeepSpeed was told of offloading, by its own account: (optimizer, parameters, reference's parameters)
    lie in main memory."""

    def run(self, worker: RankWorker) -> tuple[bool, bool, bool]:
        trainer = worker.trainer
        reference = None if trainer._reference is None else trainer._reference._engine
        engine = trainer._live_engine()
        devices = [engine.zero_offload_optimizer(), engine.zero_offload_param()]
        devices.append(None if reference is None else reference.zero_offload_param())
        first, second, third = (device is not None and device.device == "cpu" for device in devices)
        return first, second, third


def with_nan(world: World, batches: list[pa.RecordBatch], *, row: int) -> list[pa.RecordBatch]:
    """The same experience, but for one log-probability of the `row`-th row."""
    changed = []
    for batch in batches:
        records = batch.to_pylist()
        if 0 <= row < len(records):
            records[row]["logprobs"][0] = float("nan")
        row -= len(records)
        changed.append(pa.RecordBatch.from_pylist(records, schema=batch.schema))
    return changed
