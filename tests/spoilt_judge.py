"""A generative judge whose real answers are garbage some of the time. Light to import: reward actors do."""

import hashlib
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from rlaudio.engines.base import Engine, Generation, GenerationRequest
from rlaudio.models.base import ModelFamily
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.generative import GenerativeJudge


class SpoiltEngine:
    """A real engine whose answers are garbage some of the time; which of them, and how, follows from the question.

    Args:
        switch: a file that holds the share of spoilt answers; without it none is.
    """

    def __init__(self, engine: Engine, family: ModelFamily, switch: Path) -> None:
        self._engine, self._tokenizer, self._switch = engine, family.tokenizer, switch

    async def generate(self, request: GenerationRequest) -> Generation:
        real = await self._engine.generate(request)
        share = float(self._switch.read_text()) if self._switch.exists() else 0.0
        asked = request.prompt_ids.tobytes() + repr(request.sampling).encode()
        random = Random(hashlib.sha256(asked).digest())
        return self._spoilt(real, random.randrange(3)) if random.random() < share else real

    def _spoilt(self, real: Generation, way: int) -> Generation:
        ids = real.response_ids.tolist()
        if way == 0:
            return replace(real, response_ids=np.asarray(ids[: len(ids) // 2], np.int32), finish_reason="length")
        spoilt = ids[::-1] if way == 1 else [*ids[:-1], *self._tokenizer.encode("A+ B++"), ids[-1]]
        return replace(real, response_ids=np.asarray(spoilt, np.int32))


class SpoiltJudge(GenerativeJudge):
    """The generative judge over a spoilt engine. `switch`: see `SpoiltEngine`."""

    def __init__(self, services: JudgeServices, *, name: str, switch: str, **options: Any) -> None:
        engine, family = services.require(name)
        spoilt: Any = SpoiltEngine(engine, family, Path(switch))
        super().__init__(replace(services, engine=spoilt), name=name, **options)
