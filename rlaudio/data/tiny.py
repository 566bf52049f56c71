"""A few dialogues for a run with `--tiny`: the first ones of a file that is there, else hums that ask small questions.

Whatever a reward source looks at is on the made records: an answer, choices on every other one, a rule, a reference
response, a rubric. Their sounds are hums, for nothing that is tiny knows words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rlaudio.audio.store import ClipStore
from rlaudio.data.importers.base import asked, lettered
from rlaudio.data.lines import parse_record
from rlaudio.errors import DataError
from rlaudio.types import (
    SAMPLE_RATE_HZ,
    AudioPart,
    Constraint,
    FloatArray,
    Message,
    Part,
    PromptRecord,
    RubricItem,
    TextPart,
)

LICENSE = "CC0-1.0"
"""Of what is made here."""

NUMBERS = "one two three four five six seven eight".split()
THINGS = "dog rain horn bell".split()
_RUBRIC = (RubricItem("the answer is right", critical=True), RubricItem("the reply is short"))
_RULE = (Constraint("max_words", "40"),)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What made records shall be, so that every source finds some that it speaks of.

    Attributes:
        tasks, axes: names to take turns; none makes "tiny" and no axis.
        spoken: False makes users write.
        complete: with replies, to learn from.
        tag: that answers to choices shall stand between, "" for none.
    """

    tasks: Sequence[str] = ()
    axes: Sequence[str] = ()
    spoken: bool = True
    complete: bool = False
    tag: str = ""


def made_records(count: int, *, split: str, wanted: Wanted, store: ClipStore) -> list[PromptRecord]:
    """`count` dialogues of one turn with choices and of two turns, in turns; no two splits share a sound or a text."""
    maker = _Maker(split, wanted, store)
    return [maker.record(index) for index in range(count)]


class _Maker:
    def __init__(self, split: str, wanted: Wanted, store: ClipStore) -> None:
        self._split, self._wanted, self._store = split, wanted, store

    def record(self, index: int) -> PromptRecord:
        wanted, name = self._wanted, f"{self._split}-{index}"
        # Tasks change every second record, so that each has questions of both kinds.
        task = wanted.tasks[index // 2 % len(wanted.tasks)] if wanted.tasks else "tiny"
        axis = wanted.axes[index // 2 % len(wanted.axes)] if wanted.axes else None
        messages = self._recall(index) if index % 2 else self._choice(index)
        if not wanted.complete:
            messages = [message for message in messages if message.role == "user"]
        return PromptRecord(name, task, tuple(messages), axis=axis, license=LICENSE)

    def _choice(self, index: int) -> list[Message]:
        right = index // 2 % len(THINGS)
        choices, letter = lettered(THINGS, right=right)
        tag = self._wanted.tag
        wish = f"\nthe final answer in <{tag}> </{tag}>" if tag else ""
        question = TextPart(asked(f"what is heard in {self._split} {index} ?", choices) + wish)
        user = Message(
            "user",
            (*self._said(index, 0, None), question),
            answer=letter,
            choices=choices,
            constraints=_RULE,
            reference_response=THINGS[right],
            rubric=_RUBRIC,
        )
        return [user, _reply(THINGS[right])]

    def _recall(self, index: int) -> list[Message]:
        number = NUMBERS[index // 2 % len(NUMBERS)]
        told, ask = f"for {self._split} {index} my code is {number}", f"what is my code of {self._split} {index}"
        users = [
            Message(
                "user",
                self._said(index, turn, text),
                answer=number,
                constraints=_RULE,
                reference_response=reply,
                rubric=_RUBRIC,
            )
            for turn, (text, reply) in enumerate(((told, f"okay {number}"), (ask, f"your code is {number}")))
        ]
        return [message for user in users for message in (user, _reply(str(user.reference_response)))]

    def _said(self, index: int, turn: int, text: str | None) -> tuple[Part, ...]:
        """`text` as a hum, or written; a sound without words where it is None."""
        if not self._wanted.spoken:
            return (TextPart(text),) if text else ()
        clip = self._store.put(hum(f"{self._split}/{index}/{turn}"))
        said = text or f"sound {index} of {self._split}"
        return (AudioPart(self._store.uri(clip.sha256), clip.sha256, SAMPLE_RATE_HZ, transcript=said),)


def _reply(text: str) -> Message:
    return Message("assistant", (TextPart(text),), thinking=f"heard {text}")


def hum(name: str) -> FloatArray:
    """[N] samples at `SAMPLE_RATE_HZ`: half a second to a second of a gliding tone with overtones, another per name."""
    random = np.random.default_rng(list(name.encode()))
    time_s = np.arange(int(random.uniform(0.5, 1.0) * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    pitch_hz, glide_hz = random.uniform(90, 260), random.uniform(-40, 40)
    phase = 2 * np.pi * (pitch_hz * time_s + glide_hz * time_s**2)
    tone = sum(np.sin(order * phase) / order for order in range(1, 6))
    swell = np.sin(np.pi * np.arange(len(time_s)) / len(time_s))
    return (0.1 * swell * tone + 0.003 * random.standard_normal(len(time_s))).astype(np.float32)


# ---- of a file that is there --------------------------------------------------------------------------------------


def first_records(
    path: Path, count: int, *, clips: ClipStore, store: ClipStore, fits: Callable[[PromptRecord], bool], complete: bool
) -> list[PromptRecord]:
    """The first `count` records that fit, their sounds copied into `store`; the rest of the file is not read.

    Args:
        clips: where the file's sounds are.
        complete: as in `rlaudio.data.records.read_records`.

    Raises:
        DataError: a line is no record, or none fits.
        AudioError: a sound cannot be read.
    """
    found: list[PromptRecord] = []
    looked = 0
    for record in _records(path, complete=complete):
        looked += 1
        if fits(record):
            found.append(_copied(record, clips=clips, store=store))
        if len(found) == count:
            break
    if not found:
        raise DataError(
            f"{path}: none of {looked} record(s) is short enough for a tiny checkpoint; put the file away, and a few "
            "dialogues are made, or name another one"
        )
    return found


def _records(path: Path, *, complete: bool) -> Iterator[PromptRecord]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                record = parse_record(json.loads(line), complete=complete)
                if not isinstance(record, PromptRecord):
                    raise DataError(f"{path}:{number}: {record[0].found}: {record[0].fix}")
                yield record
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON lines ({error}); see `rlaudio data check`") from error


def _copied(record: PromptRecord, *, clips: ClipStore, store: ClipStore) -> PromptRecord:
    def part(one: Part) -> Part:
        if not isinstance(one, AudioPart):
            return one
        sha256 = store.put(clips.get(one.sha256).samples).sha256
        return replace(one, uri=store.uri(sha256), sha256=sha256)

    messages = (replace(message, parts=tuple(map(part, message.parts))) for message in record.messages)
    return replace(record, messages=tuple(messages))


# ---- words and lengths --------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of a text as a word vocabulary has them: no whitespace, angle brackets only around tags."""
    return re.findall(r"</?\w+>|[^\s<>]+", text)


def tag_of(text: str) -> str | None:
    """The name of the tags that a question wants the answer between, as in "in <answer> </answer>"."""
    found = re.search(r"<(\w+)>\s*</\1>", text)
    return found[1] if found else None


def num_ids(record: PromptRecord, *, clips: ClipStore, rows_per_s: float, per_reply: int) -> int:
    """At most so many ids, in a vocabulary of words, has the whole dialogue, with replies of `per_reply` ids."""
    total = 16
    for message in record.messages:
        total += 16 + (per_reply if message.role == "user" else 0)
        for part in message.parts:
            if isinstance(part, AudioPart):
                total += 16 + int(rows_per_s * (clips.num_bytes(part.sha256) or 0) / 2 / SAMPLE_RATE_HZ)
            else:
                total += len(part.text.split()) + part.text.count("\n") + 2 * len(re.findall("[<>]", part.text))
        total += len((message.thinking or "").split())
    return total
