"""Plays records against an engine, turn by turn: every user turn is new sound, every sampled id is kept as it came."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from rlaudio.aio import all_or_first_error
from rlaudio.audio.store import ClipStore
from rlaudio.config import DialogueSettings
from rlaudio.dialogue.render import add_message
from rlaudio.dialogue.template import ChatTemplate, Context, Prompt
from rlaudio.dialogue.users import User, UserMove
from rlaudio.engines.base import Engine, Generation, GenerationRequest, Sampling
from rlaudio.errors import AudioError, RolloutError, TurnTimeoutError
from rlaudio.models.base import ModelFamily
from rlaudio.types import SAMPLE_RATE_HZ, AudioClip, Dialogue, EncodedClip, PromptRecord, Turn

# Engines cache what they heard by name: silence has its own.
SILENCE = AudioClip(hashlib.sha256(b"silence").hexdigest(), np.zeros(SAMPLE_RATE_HZ, dtype=np.float32))
"""One second of it."""


class Listener(Protocol):
    """Turns sounds into what the engine shall get, for example states that are computed once per clip."""

    async def hear(self, clips: Sequence[AudioClip]) -> Sequence[AudioClip | EncodedClip]:
        """One per clip, in order, under its name."""
        ...


@dataclass(frozen=True, slots=True)
class PlaySpec:
    """How one group is played.

    Attributes:
        group: unique number of the group in its run.
        num_siblings: how many dialogues are played of the same record.
        sampling: per turn; its seed is replaced by one derived from `seed`.
        seed: names the run and the attempt; equal seeds give equal dialogues on equal weights.
        silence: control: every sound is replaced by the same `SILENCE`, whose length tells nothing either.
        listener: None gives the engine the sounds themselves.
    """

    group: int
    num_siblings: int
    sampling: Sampling
    seed: str
    silence: bool = False
    listener: Listener | None = None


class DialoguePlayer:
    """Owns nothing but its parts, so any number of dialogues may be played at once.

    Args:
        max_model_len: most ids of a prompt and its response together; None leaves that to the engine.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        family: ModelFamily,
        clips: ClipStore,
        user: User,
        settings: DialogueSettings,
        max_model_len: int | None = None,
    ) -> None:
        self._engine = engine
        self._family = family
        self._clips = clips
        self._user = user
        self._settings = settings
        self._max_model_len = max_model_len
        self._template = ChatTemplate(family.tokenizer, style=family.style)

    async def play_group(self, record: PromptRecord, spec: PlaySpec) -> tuple[Dialogue, ...]:
        """All siblings at once; one that fails cancels the others.

        Raises:
            TurnTimeoutError: a turn outlived its deadline.
            RolloutError: the dialogue does not fit the model's window.
            EngineError: the engine failed.
        """
        siblings = range(spec.num_siblings)
        return tuple(await all_or_first_error(self._play(record, spec, sibling) for sibling in siblings))

    async def _play(self, record: PromptRecord, spec: PlaySpec, sibling: int) -> Dialogue:
        async with self._engine.dialogue(f"group {spec.group}, record {record.id!r}, sibling {sibling}"):
            return await self._play_turns(record, spec, sibling)

    async def _play_turns(self, record: PromptRecord, spec: PlaySpec, sibling: int) -> Dialogue:
        context = Context(self._template, keep_thinking=self._settings.keep_thinking)
        clips = _SilentClips() if spec.silence else self._clips
        sounds: dict[str, AudioClip] = {}
        turns: list[Turn] = []
        while len(turns) < self._settings.max_turns:
            move = await self._move(record, spec, sibling=sibling, played=turns)
            if move is None:
                break
            if move.spoken is not None and move.spoken.heard is not None:
                # Kept is what the ids allow; later turns and judges are told the same.
                left = context.break_in(move.spoken.heard)
                move = replace(move, spoken=replace(move.spoken, heard=left))
            for message in move.messages:
                add_message(context, message, family=self._family, clips=clips)
            prompt = context.prompt()
            for span in prompt.clips:
                if span.sha256 not in sounds:
                    sounds[span.sha256] = clips.get(span.sha256)
            turn = await self._play_turn(record, spec, sibling=sibling, move=move, prompt=prompt, sounds=sounds)
            turns.append(turn)
            context.add_response(turn.response_ids.tolist())
            if turn.thinking is None and self._settings.unclosed_thinking == "end":
                break
        return Dialogue(record.id, spec.group, sibling, tuple(turns))

    async def _move(
        self, record: PromptRecord, spec: PlaySpec, *, sibling: int, played: Sequence[Turn]
    ) -> UserMove | None:
        # Siblings share their user. So do all evaluations: before and after the training the same person calls.
        seed = spec.seed if spec.sampling.temperature > 0 else ""
        limit_s = self._settings.seconds_per_turn
        try:
            return await asyncio.wait_for(self._user.move(record, played, seed=seed), limit_s)
        except TimeoutError as error:
            turn = played[-1].index + 1 if played else 0
            raise TurnTimeoutError(
                f"record {record.id!r}, sibling {sibling}, turn {turn}: the user said nothing within {limit_s:g} s; "
                "raise dialogue.seconds_per_turn, or look at dialogue.user_model"
            ) from error

    async def _play_turn(
        self,
        record: PromptRecord,
        spec: PlaySpec,
        *,
        sibling: int,
        move: UserMove,
        prompt: Prompt,
        sounds: Mapping[str, AudioClip],
    ) -> Turn:
        self._require_room(prompt, spec, where=f"record {record.id!r}, sibling {sibling}, turn {move.turn}")
        heard = tuple(sounds[span.sha256] for span in prompt.clips)
        seed = derive_seed(spec.seed, record.id, str(sibling), str(move.turn))
        request = GenerationRequest(
            request_id=f"{spec.group}/{sibling}/{move.turn}/{spec.seed}",
            prompt_ids=prompt.ids,
            sampling=replace(spec.sampling, seed=seed if spec.sampling.temperature > 0 else None),
            clips=heard,
            clip_spans=tuple(replace(s, sha256=c.sha256) for s, c in zip(prompt.clips, heard, strict=True)),
        )
        limit_s = self._settings.seconds_per_turn
        try:
            generation = await asyncio.wait_for(self._generate(request, heard, listener=spec.listener), limit_s)
        except TimeoutError as error:
            raise TurnTimeoutError(
                f"record {record.id!r}, sibling {sibling}, turn {move.turn}: no reply within {limit_s:g} s; "
                "raise dialogue.seconds_per_turn or lower rollout.engine.max_num_seqs"
            ) from error
        parsed = self._template.parse(generation.response_ids.tolist())
        return Turn(
            index=move.turn,
            prompt_ids=prompt.ids,
            response_ids=generation.response_ids,
            logprobs=generation.logprobs,
            version_spans=generation.version_spans,
            clips=prompt.clips,
            thinking=parsed.thinking,
            reply=parsed.reply,
            finish_reason=generation.finish_reason,
            generate_s=generation.generate_s,
            spoken=move.spoken,
        )

    def _require_room(self, prompt: Prompt, spec: PlaySpec, *, where: str) -> None:
        """Before the engine is asked: it would refuse, or cut the response shorter than the policy was promised."""
        room, needed = self._max_model_len, len(prompt.ids) + spec.sampling.max_new_tokens
        if room is not None and needed > room:
            raise RolloutError(
                f"{where}: a prompt of {len(prompt.ids)} ids and up to {spec.sampling.max_new_tokens} new ones do not "
                f"fit the window of {room}: raise rollout.engine.max_model_len, or leave the record out"
            )

    async def _generate(
        self, request: GenerationRequest, sounds: Sequence[AudioClip], *, listener: Listener | None
    ) -> Generation:
        if listener is not None:
            request = replace(request, clips=tuple(await listener.hear(sounds)))
        return await self._engine.generate(request)


class _SilentClips:
    """Stands where a clip store does and answers every name with `SILENCE`."""

    def get(self, sha256: str) -> AudioClip:
        return SILENCE

    def cut(self, sha256: str, start: int, end: int) -> str:
        raise AudioError(
            f"silence of {SILENCE.duration_s:g} s is longer than the model's window: evaluation.silence needs a model "
            "that hears a second"
        )


def derive_seed(*parts: str) -> int:
    """A 63-bit seed from names: equal names, equal seed, on every machine."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
