"""Whether the reasoning leads to the reply: a check of words, with its limits.

A reply claims what is left of it without framing words ("sure, your voice is high" claims "high"), or the choice that
it picks. The reasoning leads there where it says the claim, and of what excludes it (the other choices, `rivals`) says
nothing later, denials ("not low") apart. What it cannot know: whether the steps before are sound, and claims in other
words. A reply of many words is incoherent by this measure unless the reasoning holds them as one run; for such tasks
name a generative judge instead.
"""

from collections.abc import Sequence

from rlaudio.dialogue.users import user_message
from rlaudio.errors import ConfigError
from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.verifier import Finding, Verifier
from rlaudio.rewards.verifiers import DENIALS, FRAMING_WORDS, multiple_choice
from rlaudio.rewards.wording import words
from rlaudio.types import Choice, PromptRecord, Turn


class Coherence(Verifier):
    """1 where the reasoning leads to the reply, right or wrong; else 0. An unparsable turn leads nowhere.

    Args:
        rivals: lists of words or phrases of which only one can be true, e.g. [[high, low], [fast, slow]].
    """

    def __init__(
        self,
        services: JudgeServices,
        *,
        name: str = "coherence",
        unplayed: float = 0.0,
        rivals: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__(services, name=name, unplayed=unplayed)
        self._rivals = [_checked(name, index, group) for index, group in enumerate(rivals)]

    def check(self, record: PromptRecord, turn: Turn) -> Finding:
        choices = user_message(record, turn.index).choices
        leads = turn.parsable and leads_to(turn.thinking or "", turn.reply, rivals=self._rivals, choices=choices)
        return Finding(float(leads))


def leads_to(
    thinking: str, reply: str, *, rivals: Sequence[Sequence[Sequence[str]]] = (), choices: Sequence[Choice] = ()
) -> bool:
    """Whether a reasoning ends at what a reply claims.

    Args:
        rivals: groups of phrases, each a list of words; of one group only one can be true.
        choices: of the question; the reasoning is looked at for their texts, a letter alone says nothing.
    """
    said = words(thinking)
    claim = _picked(reply, choices) if choices else _claim(reply)
    groups = [*rivals, [words(choice.text) for choice in choices]]
    others = [phrase for group in groups if claim in group for phrase in group if phrase != claim]
    last = _last(said, claim)
    return last >= 0 and all(_last(said, other) < last for other in others)


def _claim(reply: str) -> list[str]:
    return [word for word in words(reply) if word not in FRAMING_WORDS]


def _picked(reply: str, choices: Sequence[Choice]) -> list[str]:
    """The text of the one choice that a reply picks; empty without one."""
    texts = {choice.letter: choice.text for choice in choices}
    return next((words(text) for letter, text in texts.items() if multiple_choice(reply, letter, texts)), [])


def _last(said: Sequence[str], phrase: Sequence[str]) -> int:
    """Where a phrase is said for the last time without being denied, or -1."""
    size = len(phrase)
    found = (
        at
        for at in range(len(said) - size, -1, -1)
        if size and list(said[at : at + size]) == list(phrase) and not (at and said[at - 1] in DENIALS)
    )
    return next(found, -1)


def _checked(source: str, index: int, group: Sequence[str]) -> list[list[str]]:
    phrases = [] if isinstance(group, str) else [words(one) if isinstance(one, str) else [] for one in group]
    if len(phrases) < 2 or not all(phrases):
        raise ConfigError(
            f"reward source {source!r}: rivals[{index}] is {group!r}, give a list of at least two words or phrases"
        )
    for at, phrase in enumerate(phrases):
        if phrase in phrases[:at]:
            raise ConfigError(f"reward source {source!r}: rivals[{index}] names {' '.join(phrase)!r} twice, drop one")
    return phrases
