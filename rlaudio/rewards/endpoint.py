"""A judge behind any OpenAI-compatible endpoint: a time-out per request, a few retries, clear errors.

The key comes from the environment of the reward actor, never from the configuration, and is masked in every message.
"""

import asyncio
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlaudio.config import EndpointSettings
from rlaudio.errors import ConfigError, EngineDeadError, EngineError, VerdictError
from rlaudio.rewards.asking import Asking, Question
from rlaudio.rewards.chat_prompt import Message, chat_messages, default_instructions, parse_verdict
from rlaudio.rewards.prompt import Comparison

MAX_BACKOFF_S = 30.0

_BUSY = frozenset({408, 409, 425, 429})
"""Besides 5xx: the same request may succeed later."""
_HOPELESS = frozenset({401, 403, 404})
"""No request will succeed: a wrong key, address or model name."""


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What an endpoint answered. `finish_reason` is its own word, "stop" when the model ended by itself."""

    text: str
    finish_reason: str | None


class ChatEndpoint:
    """One endpoint and model. Build it where it is used: it reads the key from this process's environment.

    Args:
        environment: where the key is looked up; the process's own by default.
        place: the settings' name, for messages.

    Raises:
        ConfigError: no model is named, or the variable that should hold the key is empty.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        environment: Mapping[str, str] = os.environ,
        place: str = "rewards.judge_model.endpoint",
    ) -> None:
        if not settings.model:
            raise ConfigError(f"{place}.model is empty: name the model as the endpoint knows it")
        key = environment.get(settings.key_env, "") if settings.key_env else ""
        if settings.key_env and not key:
            raise ConfigError(
                f"{place} needs a key, and {settings.key_env} is not set where the actor runs: set it on every node, "
                f"or {place}.key_env='' for an endpoint without one"
            )
        import openai  # takes seconds to import, and only runs with an endpoint need it

        self._openai = openai
        self._settings, self._key, self._place = settings, key, place
        self._client = openai.AsyncOpenAI(
            base_url=settings.url, api_key=key or "none", max_retries=0, timeout=settings.timeout_s
        )

    @property
    def name(self) -> str:
        """For messages."""
        return self._masked(f"{self._settings.model} at {self._settings.url}")

    async def check(self) -> None:
        """Whether somebody is there and accepts the key, so that a run does not find out after an hour.

        Raises:
            EngineError: nobody answered, or the key is refused.
        """
        try:
            await asyncio.wait_for(self._client.models.list(), self._settings.timeout_s)
        except self._openai.APIStatusError as error:
            if error.status_code not in (401, 403):
                return  # somebody is there; not every server lists its models
            told: Exception = EngineError(f"{self.name} refuses the key: {self._reason(error)}; correct it")
        except (self._openai.APIConnectionError, TimeoutError) as error:
            told = EngineError(
                f"{self.name} cannot be reached ({self._reason(error)}): start it, or correct {self._place}.url"
            )
        except (self._openai.OpenAIError, ValueError):
            return  # an answer of some kind
        else:
            return
        raise told

    async def complete(
        self,
        messages: Sequence[Message],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int | None,
        retried: Callable[[], None] = lambda: None,
    ) -> ChatAnswer:
        """One answer. Busy, broken and silent servers are asked again, `attempts` times in all, with growing pauses.

        Args:
            retried: called before every repetition.

        Raises:
            EngineError: no answer: time-outs, errors of the server, a refused request.
            EngineDeadError: key, address or model name are wrong.
            VerdictError: an answer without text.
        """
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": list(messages),
            "max_completion_tokens": max_new_tokens,
            "temperature": temperature,
            **({"seed": seed} if seed is not None else {}),
            **({"extra_body": dict(self._settings.extra_body)} if self._settings.extra_body else {}),
        }
        attempts = self._settings.attempts
        for attempt in range(attempts):
            if attempt:
                retried()
            last = attempt + 1 == attempts
            try:
                # The client's own time-out is per read: a server that sends a byte a second would never meet it.
                answer = await asyncio.wait_for(self._client.chat.completions.create(**body), self._settings.timeout_s)
            except self._openai.APIStatusError as error:
                told, pause_s = self._refused(error), _retry_after_s(error)
                if isinstance(told, EngineDeadError) or not _worth_another(error.status_code) or last:
                    break
            except (self._openai.APITimeoutError, TimeoutError):
                told, pause_s = EngineError(f"{self.name}: no answer within {self._settings.timeout_s:g} s"), None
                if last:
                    break
            except (self._openai.OpenAIError, ValueError) as error:  # connection lost, or no JSON
                told, pause_s = EngineError(f"{self.name}: {self._reason(error)}"), None
                if last:
                    break
            else:
                return self._read(answer)
            await asyncio.sleep(self._pause_s(attempt) if pause_s is None else pause_s)
        # Not chained: what the library raised carries the request, and with it the key.
        raise told from None

    async def close(self) -> None:
        await self._client.close()

    def _read(self, answer: Any) -> ChatAnswer:
        """Servers answer many things under 200: whatever has no text is no answer."""
        choices = getattr(answer, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = getattr(choice, "message", None)
        text = getattr(message, "content", None)
        if not isinstance(text, str) or not text.strip():
            refusal = getattr(message, "refusal", None)
            what = f"refused: {str(refusal)[:80]!r}" if refusal else f"{str(answer)[:80]!r}"
            raise VerdictError(self._masked(f"the endpoint's answer holds no text ({what})"))
        reason = getattr(choice, "finish_reason", None)
        return ChatAnswer(text, reason if isinstance(reason, str) else None)

    def _refused(self, error: Any) -> EngineError:
        status = error.status_code
        said = f"{self.name} answered {status}: {self._reason(error)}"
        if status in _HOPELESS:
            return EngineDeadError(f"{said}; correct {self._place}, or its key")
        return EngineError(said)

    def _pause_s(self, attempt: int) -> float:
        # Jitter, or all questions that failed together would come back together.
        return min(MAX_BACKOFF_S, self._settings.backoff_s * 2**attempt) * random.uniform(0.5, 1.0)

    def _reason(self, error: BaseException) -> str:
        return self._masked((str(error) or type(error).__name__).strip().splitlines()[0][:300])

    def _masked(self, text: str) -> str:
        return text.replace(self._key, "[key]") if self._key else text


class EndpointModel:
    """A judge that is asked over HTTP."""

    def __init__(self, endpoint: ChatEndpoint, asking: Asking, *, retried: Callable[[], None] = lambda: None) -> None:
        self._endpoint, self._asking, self._retried = endpoint, asking, retried
        self._instructions = asking.instructions or default_instructions(asking.scale)

    def question(self, comparison: Comparison, *, response_first: bool) -> Question:
        messages, key = chat_messages(
            comparison,
            response_first=response_first,
            instructions=self._instructions,
            max_section_tokens=self._asking.max_section_tokens,
            clips=self._asking.clips,
        )
        return Question(key, lambda attempt: self._ask(messages, key, attempt))

    async def _ask(self, messages: Sequence[Message], key: bytes, attempt: int) -> int:
        asking = self._asking
        temperature = asking.temperature_of(attempt)
        answer = await self._endpoint.complete(
            messages,
            max_new_tokens=1024 if asking.max_new_tokens is None else asking.max_new_tokens,
            temperature=temperature,
            seed=asking.seed_of(key, attempt) if temperature > 0 else None,
            retried=self._retried,
        )
        return parse_verdict(answer.text, scale=asking.scale, finish_reason=answer.finish_reason)


def _worth_another(status: int) -> bool:
    return status >= 500 or status in _BUSY


def _retry_after_s(error: Any) -> float | None:
    """What the server asks for, when it is bearable."""
    try:
        wait_s = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(wait_s, MAX_BACKOFF_S) if wait_s >= 0 else None
