"""A language model that answers chat messages on an engine of ours."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from rlaudio.dialogue.template import ChatTemplate, Context
from rlaudio.engines.base import Engine, GenerationRequest, Sampling
from rlaudio.errors import RolloutError
from rlaudio.models.base import ModelFamily
from rlaudio.types import Role


@dataclass(frozen=True, slots=True)
class ServedCompletion:
    text: str


class ServedText:
    """Any family's checkpoint, asked in text alone. Its reasoning, if any, is dropped.

    Args:
        max_model_len: most ids of question and answer together; None leaves that to the engine.
    """

    def __init__(self, engine: Engine, family: ModelFamily, *, max_model_len: int | None = None) -> None:
        self._engine, self._family, self._max_model_len = engine, family, max_model_len
        self._template = ChatTemplate(family.tokenizer, style=family.style)
        self._numbers = itertools.count()

    async def complete(
        self, messages: Sequence[dict[str, Any]], *, max_new_tokens: int, temperature: float, seed: int | None
    ) -> ServedCompletion:
        """One answer.

        Raises:
            RolloutError: it does not fit the model's window, or was cut off before it ended.
            EngineError: the engine failed.
        """
        context = Context(self._template, keep_thinking=False)
        for message in messages:
            context.open(cast("Role", message["role"]))
            context.add_text(str(message["content"]))
            context.close()
        prompt = context.prompt()
        room = self._max_model_len
        if room is not None and len(prompt.ids) + max_new_tokens > room:
            raise RolloutError(
                f"the user's model has a window of {room}: {len(prompt.ids)} ids and {max_new_tokens} new ones do not "
                "fit; raise dialogue.user_model.engine.max_model_len"
            )
        ids = self._family.tokenizer.ids
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed if temperature > 0 else None,
            stop_token_ids=ids.stop,
            banned_token_ids=ids.banned,
        )
        request = GenerationRequest(f"user/{next(self._numbers)}", prompt.ids, sampling)
        generation = await self._engine.generate(request)
        parsed = self._template.parse(np.asarray(generation.response_ids).tolist())
        if generation.finish_reason != "stop" or parsed.thinking is None:
            raise RolloutError(
                f"the user's model did not end within {max_new_tokens} ids: raise dialogue.user_options.max_new_tokens"
            )
        return ServedCompletion(parsed.reply)
