"""Text sets made audible: every text of a user becomes a clip with its transcript, its voice and its language."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from rlaudio.audio.store import ClipStore
from rlaudio.audio.voice import Voice
from rlaudio.data.records import write_records
from rlaudio.errors import AudioError, ConfigError, DataError
from rlaudio.registry import load_object
from rlaudio.types import SAMPLE_RATE_HZ, AudioPart, Message, Part, PromptRecord


@dataclass(frozen=True, slots=True)
class NamedVoice:
    """A voice, and what records call it: the options that it was made with, or its class."""

    name: str
    voice: Voice


@dataclass(frozen=True, slots=True)
class Spoken:
    """What came of it: `skipped` is (record's id, reason)."""

    records: list[PromptRecord]
    skipped: list[tuple[str, str]]
    num_texts: int


def voice_of(named: str, *, place: str = "--voice") -> NamedVoice:
    """The voice of `package.module:Class {option: value}`; errors call it by its `place`.

    Raises:
        ConfigError: there is no such class, it does not take these options, or it has no voice for them.
    """
    name, _, text = named.strip().partition(" ")
    try:
        options = yaml.safe_load(text) if text.strip() else {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{place} {named!r}: its options are no YAML ({error}); write {{voice: en-us}}") from error
    if not isinstance(options, dict):
        raise ConfigError(f"{place} {named!r}: its options are {options!r}; write them as {{voice: en-us}}")
    made = load_object(name)
    try:
        voice: Voice = made(**options)
    except TypeError as error:
        raise ConfigError(f"{place} {named!r}: {name} cannot be built ({error}); correct its options") from error
    except AudioError as error:
        raise ConfigError(f"{place} {named!r}: {error}") from error
    return NamedVoice(" ".join(str(value) for value in options.values()) or name.rpartition(":")[2], voice)


def speak_records(
    records: Sequence[PromptRecord],
    voices: Sequence[NamedVoice],
    *,
    out: Path,
    seed: int,
    language: str | None,
    progressed: Callable[[int], None],
) -> Spoken:
    """Write `out/records.jsonl` and its clips. A user's message that holds a sound already, or that a simulated
    user will find words for, stays as it is.

    Args:
        voices: at least one; a record's texts are all said by the one that (seed, its id) choose.

    Raises:
        DataError: no record could be spoken, or the records hold nothing to speak.
    """
    store = ClipStore(str(out))
    done: list[PromptRecord] = []
    skipped: list[tuple[str, str]] = []
    num_texts = 0
    for number, record in enumerate(records, start=1):
        digest = hashlib.blake2b(f"{seed}\x1f{record.id}".encode(), digest_size=8).digest()
        voice = voices[int.from_bytes(digest, "big") % len(voices)]
        try:
            spoken = replace(
                record, messages=tuple(_message(one, voice, store, language=language) for one in record.messages)
            )
        except AudioError as error:
            skipped.append((record.id, str(error)))
        else:
            num_texts += sum(before != after for before, after in zip(record.messages, spoken.messages, strict=True))
            done.append(spoken)
        progressed(number)
    if not num_texts:
        why = f": record {skipped[0][0]!r}: {skipped[0][1]}" if skipped else "; no user's message is text alone"
        raise DataError(f"nothing was spoken{why}")
    write_records(out / "records.jsonl", done)
    return Spoken(done, skipped, num_texts)


def _message(message: Message, voice: NamedVoice, store: ClipStore, *, language: str | None) -> Message:
    if message.role != "user" or message.improvise or any(isinstance(part, AudioPart) for part in message.parts):
        return message
    clip = store.put(voice.voice.speak(message.text))
    part: Part = AudioPart(store.uri(clip.sha256), clip.sha256, SAMPLE_RATE_HZ, message.text, voice.name, language)
    return replace(message, parts=(part,))
