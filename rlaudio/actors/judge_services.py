"""What the reward actor serves to its sources: a judge model or endpoint, a frozen policy, the run's sounds."""

from rlaudio.actors.serving import start_served
from rlaudio.audio.store import ClipStore
from rlaudio.config import RunConfig, ServedModelSettings
from rlaudio.engines.base import Engine
from rlaudio.errors import ConfigError
from rlaudio.models.base import ModelFamily
from rlaudio.models.families import open_family
from rlaudio.models.tokenizers import TOKENIZER_FILE
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.endpoint import ChatEndpoint
from rlaudio.rewards.references import FrozenPolicy


async def start_services(config: RunConfig, *, on_gpu: bool) -> JudgeServices:
    """Everything the configuration names, running.

    Raises:
        ConfigError: the endpoint's key is missing, or the frozen policy reads another vocabulary than the policy.
        EngineError: an engine could not be built in time, or the endpoint is not there.
    """
    rewards = config.rewards
    engine, family, endpoint, policy = None, None, None, None
    if rewards.judge_model.endpoint.url:
        endpoint = ChatEndpoint(rewards.judge_model.endpoint)
        await endpoint.check()
    elif rewards.judge_model.path:
        engine, family = await _serve(config, rewards.judge_model, on_gpu=on_gpu)
    clips = ClipStore(config.data.clips)
    if rewards.reference_model.path:
        _require_same_tokenizer(config)
        frozen, its_family = await _serve(config, rewards.reference_model, on_gpu=on_gpu)
        policy = FrozenPolicy(frozen, its_family, clips, config.sampling.max_new_tokens, config.run.seed)
    return JudgeServices(
        engine=engine,
        family=family,
        seed=config.run.seed,
        endpoint=endpoint,
        policy=policy,
        clips=clips,
        group_deadline_s=rewards.group_deadline_s,
    )


async def _serve(config: RunConfig, settings: ServedModelSettings, *, on_gpu: bool) -> tuple[Engine, ModelFamily]:
    return await start_served(
        settings, on_gpu=on_gpu, seed=config.run.seed, start_deadline_s=config.rewards.start_deadline_s
    )


def _require_same_tokenizer(config: RunConfig) -> None:
    """It is shown the policy's own ids."""
    policy, frozen = open_family(config.model), open_family(config.rewards.reference_model)
    files = [(family.path / TOKENIZER_FILE).read_bytes() for family in (policy, frozen)]
    if files[0] != files[1] or policy.tokenizer.ids != frozen.tokenizer.ids or policy.style != frozen.style:
        raise ConfigError(
            f"rewards.reference_model.path is {str(frozen.path)!r}, whose {TOKENIZER_FILE} is not that of model.path: "
            "the frozen policy reads the policy's own prompts, give a checkpoint of the same family and vocabulary"
        )
