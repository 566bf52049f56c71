"""SpokenWOZ: `text*/data.json` (dialogue -> log of turns with timed words), `audio*/DIALOGUE.wav`, channel by speaker.

A record is the first user turns of a dialogue, each cut from the user's channel; agents' replies are given as text, the
last of them is the reference for the turn to be played.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlaudio.data.importers.base import Item, SkipError, Sounds, field, the_file
from rlaudio.errors import DataError
from rlaudio.types import Message, PromptRecord, TextPart

_MARGIN_S = 0.2
"""Around the words: their times are a recogniser's."""


class SpokenWoz:
    """Args: max_turns: user turns of a dialogue that are taken; later ones are left out."""

    license: str | None = "CC-BY-NC-4.0"

    def __init__(self, *, max_turns: int = 6) -> None:
        self._max_turns = max_turns

    def items(self, source: Path) -> Iterator[Item]:
        listing = the_file(source, "data.json", "*/data.json")
        try:
            dialogues = json.loads(listing.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{listing}: is no JSON ({error}); fetch it again") from error
        files = {path.stem: path for path in sorted(source.rglob("*.wav"))}
        for name, fields in dialogues.items():
            yield Item(f"{listing.name}:{name}", partial(self._record, name, fields, files.get(name)))

    def _record(self, name: str, fields: Mapping[str, Any], path: Path | None, sounds: Sounds) -> PromptRecord:
        if path is None:
            raise SkipError(f"there is no {name}.wav in the copy")
        log = field(fields, "log", list)
        users = [index for index, turn in enumerate(log) if turn.get("tag") == "user" and index + 1 < len(log)]
        users = [index for index in users if log[index + 1].get("tag") == "system"][: self._max_turns]
        if not users:
            raise SkipError("it has no user turn that an agent answers")
        messages = []
        for index in users:
            reply = field(log[index + 1], "text", str)
            last = index == users[-1]
            part = _cut(log[index], path, sounds)
            messages.append(Message("user", (part,), reference_response=reply if last else None))
            messages += [] if last else [Message("assistant", (TextPart(reply),))]
        return PromptRecord(f"spokenwoz-{name}", "task dialogue", tuple(messages))


def _cut(turn: Mapping[str, Any], path: Path, sounds: Sounds) -> Any:
    words = field(turn, "words", list)
    try:
        start_s = min(float(word["BeginTime"]) for word in words) / 1000
        end_s = max(float(word["EndTime"]) for word in words) / 1000
        channel = int(words[0]["ChannelId"])
    except (KeyError, TypeError, ValueError) as error:
        raise SkipError(f"a word has no time or channel ({error!r})") from error
    span = {"start_s": start_s - _MARGIN_S, "end_s": end_s + _MARGIN_S}
    return sounds.cut(path, **span, channel=channel, said=field(turn, "text", str), language="en")
