"""Pressure to be brief: it knows nothing of what is said. Beside what checks the answer, small, or replies collapse."""

from rlaudio.rewards.base import JudgeServices
from rlaudio.rewards.verifier import Finding, Verifier, require_at_least
from rlaudio.rewards.wording import words
from rlaudio.types import PromptRecord, Turn


class Brevity(Verifier):
    """1 for an empty reply down to 0 for one of `most` words or more; reasoning is free. An unparsable turn earns 0.

    So a turn that was not reached, which earns `unplayed`, is never worth more than one that was.
    """

    def __init__(
        self, services: JudgeServices, *, name: str = "brevity", unplayed: float = 0.0, most: int = 30
    ) -> None:
        super().__init__(services, name=name, unplayed=unplayed)
        require_at_least(name, 1, most=most)
        self._most = most

    def check(self, record: PromptRecord, turn: Turn) -> Finding:
        count = len(words(turn.reply))
        return Finding(max(0.0, 1.0 - count / self._most) if turn.parsable else 0.0, {"words": float(count)})
