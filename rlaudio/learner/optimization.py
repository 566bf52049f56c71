"""DeepSpeed, behind the few things the learner needs of it: a schedule, an engine, a gradient norm."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from rlaudio.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch._C._distributed_c10d import Store  # torch.distributed does not type what it re-exports

    from rlaudio.config import LearnerSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate over optimizer steps: linear warm-up, then flat, or a cosine down to `min_lr`.

    Attributes:
        lr: the peak.
        warmup_steps: the first step uses lr / warmup_steps.
        decay_steps: step at which the cosine has reached `min_lr`; 0 keeps the rate flat.
    """

    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay_steps: int = 0

    def at(self, step: int) -> float:
        """Rate of the step that follows `step` finished ones."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.decay_steps <= 0:
            return self.lr
        span = max(1, self.decay_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_engine(module: nn.Module, *, settings: LearnerSettings, dtype: str, width: int) -> DeepSpeedEngine:
    """Wrap `module`; its parameters with `requires_grad` are trained by AdamW.

    At stage 3 what is not called alike on every rank must not be a submodule: see `sharding.gather_at_root`.

    Loss scaling by accumulation steps is off and boundaries are the caller's: call `backward(loss,
    scale_wrt_gas=False)` and mark the last micro-batch of a step as the boundary.

    Args:
        module: holds the policy.
        settings: optimizer, ZeRO stage and what is offloaded.
        dtype: of the parameters.
        width: of the decoder; communication buckets are measured in it.

    Raises:
        ConfigError: a ZeRO stage that does not exist or cannot offload what it should, bfloat16 without ZeRO (there
            would be no float32 master weights), or nothing to train.
    """
    require_stage(settings, dtype=dtype)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("every parameter is frozen: nothing to train; set train_encoder or check the model family")
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=_betas(settings), weight_decay=settings.weight_decay)
    config = _base_config(dtype) | {
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": _zero_settings(
            settings.zero_stage,
            width=width,
            offload_optimizer=settings.offload_optimizer == "cpu",
            offload_parameters=settings.offload_parameters == "cpu",
        ),
        **_float32_sums(dtype),
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own CPU Adam is compiled at first use; torch's steps the same numbers, slower.
        "zero_force_ds_cpu_optimizer": False,
    }
    with _one_optimizer_of_stages_1_and_2():
        return _initialised(module, config, optimizer=optimizer)


def build_frozen(module: nn.Module, *, dtype: str, width: int, offload: bool) -> DeepSpeedEngine:
    """Wrap `module`, divided by a `sharding.Sharder`, for forwards alone: layers are gathered as they are called.

    Args:
        module: frozen; what is not called alike on every rank is no submodule, see `sharding.gather_at_root`.
        dtype: of the parameters.
        width: of the decoder.
        offload: the ranks' shares lie in main memory.
    """
    zero = _zero_settings(3, width=width, offload_parameters=offload) | {"memory_efficient_linear": False}
    return _initialised(module, _base_config(dtype) | {"zero_optimization": zero}, optimizer=None)


def division_config(*, dtype: str, offload: bool, frozen: bool) -> dict[str, object]:
    """What a `sharding.Sharder` divides by: the part of an engine's configuration that concerns single parameters."""
    zero: dict[str, object] = {"stage": 3, "memory_efficient_linear": not frozen}
    return _base_config(dtype) | {"zero_optimization": zero | _offloaded("offload_param", offload)}


def require_stage(settings: LearnerSettings, *, dtype: str) -> None:
    """Raises ConfigError: the ZeRO stage does not exist, or not with this dtype and these offloads."""
    stage = settings.zero_stage
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"learner.zero_stage={stage} is no ZeRO stage: set 0, 1, 2 or 3")
    if dtype == "bfloat16" and stage == 0:
        raise ConfigError("learner.zero_stage=0 keeps no float32 master weights for model.dtype=bfloat16: set it to 1")
    if settings.offload_optimizer == "cpu" and stage == 0:
        raise ConfigError("learner.offload_optimizer=cpu needs ZeRO: set learner.zero_stage=1 or more")
    if settings.offload_parameters == "cpu" and stage < 3:
        raise ConfigError(f"learner.offload_parameters=cpu at ZeRO stage {stage}: only stage 3 can, set zero_stage=3")


def _base_config(dtype: str) -> dict[str, object]:
    return {
        # Only ratios of these matter to DeepSpeed, and those are fixed here: what is in a micro-batch is our business.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": dtype == "bfloat16"},
        "steps_per_print": None,
    }


def _float32_sums(dtype: str) -> dict[str, object]:
    """Gradients are added up in float32, over micro-batches and over ranks.

    By itself DeepSpeed 0.19 adds in the dtype of the parameters: to a bfloat16 sum, what is smaller than a 256th of it
    adds nothing, and the more micro-batches there are, the less each of them counts.
    """
    if dtype == "float32":
        return {}
    return {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


@contextmanager
def _one_optimizer_of_stages_1_and_2() -> Iterator[None]:
    """DeepSpeed 0.19 takes another optimizer at stage 1 where bfloat16 gradients are added up in float32.

    It keeps gradients and checkpoints in ways of its own and cannot offload. The one it takes at stage 2, and at stage
    1 with offloading, adds up in float32 as well.
    """
    from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION, DeepSpeedEngine

    choose = DeepSpeedEngine._do_optimizer_sanity_check

    def chosen(engine: DeepSpeedEngine, optimizer: object) -> object:
        found = choose(engine, optimizer)
        return ZERO_OPTIMIZATION if found == BFLOAT16 else found

    DeepSpeedEngine._do_optimizer_sanity_check = chosen
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = choose


def _initialised(
    module: nn.Module, config: dict[str, object], *, optimizer: torch.optim.Optimizer | None
) -> DeepSpeedEngine:
    import deepspeed

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def _zero_settings(
    stage: int, *, width: int, offload_optimizer: bool = False, offload_parameters: bool = False
) -> dict[str, object]:
    """Buckets of a few weight matrices, so that a tiny model in a test goes through the same code as a large one."""
    bucket = 4 * width * width
    values: dict[str, object] = {"stage": stage, "reduce_bucket_size": bucket}
    values |= _offloaded("offload_optimizer", offload_optimizer) | _offloaded("offload_param", offload_parameters)
    if stage == 3:
        values |= {
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_reuse_distance": bucket,  # what is needed later than that is let go and gathered again
            "stage3_param_persistence_threshold": 10 * width,  # norms and biases stay on every rank
        }
    return values


def _offloaded(what: str, yes: bool) -> dict[str, object]:
    return {what: {"device": "cpu", "pin_memory": True}} if yes else {}


def _betas(settings: LearnerSettings) -> tuple[float, float]:
    if len(settings.betas) != 2:
        raise ConfigError(f"learner.betas={settings.betas} must be two numbers, for example [0.9, 0.99]")
    return settings.betas[0], settings.betas[1]


def prepare_deepspeed() -> None:
    """Import DeepSpeed quietly and keep it from compiling what is not used, and from warning at every step.

    DeepSpeed 0.19 builds a shared-memory collective for CPUs at start (66 s the first time, 6 s after that, and a
    compiler must be there); gloo does without it. At ZeRO stage 3 it calls collectives that torch 2.13 has renamed: a
    warning each time. To learn whether it knows AdamW it imports Muon, whose functions are compiled at import: 7 s of
    processor time per rank for torch's compiler alone.
    """
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.runtime import compiler
        from deepspeed.utils import logger
    kept, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer
    finally:
        compiler.compile = kept
    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_lr(engine: DeepSpeedEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(engine: DeepSpeedEngine, *, stage: int) -> float:
    """L2 norm of the reduced gradients, after the boundary's backward and before the step; equal on every rank.

    NaN or infinite when any gradient is.
    """
    squares = [gradient.float().square().sum() for gradient in _reduced_gradients(engine, stage=stage)]
    # On the engine's device, which is where ranks can add up, though offloaded gradients lie in main memory.
    total = sum(squares, torch.zeros(())).double().to(engine.device)
    if stage > 0:  # each rank holds a part
        dist.all_reduce(total)
    return math.sqrt(value) if (value := total.item()) >= 0 else math.nan


def _reduced_gradients(engine: DeepSpeedEngine, *, stage: int) -> Iterator[torch.Tensor]:
    if stage == 0:
        yield from (parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None)
        return
    if engine.zero_use_cpu_optimizer():
        yield from _offloaded_gradients(engine, stage=stage)
        return
    # DeepSpeed 0.19 keeps the partition's reduced gradients here until step(); a test trains with every stage.
    parts: dict[int, Iterable[torch.Tensor] | None] = engine.optimizer.averaged_gradients
    for part in parts.values():
        yield from part or ()


def _offloaded_gradients(engine: DeepSpeedEngine, *, stage: int) -> Iterator[torch.Tensor]:
    """With the optimizer in main memory DeepSpeed 0.19 copies the partition's reduced gradients beside its weights."""
    optimizer = engine.optimizer
    if stage < 3:  # at stage 3 the backward has waited
        optimizer._wait_for_offload_copies()
    flat = optimizer.single_partition_of_fp32_groups if stage < 3 else optimizer.fp32_partitioned_groups_flat
    yield from (weights.grad for weights in flat if weights.grad is not None)


def discard_gradients(engine: DeepSpeedEngine, *, stage: int) -> None:
    """Forget everything accumulated since the last step."""
    if stage == 0:
        engine.zero_grad()
        return
    optimizer = engine.optimizer
    optimizer.zero_grad()
    if stage < 3 and engine.zero_use_cpu_optimizer():
        # What its step() begins and ends with, or the next backward would add to the gradients that lie there.
        optimizer.micro_step_id = -1
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()
    parts: dict[int, object] = optimizer.averaged_gradients
    for key in list(parts):
        parts[key] = None


def join_ranks(*, rank: int, world_size: int, store: Store, on_gpu: bool, timeout_s: float) -> None:
    """Bring up `torch.distributed` over an open store; what DeepSpeed finds running it uses.

    Args:
        rank, world_size: place in the group.
        store: shared by the ranks; a `HashStore` when there is one rank, so no port is needed.
        on_gpu: NCCL instead of gloo.
        timeout_s: of every collective.
    """
    if dist.is_initialized():
        return
    # DeepSpeed insists on it. Ray shows each rank only its own device, so every rank's is the first.
    os.environ["LOCAL_RANK"] = "0"
    backend = "nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    prepare_deepspeed()
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)


def leave_ranks() -> None:
    """Take down what `join_ranks` brought up, so that this process can join other ranks.

    DeepSpeed remembers the group too: taken down behind its back, its next engine asks torch for a group that is gone.
    """
    import deepspeed
    from deepspeed.utils import groups

    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    else:
        # Whoever had opened the world (vLLM, in one process with a learner) took it down; DeepSpeed 0.19 is not told.
        groups._release_process_group_references()
        deepspeed.comm.comm.cdb = None
    os.environ.pop("LOCAL_RANK", None)
