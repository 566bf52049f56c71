"""Verified reward of an answer between tags, `<answer>dog</answer>`, as R1-AQA and NeMo-RL pay for it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rlaudio.dialogue.users import played_turns, user_message
from rlaudio.errors import ConfigError
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.verifier import Finding, Verifier, require_at_least
from rlaudio.types import Message, PromptRecord, Turn

MATCHES = ("exact", "alphanumeric")


class TaggedAnswer(Verifier):
    """`correct_weight * correct + answer_weight * tagged + thinking_weight * reasoning present`.

    What is right is the text of the right choice, or the answer where a record has no choices. A reply with two pairs
    of tags has none. A turn that does not close its reasoning, or is cut off, is worth nothing.

    Args:
        tag: the name between the angle brackets.
        match: "exact" compares the texts without whitespace around them, "alphanumeric" their letters and digits
            without case.
        alone: tagged is only a reply that is the tags and nothing else, without reasoning before it.
        untagged: a reply without tags is compared as a whole.
    """

    measures = "verified"

    def __init__(
        self,
        services: JudgeServices,
        *,
        name: str = "verified",
        unplayed: float = 0.0,
        correct_weight: float = 0.8,
        answer_weight: float = 0.15,
        thinking_weight: float = 0.05,
        tag: str = "answer",
        match: str = "alphanumeric",
        alone: bool = False,
        untagged: bool = False,
    ) -> None:
        super().__init__(services, name=name, unplayed=unplayed)
        weights = {
            "correct_weight": correct_weight,
            "answer_weight": answer_weight,
            "thinking_weight": thinking_weight,
        }
        require_at_least(name, 0, **weights)
        if not any(weights.values()):
            raise ConfigError(f"reward source {name!r}: {', '.join(weights)} are all 0, raise one")
        if match not in MATCHES:
            raise ConfigError(f"reward source {name!r}: match is {match!r}, set {' or '.join(MATCHES)}")
        if not re.fullmatch(r"\w+", tag):
            raise ConfigError(f"reward source {name!r}: tag is {tag!r}, set one word of letters, such as answer")
        self._correct_weight, self._answer_weight = correct_weight, answer_weight
        self._thinking_weight = thinking_weight
        self._alphanumeric, self._alone, self._untagged = match == "alphanumeric", alone, untagged
        self._pair = re.compile(rf"<{tag}>(.*?)</{tag}>", re.DOTALL)

    @classmethod
    def record_problems(cls, record: PromptRecord, options: Mapping[str, Any]) -> Iterator[str]:
        for turn in played_turns(record):
            if not _right(user_message(record, turn)):
                yield f"user message {turn + 1} has no answer to compare with"

    def check(self, record: PromptRecord, turn: Turn) -> Finding:
        if not turn.parsable:
            return Finding(0.0, {"correct": 0.0, "format": 0.0})
        reply, reasoned = turn.reply.strip(), bool(turn.thinking)
        found = self._pair.findall(reply)
        given = found[0] if len(found) == 1 else reply if self._untagged and not found else None
        correct = given is not None and self._same(given, _right(user_message(record, turn.index)))
        tagged = len(found) == 1
        if self._alone:
            tagged = tagged and not reasoned and self._pair.fullmatch(reply) is not None
        value = self._correct_weight * correct + self._answer_weight * tagged + self._thinking_weight * reasoned
        return Finding(value, {"correct": float(correct), "format": float(tagged), "reasoned": float(reasoned)})

    def _same(self, given: str, right: str) -> bool:
        if not self._alphanumeric:
            return given.strip() == right.strip()
        one, other = ("".join(c for c in text if c.isalnum()).casefold() for text in (given, right))
        return one == other


def _right(message: Message) -> str:
    """The text of the right choice; the answer where there are none; "" where there is no answer."""
    texts = {choice.letter.casefold(): choice.text for choice in message.choices}
    answer = (message.answer or "").strip()
    return texts.get(answer.casefold(), "") if texts else answer
