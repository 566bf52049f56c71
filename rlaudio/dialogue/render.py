"""Messages into a `Context`, records with given replies into supervised rows: the only ways text becomes ids."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlaudio.dialogue.template import ChatTemplate, Context
from rlaudio.errors import AudioError, DataError
from rlaudio.models.base import ModelFamily
from rlaudio.types import AudioClip, AudioPart, ClipSpan, IntArray, Message, PromptRecord


class Clips(Protocol):
    """What rendering needs of a `ClipStore`."""

    def get(self, sha256: str) -> AudioClip: ...

    def cut(self, sha256: str, start: int, end: int) -> str: ...


def add_message(context: Context, message: Message, *, family: ModelFamily, clips: Clips) -> tuple[int, ...]:
    """Append a system, user or given assistant message; sounds become placeholders counted by the model's own rule.

    Returns:
        Of how many pieces each of its sounds is made: 1, or more where a sound is longer than the model's window.

    Raises:
        AudioError: a sound is missing, damaged, or of a length the model cannot hear: names the clip.
        DataError: reasoning that is kept cannot be written down.
    """
    if message.thinking is not None and context.keep_thinking:
        context.add_response(context.template.response(message.thinking, message.text))
        return ()
    context.open(message.role, title=message.title)
    counts = []
    for part in message.parts:
        if isinstance(part, AudioPart):
            pieces = clip_pieces(part, family=family, clips=clips)
            context.add_sound(pieces)
            counts.append(len(pieces))
        else:
            context.add_text(part.text)
    context.close()
    return tuple(counts)


def clip_pieces(part: AudioPart, *, family: ModelFamily, clips: Clips) -> list[tuple[str, int]]:
    """(hash, placeholders) of each piece. Every piece is a clip of the store: later readers need not know of cuts.

    Raises:
        AudioError: as `add_message`.
    """
    num_samples = len(clips.get(part.sha256).samples)
    try:
        bounds = family.pieces(num_samples)
        counts = [family.num_audio_tokens(end - start) for start, end in bounds]
    except AudioError as error:
        raise AudioError(f"{part.uri}: {error}") from error
    if len(bounds) == 1:
        return [(part.sha256, counts[0])]
    names = [clips.cut(part.sha256, start, end) for start, end in bounds]
    return list(zip(names, counts, strict=True))


@dataclass(frozen=True, slots=True)
class SupervisedTurn:
    """One given assistant turn with everything before it: a row of supervised training.

    Attributes:
        prompt_ids: [P] history without earlier reasoning, opened for this turn.
        response_ids: [R] reasoning, reply and end of turn: the ids to learn.
        clip_targets: spoken word ids per clip, for CTC; empty where a clip has no transcript, and for pieces of a
            sound: a transcript does not say which words fall into which piece.
    """

    record: PromptRecord
    turn: int
    prompt_ids: IntArray
    response_ids: IntArray
    clips: tuple[ClipSpan, ...]
    clip_targets: tuple[tuple[int, ...], ...]
    thinking: str
    reply: str


def supervised_turns(record: PromptRecord, *, family: ModelFamily, clips: Clips) -> Iterable[SupervisedTurn]:
    """Every given assistant turn of a record as one training row.

    Raises:
        DataError: the record has no given assistant turn, or one whose reasoning cannot be written down.
        AudioError: as `add_message`.
    """
    template = ChatTemplate(family.tokenizer, style=family.style)
    context = Context(template, keep_thinking=False)
    targets: list[tuple[int, ...]] = []
    turn, found = -1, False
    for message in record.messages:
        if message.role != "assistant":
            turn += message.role == "user"
            counts = add_message(context, message, family=family, clips=clips)
            sounds = [part for part in message.parts if isinstance(part, AudioPart)]
            for sound, count in zip(sounds, counts, strict=True):
                words = tuple(family.tokenizer.encode(sound.transcript or ""))
                targets += [words] if count == 1 else [()] * count
            continue
        found = True
        prompt = context.prompt()
        response = template.response(message.thinking or "", message.text)
        parsed = context.add_response(response)
        yield SupervisedTurn(
            record=record,
            turn=turn,
            prompt_ids=prompt.ids,
            response_ids=np.asarray(response, dtype=np.int32),
            clips=prompt.clips,
            clip_targets=tuple(targets),
            thinking=parsed.thinking or "",
            reply=parsed.reply,
        )
    if not found:
        raise DataError(
            f"record {record.id!r} has no assistant message, so there is nothing to learn from: give replies"
        )
