"""Rejection sampling: which of the policy's own answers it is fine-tuned on, and what became of all others. Pure.

The middle of modality-grounded reasoning distillation (MGRD, arXiv:2511.15848): questions that need hearing are
chosen, K reasoned answers sampled of each, and those kept that pass every filter, in the paper speaking of perceived
sound, being coherent, and being right.

A dialogue is kept up to its first turn that fails: what comes behind was said after a reply that is not learned. Every
turn that is asked of every sibling has one fate:

- `kept`, or the name of the first filter that it fails;
- `unparsable`: it cannot be written down as an answer, or not so that it can be learned from;
- `behind` a turn that fails; `unplayed`: the dialogue ended before;
- `spare`: it passes, and its sibling is the same as another one, or more than are wanted;
- `unjudged`: the record could not be played or judged.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rlaudio.config_stages import DistilSettings, FilterSettings
from rlaudio.data.curation import Rolled
from rlaudio.dialogue.users import played_turns
from rlaudio.errors import DataError
from rlaudio.types import Message, PromptRecord, TextPart

KEPT, BEHIND, SPARE, UNPARSABLE, UNPLAYED, UNJUDGED = "kept", "behind", "spare", "unparsable", "unplayed", "unjudged"
_EXAMPLES = 3


def select(records: Sequence[PromptRecord], settings: DistilSettings) -> list[PromptRecord]:
    """Records of the tasks and axes that are asked for, in their order, at most `max_records`.

    Raises:
        DataError: a task or axis that no record has, none that has both, or records that cannot be learned from.
    """
    for name, wanted, known in (
        ("tasks", settings.tasks, {record.task for record in records}),
        ("axes", settings.axes, {record.axis for record in records if record.axis is not None}),
    ):
        for one in wanted:
            if one not in known:
                near = difflib.get_close_matches(one, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {sorted(known)}"
                raise DataError(f"distil.{name} names {one!r}, which no record of data.train has: {hint}")
    chosen = [
        record
        for record in records
        if (not settings.tasks or record.task in settings.tasks) and (not settings.axes or record.axis in settings.axes)
    ]
    if not chosen:
        raise DataError(
            f"no record of data.train is of distil.tasks {list(settings.tasks)} and of distil.axes "
            f"{list(settings.axes)}: widen one of them"
        )
    chosen = chosen[: settings.max_records or None]
    for record in chosen:
        if any(message.role == "assistant" for message in record.messages):
            raise DataError(
                f"record {record.id!r} has a given reply, which fine-tuning would learn beside those that were "
                "filtered: leave the record out of distil.tasks, or its given turns out of the record"
            )
        if any(message.improvise for message in record.messages):
            raise DataError(
                f"record {record.id!r} is to be improvised, so there is no sound to write its answers to: leave it out"
            )
    return chosen


@dataclass(frozen=True, slots=True)
class Sifted:
    """What became of one record's siblings.

    Attributes:
        turns: fate -> how many turns; together the turns asked, once per sibling.
        passes: filter -> how many of the turns that were played pass it, whatever the others say.
        played: how many turns were played and judged.
        kept: what to learn from.
        examples: fate -> a turn of it, to read.
    """

    id: str
    task: str
    turns: Mapping[str, int]
    passes: Mapping[str, int] = field(default_factory=dict)
    played: int = 0
    kept: tuple[PromptRecord, ...] = ()
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


Writable = Callable[[str, str], bool]
"""Whether a reasoning and a reply, written down and read again, are ids that a policy may sample."""


def sift(record: PromptRecord, rolled: Rolled, settings: DistilSettings, *, writable: Writable) -> Sifted:
    """Filter the siblings of one record.

    Args:
        rolled: `settings.k` dialogues of it, or the problem that it had.
        writable: of the tokenizer that will learn from them.

    Raises:
        DataError: they are of another record.
    """
    if rolled.id != record.id:
        raise DataError(f"answers to record {rolled.id!r} cannot be filtered as those to {record.id!r}")
    asked = played_turns(record)
    if rolled.problem:
        return Sifted(record.id, record.task, {UNJUDGED: len(asked) * settings.k})
    siblings = [list(dialogue["turns"]) for dialogue in rolled.dialogues]
    fates = [_fates(turns, asked=len(asked), filters=settings.filters, writable=writable) for turns in siblings]
    good = [turns[: _run_of(KEPT, found)] for turns, found in zip(siblings, fates, strict=True)]
    chosen = _chosen(good, most=settings.most)
    for sibling, found in enumerate(fates):
        if sibling not in chosen:
            found[: len(good[sibling])] = [SPARE] * len(good[sibling])
    played = [turn for turns in siblings for turn in turns]
    return Sifted(
        record.id,
        record.task,
        turns=dict(Counter(fate for found in fates for fate in found)),
        passes={one.name: sum(_passes(turn, one) for turn in played) for one in settings.filters},
        played=len(played),
        kept=tuple(_answered(record, good[sibling], sibling) for sibling in chosen),
        examples=dict(_examples(siblings, fates)),
    )


def _fates(
    turns: Sequence[Mapping[str, Any]], *, asked: int, filters: Sequence[FilterSettings], writable: Writable
) -> list[str]:
    """One per turn asked."""
    found: list[str] = []
    for turn in turns:
        fate = _fate(turn, filters, writable)
        found.append(fate)
        if fate != KEPT:
            return found + [BEHIND] * (asked - len(found))
    return found + [UNPLAYED] * (asked - len(found))


def _fate(turn: Mapping[str, Any], filters: Sequence[FilterSettings], writable: Writable) -> str:
    if not turn["parsable"] or not writable(turn["thinking"] or "", turn["reply"]):
        return UNPARSABLE
    return next((one.name for one in filters if not _passes(turn, one)), KEPT)


def _passes(turn: Mapping[str, Any], wanted: FilterSettings) -> bool:
    judged = turn["judged"].get(wanted.source)
    value = None if judged is None else judged["detail"].get(wanted.detail) if wanted.detail else judged["value"]
    return value is not None and bool(value >= wanted.least)


def _run_of(fate: str, found: Sequence[str]) -> int:
    return next((at for at, one in enumerate(found) if one != fate), len(found))


def _chosen(good: Sequence[Sequence[Mapping[str, Any]]], *, most: int) -> list[int]:
    """Siblings to keep: the longest first, none that says what one before it says, at most `most`."""
    chosen: list[int] = []
    known: list[list[tuple[str, str]]] = []
    for sibling in sorted(range(len(good)), key=lambda sibling: (-len(good[sibling]), sibling)):
        said = [(turn["thinking"], turn["reply"]) for turn in good[sibling]]
        if said and (not most or len(chosen) < most) and not any(other[: len(said)] == said for other in known):
            chosen.append(sibling)
            known.append(said)
    return sorted(chosen)


def _answered(record: PromptRecord, turns: Sequence[Mapping[str, Any]], sibling: int) -> PromptRecord:
    """The record up to the last of these turns, with what was answered: a whole dialogue to learn from."""
    messages: list[Message] = []
    num_answered = 0
    for message in record.messages:
        if num_answered == len(turns):
            break
        messages.append(message)
        if message.role == "user":
            turn = turns[num_answered]
            messages.append(Message("assistant", (TextPart(turn["reply"]),), thinking=turn["thinking"]))
            num_answered += 1
    return replace(record, id=f"{record.id}-answer-{sibling}", messages=tuple(messages))


def _examples(
    siblings: Sequence[Sequence[Mapping[str, Any]]], fates: Sequence[Sequence[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    seen = set()
    for turns, found in zip(siblings, fates, strict=True):
        for turn, fate in zip(turns, found, strict=False):
            if fate not in seen:
                seen.add(fate)
                yield fate, {"turn": turn["turn"], "thinking": turn["thinking"], "reply": turn["reply"]}


def summarise_distil(sifted: Sequence[Sifted], settings: DistilSettings) -> dict[str, Any]:
    """What `report.json` of a distillation holds.

    Returns:
        `{"k", "most", "filters": [...], "records": {"selected", "answered", "unjudged"}, "answers", "turns": {FATE:
        number}, "passes": {FILTER: share of played turns}, "tasks": {TASK: {FATE: number}}, "examples": {FATE: []}}`.
        `turns` adds up to the turns asked of all siblings; `answers` is how many dialogues are written.
    """
    fates = [KEPT, *(one.name for one in settings.filters), UNPARSABLE, BEHIND, UNPLAYED, SPARE, UNJUDGED]
    played = sum(one.played for one in sifted)
    examples: dict[str, list[Mapping[str, Any]]] = {}
    for one in sifted:
        for fate, example in one.examples.items():
            if len(found := examples.setdefault(fate, [])) < _EXAMPLES:
                found.append({"record": one.id, **example})
    return {
        "k": settings.k,
        "most": settings.most,
        "filters": [asdict(one) for one in settings.filters],
        "records": {
            "selected": len(sifted),
            "answered": sum(bool(one.kept) for one in sifted),
            "unjudged": sum(bool(one.turns.get(UNJUDGED)) for one in sifted),
        },
        "answers": sum(len(one.kept) for one in sifted),
        "turns": _counts(sifted, fates),
        "passes": {
            one.name: sum(each.passes.get(one.name, 0) for each in sifted) / played if played else None
            for one in settings.filters
        },
        "tasks": {
            task: _counts([one for one in sifted if one.task == task], fates)
            for task in sorted({one.task for one in sifted})
        },
        "examples": examples,
    }


def _counts(sifted: Sequence[Sifted], fates: Sequence[str]) -> dict[str, int]:
    return {fate: sum(one.turns.get(fate, 0) for one in sifted) for fate in fates}


def require_answers(summary: Mapping[str, Any], *, problems: Sequence[str] = ()) -> None:
    """Raises DataError: nothing is left to learn from; says what became of the turns."""
    if summary["answers"]:
        return
    if problems and summary["records"]["unjudged"] == summary["records"]["selected"]:
        raise DataError(f"none of {len(problems)} records could be played and judged: {problems[0]}")
    told = ", ".join(f"{fate} {number}" for fate, number in summary["turns"].items() if number)
    alone = ", ".join(f"{name} {share:.0%}" for name, share in summary["passes"].items() if share is not None)
    raise DataError(
        f"the filters keep nothing of {sum(summary['turns'].values())} turns ({told}); by itself each is passed by: "
        f"{alone}. Sample more (distil.k, distil.max_records), loosen the filter that is never passed, or give a "
        "policy that sometimes passes them"
    )
