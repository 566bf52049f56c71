"""The actor that serves a judge to be measured: comparisons in, verdicts out."""

from collections.abc import Sequence

from rlaudio.actors.serving import ping_engine, start_engine
from rlaudio.audio.store import ClipStore
from rlaudio.config_judges import JudgeConfig
from rlaudio.engines.base import Engine
from rlaudio.models.families import open_family
from rlaudio.rewards.asking import Asking, JudgeModel, ServedModel
from rlaudio.rewards.endpoint import ChatEndpoint, EndpointModel
from rlaudio.rewards.levels import Scale
from rlaudio.rewards.verdicts import Answer, Ask, verdicts_of
from rlaudio.types import WeightVersion


class JudgeWorker:
    """Plain class; `recipes.judges` makes it a Ray actor. `start` first."""

    def __init__(self, config: JudgeConfig) -> None:
        self._config = config
        self._engine: Engine | None = None
        self._model: JudgeModel | None = None

    async def start(self) -> None:
        """Raises ConfigError, EngineError: as `actors.judge_services`."""
        config = self._config
        asking = Asking(
            source="calibrate",
            seed=config.run.seed,
            scale=Scale(config.asking.levels),
            instructions=config.asking.instructions or None,
            max_new_tokens=config.asking.max_new_tokens or None,
            max_section_tokens=config.asking.max_section_tokens,
            clips=ClipStore(config.clips) if config.asking.hears == "sound" else None,
        )
        if config.judge_model.endpoint.url:
            endpoint = ChatEndpoint(config.judge_model.endpoint)
            await endpoint.check()
            self._model = EndpointModel(endpoint, asking)
            return
        family = open_family(config.judge_model)
        self._engine = await start_engine(
            config.judge_model.engine,
            family=family,
            dtype=config.judge_model.dtype,
            on_gpu=config.calibration.num_gpus > 0,
            version=WeightVersion(0, 0),
            seed=config.run.seed,
            start_deadline_s=config.calibration.start_deadline_s,
        )
        self._model = ServedModel(self._engine, family, asking)

    async def verdicts(self, asks: Sequence[Ask]) -> list[Answer]:
        """Raises as `verdicts_of`."""
        assert self._model is not None, "start() comes first"
        settings = self._config.calibration
        return await verdicts_of(
            self._model,
            asks,
            scale=Scale(self._config.asking.levels),
            deadline_s=settings.verdict_deadline_s,
            max_in_flight=settings.max_in_flight,
        )

    async def ping(self) -> None:
        if self._engine is not None:
            await ping_engine(self._engine)
