"""What the rollout actor lends to its users: the model they think with, and where their sounds go."""

from dataclasses import dataclass

from rlaudio.actors.serving import start_served
from rlaudio.audio.store import ClipStore
from rlaudio.config import RunConfig
from rlaudio.dialogue.served import ServedText
from rlaudio.dialogue.users import UserServices
from rlaudio.engines.base import Engine
from rlaudio.rewards.endpoint import ChatEndpoint


@dataclass(frozen=True, slots=True)
class RunningUserServices:
    """The services, and what of them is to be closed.

    Attributes:
        lent: what the user gets.
        engine: of a model that is served here; None where there is none, or it is an endpoint.
        endpoint: the same of an endpoint.
    """

    lent: UserServices
    engine: Engine | None = None
    endpoint: ChatEndpoint | None = None

    async def close(self) -> None:
        if self.endpoint is not None:
            await self.endpoint.close()
        if self.engine is not None:
            await self.engine.close()


async def start_user_services(config: RunConfig, *, clips: ClipStore, on_gpu: bool) -> RunningUserServices:
    """`dialogue.user_model`, running; its weights never change.

    Raises:
        ConfigError: the endpoint's key is missing, or the model's family cannot be loaded.
        EngineError: the engine could not be built in time, or the endpoint is not there.
    """
    settings = config.dialogue.user_model
    if settings.endpoint.url:
        endpoint = ChatEndpoint(settings.endpoint, place="dialogue.user_model.endpoint")
        await endpoint.check()
        return RunningUserServices(UserServices(endpoint, clips), endpoint=endpoint)
    if not settings.path:
        return RunningUserServices(UserServices(None, clips))
    engine, family = await start_served(
        settings, on_gpu=on_gpu, seed=config.run.seed, start_deadline_s=config.rollout.start_deadline_s
    )
    model = ServedText(engine, family, max_model_len=settings.engine.max_model_len)
    return RunningUserServices(UserServices(model, clips), engine=engine)
