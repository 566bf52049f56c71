"""What is measured of a policy on held-out dialogues, turn by turn, and how two policies compare: prompt by prompt.

Differences are taken turn by turn where both policies have a value, averaged over a prompt's turns, then over prompts.
With one seed the interval is a bootstrap over prompts: it says nothing of other seeds. With more it is Student's t over
the seeds' means: what another seed would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rlaudio.errors import DataError
from rlaudio.evals.stats import mean_interval, seeds_interval
from rlaudio.evals.summary import DialogueResult, EvaluationResult, TurnResult
from rlaudio.rewards.texture import WARM, disfluency, repetition
from rlaudio.rewards.wording import words

JUDGE = "judge"
"""Name of the preference source in `evaluation.yaml`."""

Values = Mapping[str, Mapping[int, float]]
"""Prompt -> turn -> value, of one measure of one policy."""
Measured = Mapping[str, Values]
"""Measure -> its values."""

MEASURES: Mapping[str, str] = {
    "accuracy": "verified answers, share of the turns asked for",
    "preference": "against the reference reply by the other judge, -1 to 1",
    "preference_right": "the same, of right replies alone; two policies compare on the turns that both have right",
    "warm": "share of replies with a word of courtesy",
    "words": "words per reply",
    "reasoning": "words of reasoning per turn",
    "repetition": "share of a reply's runs of three words that it has said before",
    "disfluency": "share of words that are fillers, or said twice in a row",
    "distinct": "different replies among sampled siblings at a turn, over their number",
    "distinct_2": "different pairs of words in all siblings' replies at a turn, over their number",
}
"""The last two are of dialogues sampled at temperature 1, the others of greedy ones."""


@dataclass(frozen=True, slots=True)
class Change:
    """A mean, of a policy or of a difference of two, with its 95 % interval.

    Attributes:
        num_prompts: those with a value, of the seed that has fewest.
        num_seeds: 1: the interval is over prompts; more: over seeds.
    """

    mean: float
    low: float
    high: float
    num_prompts: int
    num_seeds: int

    @property
    def rose(self) -> bool:
        return self.low > 0

    @property
    def fell(self) -> bool:
        return self.high < 0


def measure(greedy: EvaluationResult, siblings: EvaluationResult | None) -> dict[str, dict[str, dict[int, float]]]:
    """All measures of one policy; a turn without a value of one has no entry there."""
    found: dict[str, dict[str, dict[int, float]]] = {name: {} for name in MEASURES}
    for dialogue in greedy.dialogues:
        played = {turn.turn: turn for turn in dialogue.turns}
        found["accuracy"][dialogue.prompt_id] = {0: dialogue.accuracy}  # of the whole: what was not reached is wrong
        for index, turn in played.items():
            for name, value in _of_turn(turn).items():
                found[name].setdefault(dialogue.prompt_id, {})[index] = value
    for prompt, group in _groups(siblings.dialogues if siblings else ()).items():
        for index in sorted({turn.turn for dialogue in group for turn in dialogue.turns}):
            said = [tuple(words(t.reply)) for dialogue in group for t in dialogue.turns if t.turn == index]
            for name, value in _of_siblings(said).items():
                found[name].setdefault(prompt, {})[index] = value
    return found


def _of_turn(turn: TurnResult) -> dict[str, float]:
    said = words(turn.reply)
    values = {
        "warm": float(not WARM.isdisjoint(said)),
        "words": float(len(said)),
        "reasoning": float(len(words(turn.thinking or ""))),
        "repetition": repetition(said),
        "disfluency": disfluency(said),
    }
    judged = [part.value for part in turn.breakdown if part.source == JUDGE]
    if judged:
        values["preference"] = judged[0]
        if turn.correct and turn.parsable:
            values["preference_right"] = judged[0]
    return values


def _of_siblings(said: Sequence[tuple[str, ...]]) -> dict[str, float]:
    if len(said) < 2:
        return {}
    values = {"distinct": len(set(said)) / len(said)}
    pairs = [pair for reply in said for pair in pairwise(reply)]
    return values | ({"distinct_2": len(set(pairs)) / len(pairs)} if pairs else {})


def _groups(dialogues: Sequence[DialogueResult]) -> dict[str, list[DialogueResult]]:
    found: dict[str, list[DialogueResult]] = {}
    for dialogue in dialogues:
        found.setdefault(dialogue.prompt_id, []).append(dialogue)
    return found


# ---- over prompts and seeds ---------------------------------------------------------------------------------------


def level(seeds: Sequence[Values]) -> Change | None:
    """The mean of one measure of one policy, by seed; None where nothing has a value."""
    return _interval([[_mean(turns.values()) for turns in values.values() if turns] for values in seeds])


def difference(first: Sequence[Values], second: Sequence[Values]) -> Change | None:
    """`second` minus `first`, seed by seed; None where they share no turn with a value.

    Raises:
        DataError: another number of seeds, or the policies were asked other prompts.
    """
    if len(first) != len(second):
        raise DataError(f"{len(first)} seeds of one policy and {len(second)} of the other: evaluate the same seeds")
    return _interval([_paired(a, b) for a, b in zip(first, second, strict=True)])


def require_same_prompts(policies: Mapping[str, Measured]) -> None:
    """Raises DataError when policies were not asked the same: their difference would be that of the prompts."""
    asked = {name: set(found["accuracy"]) for name, found in policies.items()}
    first, *others = asked
    for other in others:
        if asked[other] != asked[first]:
            odd = min(asked[first] ^ asked[other])
            raise DataError(f"{first} and {other} were asked other prompts, such as {odd!r}: evaluate both again")


def _paired(first: Values, second: Values) -> list[float]:
    found = []
    for prompt, turns in first.items():
        if shared := sorted(turns.keys() & second.get(prompt, {}).keys()):
            found.append(_mean([second[prompt][turn] - turns[turn] for turn in shared]))
    return found


def _interval(seeds: Sequence[Sequence[float]]) -> Change | None:
    if not seeds or not all(seeds):
        return None
    fewest = min(len(values) for values in seeds)
    over = mean_interval(seeds[0]) if len(seeds) == 1 else seeds_interval([_mean(values) for values in seeds])
    return Change(over.mean, over.low, over.high, fewest, len(seeds))


def _mean(values: Iterable[float]) -> float:
    array = list(values)
    return float(sum(array) / len(array))
