"""What is measured of a policy on held-out questions about the sound, dialogue by dialogue, and how policies compare.

A dialogue's value is a share of the turns that its record asks, so a turn that was not played counts as none of these.
Policies of one seed answer the same dialogues and are compared by pairs. With one seed an interval is a bootstrap over
dialogues and says nothing of other seeds; with more it is Student's t over the seeds' means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlaudio.errors import DataError
from rlaudio.evals.stats import mean_interval, seeds_interval
from rlaudio.evals.summary import DialogueResult, EvaluationResult, TurnResult

SOURCE = "measured"
"""Name of the source in `evaluation.yaml` that compares reasoning with the sound."""

MEASURES: Mapping[str, str] = {
    "grounded_right": "right, and what the reasoning says of the sound is true of it as measured",
    "right": "right answers, whatever the reasoning",
    "grounded": "reasoning that says of the sound what is true of it, whatever the answer",
    "says": "reasoning that says something of the sound, true or not",
    "right_by_words": "right answers whose reasoning says nothing of the sound",
}
START, LAST, CONTROL = "start", "mgrd_2", "rl_only"
POLICIES: Mapping[str, str] = {
    START: "cold start",
    "mgrd_1": "MGRD, one iteration",
    LAST: "MGRD, two iterations",
    CONTROL: "the same steps of RL, nothing distilled",
}
CONTRASTS: Mapping[tuple[str, str], str] = {
    (START, LAST): "what MGRD changes",
    ("mgrd_1", LAST): "what the second iteration adds",
    (START, CONTROL): "what reinforcement learning alone changes",
    (CONTROL, LAST): "MGRD against reinforcement learning alone",
}
"""(first, second): second minus first."""

Values = Mapping[str, float]
"""Dialogue -> value, of one measure of one policy."""


@dataclass(frozen=True, slots=True)
class Change:
    """A mean, of a policy or of a difference of two, with its 95 % interval; shares, or differences of shares."""

    mean: float
    low: float
    high: float
    num_dialogues: int
    num_seeds: int

    @property
    def rose(self) -> bool:
        return self.low > 0

    @property
    def fell(self) -> bool:
        return self.high < 0


def measure(results: Sequence[EvaluationResult], *, task: str | None = None) -> dict[str, dict[str, float]]:
    """Measure -> dialogue -> value, over all sets of one policy.

    Args:
        task: only its dialogues.

    Raises:
        DataError: a dialogue is in two sets, or a turn was not measured.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
    for dialogue in (dialogue for result in results for dialogue in result.dialogues):
        if task is not None and dialogue.task != task:
            continue
        if dialogue.prompt_id in found["right"]:
            raise DataError(f"dialogue {dialogue.prompt_id!r} is in two sets: give every record one id")
        for name, value in _of_dialogue(dialogue).items():
            found[name][dialogue.prompt_id] = value
    return found


def accuracy(results: Sequence[EvaluationResult]) -> dict[str, float]:
    """Dialogue -> share of right turns, of questions that are not about the sound."""
    return {dialogue.prompt_id: dialogue.accuracy for result in results for dialogue in result.dialogues}


def _of_dialogue(dialogue: DialogueResult) -> dict[str, float]:
    turns = [_of_turn(dialogue.prompt_id, turn) for turn in dialogue.turns]
    return {name: sum(turn[name] for turn in turns) / dialogue.num_turns_asked for name in MEASURES}


def _of_turn(prompt: str, turn: TurnResult) -> dict[str, bool]:
    parts = [part for part in turn.breakdown if part.source == SOURCE]
    if not parts:
        raise DataError(f"dialogue {prompt!r}, turn {turn.turn}: source {SOURCE!r} said nothing: evaluate it again")
    right, says = turn.correct and turn.parsable, parts[0].detail["said"] > 0
    grounded = turn.parsable and parts[0].value == 1.0
    return {
        "grounded_right": right and grounded,
        "right": right,
        "grounded": grounded,
        "says": says,
        "right_by_words": right and not says,
    }


# ---- over dialogues and seeds -------------------------------------------------------------------------------------


def level(seeds: Sequence[Values]) -> Change:
    """The mean of one measure of one policy, by seed."""
    return _interval([list(values.values()) for values in seeds])


def difference(first: Sequence[Values], second: Sequence[Values]) -> Change:
    """`second` minus `first`, seed by seed and dialogue by dialogue.

    Raises:
        DataError: another number of seeds, or the policies were asked other questions.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} seeds of one policy and {len(second)} of the other: evaluate the same seeds")
    for a, b in zip(first, second, strict=True):
        if odd := sorted(a.keys() ^ b.keys()):
            raise DataError(f"two policies were asked other questions, such as {odd[0]!r}: evaluate both again")
    return _interval([[b[name] - a[name] for name in a] for a, b in zip(first, second, strict=True)])


def _interval(seeds: Sequence[Sequence[float]]) -> Change:
    if not seeds or not all(seeds):
        raise DataError("there is no dialogue to measure: evaluate first")
    over = mean_interval(seeds[0]) if len(seeds) == 1 else seeds_interval([float(np.mean(values)) for values in seeds])
    return Change(over.mean, over.low, over.high, min(len(values) for values in seeds), len(seeds))
