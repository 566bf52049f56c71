"""Reinforcement learning of a judge: it is the policy, its prompt is a comparison, its reward agreement with the truth.

A comparison becomes a prompt record whose messages are the sections of `JudgePrompt` in their order (`Message.title`),
so the player renders the very ids that the judge will be asked with; the `answer` is the known verdict.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlaudio.dialogue.template import ChatTemplate, Context
from rlaudio.dialogue.users import played_turns, user_message
from rlaudio.errors import DataError
from rlaudio.models.base import ChatStyle, ModelFamily
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.levels import NUM_LEVELS, Scale
from rlaudio.rewards.preferences import Labelled
from rlaudio.rewards.prompt import JudgePrompt, Said
from rlaudio.rewards.verifier import Finding, Verifier, require_at_least
from rlaudio.types import AudioPart, Message, PromptRecord, TextPart, Turn

TASK = "judge"

SIDES = ("B", "same", "A")
"""Answers where only the side is known, from A's point of view."""


def agreement_records(labelled: Sequence[Labelled], prompt: JudgePrompt, *, family: ModelFamily) -> list[PromptRecord]:
    """Two records per comparison, one for each order.

    Args:
        prompt: how the judge is asked; the records are compared with it.

    Raises:
        DataError: a record would not read as the judge is asked: a text is longer than its sections may be.
    """
    made = []
    for one in labelled:
        for order in (False, True):
            record = _record(one, prompt, response_first=order, style=family.style)
            shown = prompt.render(one.comparison, response_first=order)
            if not shown.clips and not np.array_equal(_played(record, family), shown.ids):
                raise DataError(
                    f"record {one.id!r}: a text is longer than asking.max_section_tokens, and what is played is not "
                    "cut: raise it, or leave the record out"
                )
            made.append(record)
    return made


def _record(one: Labelled, prompt: JudgePrompt, *, response_first: bool, style: ChatStyle) -> PromptRecord:
    shown = one.comparison
    given = [
        Message(
            "system",
            said.parts if prompt.hears and _has_sound(said) else (TextPart(said.text),),
            title=style.roles[said.role],
        )
        for said in shown.history
    ]
    if shown.criterion is not None:
        given.append(Message("system", (TextPart(shown.criterion),), title="rule"))
    pair = [("reference", shown.reference), ("response", shown.response)]
    first, second = reversed(pair) if response_first else pair
    scale = prompt.scale
    verdict = scale.level(one.level, response_first=response_first)
    side = SIDES[1 + int(np.sign(scale.even_phi[verdict]))]
    return PromptRecord(
        id=f"{one.id}/{'first' if response_first else 'second'}",
        task=TASK,
        axis=one.axis,
        messages=(
            Message("system", (TextPart(prompt.instructions),)),
            *given,
            Message("system", (TextPart(first[1]),), title=f"A {first[0]}"),
            Message(
                "user",
                (TextPart(second[1]),),
                title=f"B {second[0]}",
                answer=scale.words[verdict] if one.exact else side,
            ),
        ),
    )


def _has_sound(said: Said) -> bool:
    return any(isinstance(part, AudioPart) for part in said.parts)


def _played(record: PromptRecord, family: ModelFamily) -> np.ndarray[Any, np.dtype[np.int32]]:
    """What the player shows, for records without sound."""
    context = Context(ChatTemplate(family.tokenizer, style=family.style), keep_thinking=False)
    for message in record.messages:
        context.open(message.role, title=message.title)
        for part in message.parts:
            assert isinstance(part, TextPart)
            context.add_text(part.text)
        context.close()
    return context.prompt().ids


class VerdictAgreement(Verifier):
    """`exact_weight` for the known level and the rest for its side; an unreadable verdict agrees with nothing.

    A record that knows only the side (answers "A", "B", "same") pays all of it for that.

    Args:
        levels: of a verdict.
        exact_weight: 0 to 1.
    """

    measures = "verified"

    def __init__(
        self,
        services: JudgeServices,
        *,
        name: str = "agreement",
        unplayed: float = 0.0,
        levels: int = NUM_LEVELS,
        exact_weight: float = 0.5,
    ) -> None:
        super().__init__(services, name=name, unplayed=unplayed)
        require_at_least(name, 0, exact_weight=exact_weight, rest=1 - exact_weight)
        self._scale = Scale(levels)
        self._exact_weight = exact_weight

    @classmethod
    def record_problems(cls, record: PromptRecord, options: Mapping[str, Any]) -> Iterator[str]:
        words = Scale(options.get("levels", NUM_LEVELS)).words
        for turn in played_turns(record):
            answer = user_message(record, turn).answer
            if answer not in (*words, *SIDES):
                yield f"user message {turn + 1}: answer is {answer!r}, which is no verdict: {', '.join(words)}, or A, B"

    def check(self, record: PromptRecord, turn: Turn) -> Finding:
        wanted = user_message(record, turn.index).answer or ""
        words = self._scale.words
        read = turn.parsable and bool(turn.thinking) and turn.reply in words
        side = float(read and self._side(turn.reply) == self._side(wanted))
        exact = float(read and turn.reply == wanted)
        if wanted in words:
            value = self._exact_weight * exact + (1 - self._exact_weight) * side
            return Finding(value, {"correct": exact, "side": side, "readable": float(read)})
        return Finding(side, {"correct": side, "side": side, "readable": float(read)})

    @staticmethod
    def _side(word: str) -> str:
        return word.rstrip("+")
