"""What the experiment learns from and is asked: a spoken world of its own, and demonstrations that reason in five ways.

`data/` is one world of the quickstart's making, so no script and no clip is in two of its splits, and the voices of
`heldout_voices` speak nowhere else. Beside it:

- `demonstrations.jsonl`: the paralinguistic dialogues of `base.jsonl`, every turn answered in one of `WAYS`;
- `spoken.jsonl`, `text.jsonl`: the other dialogues, heard and read, with gold replies: what must not be forgotten;
- `train_heard.jsonl`: the paralinguistic part of `train.jsonl`, for reinforcement learning;
- `heldout_heard.jsonl`, `voices_heard.jsonl`, `heldout_other.jsonl`: what is measured on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from spoken_world.make import WorldConfig, make_world
from spoken_world.stages import HEARD, as_text

from rlaudio.data.records import read_records, write_records
from rlaudio.types import Message, PromptRecord, TextPart

WORLD = WorldConfig(seed=7, train=900, heldout=480, heldout_voices=480, base=2400)
"""Seed 7 as the quickstart's, so that what is held out here was held out from the quickstart's policy too."""

OTHER_OF = {"high": "low", "low": "high", "fast": "slow", "slow": "fast"}


@dataclass(frozen=True, slots=True)
class Way:
    """One way in which a demonstrator answers a question about the sound.

    Attributes:
        share: of the turns.
        thinking: with `{text}`, what the user said, `{right}` and `{wrong}`.
        right: how often the reply is.
    """

    name: str
    share: float
    thinking: str
    right: float


WAYS = (
    Way("grounded", 0.34, "the voice sounds {right}", 1.0),
    Way("misheard", 0.08, "the voice sounds {wrong}", 0.0),
    Way("incoherent", 0.08, "the voice sounds {wrong}", 1.0),
    Way("words", 0.42, "heard {text} . the answer is {right}", 1.0),
    Way("guess", 0.08, "heard {text} . the answer is {wrong}", 0.0),
)
"""Replies are right in 84 % of the turns whether the reasoning speaks of the sound or of the words only: a reward for
right answers has no reason to prefer either."""


def make_data(out: Path, *, num_processes: int = 2) -> None:
    """Make what is missing or changed; equal calls give equal bytes."""
    make_world(out, WORLD, num_processes=num_processes)
    base = read_records(out / "base.jsonl", complete=True)
    write_records(out / "demonstrations.jsonl", [demonstrated(record) for record in base if record.task in HEARD])
    write_records(out / "spoken.jsonl", [record for record in base if record.task not in HEARD])
    write_records(out / "text.jsonl", as_text(base))
    write_records(out / "train_heard.jsonl", heard(read_records(out / "train.jsonl")))
    heldout, voices = (read_records(out / f"{name}.jsonl") for name in ("heldout", "heldout_voices"))
    write_records(out / "heldout_heard.jsonl", heard(heldout))
    write_records(out / "voices_heard.jsonl", heard(voices))
    write_records(out / "heldout_other.jsonl", [record for record in heldout if record.task not in HEARD])


def heard(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """Those that ask how it sounds."""
    return [record for record in records if record.task in HEARD]


def demonstrated(record: PromptRecord) -> PromptRecord:
    """A dialogue with gold replies, its replies in ways that are drawn turn by turn."""
    return replace(record, id=f"shown-{record.id}", messages=tuple(_shown(record)))


def _shown(record: PromptRecord) -> Iterator[Message]:
    asked: Message | None = None
    for index, message in enumerate(record.messages):
        if message.role == "assistant" and asked is not None and asked.answer is not None:
            yield _answered(Random(f"{record.id}/{index}"), asked, message)
            continue
        asked = message
        yield message


def _answered(random: Random, asked: Message, gold: Message) -> Message:
    assert asked.answer is not None, "the spoken world says what is right"
    (way,) = random.choices(WAYS, [way.share for way in WAYS])
    right, wrong = asked.answer, OTHER_OF[asked.answer]
    thinking = way.thinking.format(text=asked.text, right=right, wrong=wrong)
    reply = gold.text
    if not way.right:
        head, _, tail = reply.rpartition(right)
        reply = f"{head}{wrong}{tail}"
    return replace(gold, parts=(TextPart(reply),), thinking=thinking)
