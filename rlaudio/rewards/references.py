"""What a response is compared with: the record's reference, what a frozen policy says, or another sibling."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rlaudio.dialogue.player import SILENCE, derive_seed
from rlaudio.dialogue.render import Clips
from rlaudio.dialogue.template import ChatTemplate
from rlaudio.dialogue.users import user_message
from rlaudio.engines.base import Engine, GenerationRequest, Sampling
from rlaudio.errors import JudgeError
from rlaudio.models.base import ModelFamily
from rlaudio.rewards.serving import SharedCache
from rlaudio.types import Dialogue, PromptRecord, Turn

REFERENCES = ("record", "policy", "siblings")

_ATTEMPTS = 2


class References(Protocol):
    """Where references come from."""

    def has(self, record: PromptRecord, dialogues: Sequence[Dialogue], turn: int) -> bool:
        """Whether this turn can be compared at all; the same answer for all siblings."""
        ...

    async def text(self, record: PromptRecord, dialogues: Sequence[Dialogue], *, dialogue: Dialogue, turn: Turn) -> str:
        """The reference for one sibling's turn; "" where the other side has nothing to say.

        Raises:
            JudgeError: there is none after all. EngineError: the frozen policy's engine failed.
        """
        ...


class RecordReferences:
    """`reference_response` of the user message; turns without one are not judged."""

    def has(self, record: PromptRecord, dialogues: Sequence[Dialogue], turn: int) -> bool:
        return user_message(record, turn).reference_response is not None

    async def text(self, record: PromptRecord, dialogues: Sequence[Dialogue], *, dialogue: Dialogue, turn: Turn) -> str:
        return user_message(record, turn.index).reference_response or ""


class SiblingReferences:
    """Circular pairing: sibling i is compared with i + 1, the last one with the first.

    So n siblings cost n comparisons, and every reply is once the response and once the reference. A sibling whose turn
    has no reply is passed over for the one after it; where no other sibling has one, the reference is "". Judged is the
    history of sibling i, its own earlier replies in it. One dialogue alone (an evaluation) has nobody to be compared
    with and is not judged, nor is a turn at which a simulated user told the siblings different things.
    """

    def has(self, record: PromptRecord, dialogues: Sequence[Dialogue], turn: int) -> bool:
        asked = {
            one.spoken and one.spoken.text for dialogue in dialogues for one in dialogue.turns if one.index == turn
        }
        return len(dialogues) > 1 and len(asked) <= 1

    async def text(self, record: PromptRecord, dialogues: Sequence[Dialogue], *, dialogue: Dialogue, turn: Turn) -> str:
        circle = sorted(dialogues, key=lambda one: one.sibling)
        place = next(index for index, one in enumerate(circle) if one.sibling == dialogue.sibling)
        for other in (*circle[place + 1 :], *circle[:place]):
            for played in other.turns:
                if played.index == turn.index and played.parsable and played.reply:
                    return played.reply
        return ""


@dataclass(frozen=True, slots=True)
class FrozenPolicy:
    """A served model that writes references. Its tokenizer must be the policy's: it reads the policy's own prompts."""

    engine: Engine
    family: ModelFamily
    clips: Clips
    max_new_tokens: int
    seed: int = 0


class PolicyReferences:
    """What a frozen policy answers to the same history, sounds included: asked once, greedily, and kept by content."""

    def __init__(self, policy: FrozenPolicy, *, source: str, cache_size: int) -> None:
        self._policy, self._source = policy, source
        self._template = ChatTemplate(policy.family.tokenizer, style=policy.family.style)
        self._cache: SharedCache[str] = SharedCache(cache_size)
        self._num_asked = 0

    def has(self, record: PromptRecord, dialogues: Sequence[Dialogue], turn: int) -> bool:
        return True

    async def text(self, record: PromptRecord, dialogues: Sequence[Dialogue], *, dialogue: Dialogue, turn: Turn) -> str:
        shown = turn.prompt_ids.tobytes() + "".join(span.sha256 for span in turn.clips).encode()
        key = hashlib.blake2b(shown, digest_size=16).digest()
        return await self._cache.get(key, lambda: self._answer(turn, key))

    async def _answer(self, turn: Turn, key: bytes) -> str:
        policy, ids = self._policy, self._policy.family.tokenizer.ids
        clips = tuple(
            SILENCE if span.sha256 == SILENCE.sha256 else policy.clips.get(span.sha256) for span in turn.clips
        )
        for attempt in range(_ATTEMPTS):
            self._num_asked += 1
            sampling = Sampling(
                max_new_tokens=policy.max_new_tokens,
                temperature=float(attempt > 0),  # the greedy answer was no reply: another one is needed
                seed=derive_seed("reference", str(policy.seed), key.hex()) if attempt else None,
                stop_token_ids=ids.stop,
                banned_token_ids=ids.banned,
            )
            request = GenerationRequest(
                f"{self._source}/reference/{self._num_asked}", turn.prompt_ids, sampling, clips, turn.clips
            )
            generation = await policy.engine.generate(request)
            reply = self._template.parse(generation.response_ids.tolist()).reply
            if generation.finish_reason == "stop" and reply:
                return reply
        raise JudgeError(f"the frozen policy gave no reply in {_ATTEMPTS} attempts")
