"""Builds the engine an actor serves from the run's configuration. Runs inside the actor: imports vLLM."""

from dataclasses import replace
from typing import cast

from rlaudio.config import EngineConfig, ServedModelSettings
from rlaudio.engines.base import Engine, Sampling
from rlaudio.engines.probe import ProbedEngine
from rlaudio.engines.settings import EngineSettings, engine_environment
from rlaudio.engines.swapping import SwapPolicy
from rlaudio.errors import ConfigError
from rlaudio.models.base import ModelFamily, SpecialIds
from rlaudio.models.families import open_family
from rlaudio.types import WeightVersion


def engine_settings(
    config: EngineConfig,
    *,
    model: str,
    dtype: str,
    on_gpu: bool,
    options: dict[str, object] | None = None,
    seed: int = 0,
    encoded_clips: bool = False,
) -> EngineSettings:
    """The engine's settings.

    Args:
        on_gpu: whether the actor was given a device.
        options: the model family's.
        encoded_clips: every clip will come as encoder states, so the engine is built without the encoder.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(
            f"model.dtype (for a judge, rewards.judge_model.dtype) is {dtype!r}: use float32 (CPU) or bfloat16 (GPU)"
        )
    settings = EngineSettings(
        model=model,
        max_model_len=config.max_model_len,
        device="cuda" if on_gpu else "cpu",
        dtype="float32" if dtype == "float32" else "bfloat16",
        max_num_seqs=config.max_num_seqs,
        kv_cache_mb=None if on_gpu else config.kv_cache_mb,
        gpu_memory_utilization=config.gpu_memory_utilization,
        tensor_parallel=config.tensor_parallel,
        seed=seed,
        enforce_eager=not on_gpu,
        options=options or {},
    )
    if not encoded_clips:
        return settings
    # vLLM drops an encoder that no sound may reach; states then come as embeddings, which it does not count.
    return replace(settings, max_clips_per_prompt=0, options={**settings.options, "enable_mm_embeds": True})


def serving_environment(config: EngineConfig, *, model: str, dtype: str, on_gpu: bool) -> dict[str, str]:
    """Variables that must stand in the actor's runtime environment before vLLM is imported."""
    return engine_environment(engine_settings(config, model=model, dtype=dtype, on_gpu=on_gpu))


async def start_engine(
    config: EngineConfig,
    *,
    family: ModelFamily,
    dtype: str,
    on_gpu: bool,
    version: WeightVersion,
    seed: int,
    encoded_clips: bool = False,
    swap: SwapPolicy = SwapPolicy(),  # noqa: B008 (frozen)
    start_deadline_s: float = 300.0,
) -> Engine:
    """A running engine of the configured kind; see `engine_settings` and, for `swap`, `engines.swapping`.

    Raises:
        EngineError: it could not be built, or not within `start_deadline_s`.
    """
    settings = engine_settings(
        config,
        model=str(family.path),
        dtype=dtype,
        on_gpu=on_gpu,
        options=family.engine_options(),
        seed=seed,
        encoded_clips=encoded_clips,
    )
    if config.kind == "in_process":
        from rlaudio.engines.inprocess import InProcessEngine

        return InProcessEngine(settings, version=version, swap=swap, start_deadline_s=start_deadline_s)
    if config.kind == "async_llm":
        from rlaudio.engines.async_llm import AsyncLLMEngine

        return AsyncLLMEngine(settings, version=version, swap=swap, start_deadline_s=start_deadline_s)
    raise ConfigError(
        f"rollout.engine.kind (for a judge, rewards.judge_model.engine.kind) is {config.kind!r}: use in_process (CPU) "
        "or async_llm (GPU)"
    )


async def ping_engine(engine: Engine) -> None:
    """Wait until the engine's workers have answered: between two steps, whatever waits or runs in it.

    The caller has the deadline that counts. An engine that cannot be examined counts as alive.

    Raises:
        EngineError: they did not answer.
    """
    if hasattr(engine, "call_workers"):
        await cast("ProbedEngine", engine).call_workers("check_health")


def policy_sampling(ids: SpecialIds, *, max_new_tokens: int, temperature: float, top_p: float = 1.0) -> Sampling:
    """Sampling that a template's control ids cannot leak into."""
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_token_ids=ids.stop,
        banned_token_ids=ids.banned,
    )


async def start_served(
    settings: ServedModelSettings, *, on_gpu: bool, seed: int, start_deadline_s: float
) -> tuple[Engine, ModelFamily]:
    """A running engine of a model whose weights never change, and its family.

    Raises:
        ConfigError: the family cannot be loaded.
        EngineError: as `start_engine`.
    """
    family = open_family(settings)
    engine = await start_engine(
        settings.engine,
        family=family,
        dtype=settings.dtype,
        on_gpu=on_gpu,
        version=WeightVersion(0, 0),
        seed=seed,
        start_deadline_s=start_deadline_s,
    )
    return engine, family
