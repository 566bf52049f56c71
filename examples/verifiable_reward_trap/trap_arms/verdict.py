"""What the intervals allow to say of the paper's claims, in plain words; nothing else decides.

A measure rose or fell where its 95 % interval leaves zero out. The intervals are not widened for their number: of forty
that are about nothing, two would leave zero out. A claim is undecided where the figures it needs are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trap_arms.measures import MEASURES, Change, Measured, difference, level, require_same_prompts

Outcome = Literal["shown", "not shown", "undecided"]

START = "start"
ARMS: Mapping[str, str] = {
    START: "where every arm begins",
    "rlvr": "verified reward alone",
    "rlvr_brief": "verified reward with slight efficiency pressure",
    "rlhf": "the judge alone",
    "joint": "verified reward and judge in one run",
    "staged_first": "verified reward alone, half of the steps",
    "staged": "then the judge alone, the other half",
    "warm_rlvr": "from the joint arm's end on, verified reward alone",
    "warm_brief": "the same with slight efficiency pressure",
}
CONTRASTS: Mapping[tuple[str, str], str] = {
    ("rlvr", "rlvr_brief"): "what efficiency pressure does",
    ("rlvr", "joint"): "what the judge adds to verified reward",
    ("rlhf", "joint"): "what verified reward adds to the judge",
    ("staged_first", "staged"): "what the second stage changes",
    ("staged", "joint"): "one run instead of two stages",
    ("joint", "warm_rlvr"): "what verified reward alone leaves of a style",
    ("joint", "warm_brief"): "what it leaves under efficiency pressure",
}
"""(first, second): second minus first."""

WATCHED = ("preference_right", "warm")
"""What the trap costs. Not diversity, which every arm may lose: it has a claim of its own."""
_WORDS = {
    "preference_right": "the other judge's liking for right replies",
    "warm": "courtesy",
    "distinct": "diversity",
    "words": "words per reply",
    "accuracy": "accuracy",
    "preference": "the other judge's liking",
}


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim, what became of it, and the figures that decided.

    Attributes:
        claim: the claim itself, which may be wrong.
    """

    name: str
    claim: str
    outcome: Outcome
    words: str


@dataclass(frozen=True, slots=True)
class Results:
    """Levels, changes since the start, and contrasts: measure -> change. What has no value is absent."""

    num_seeds: int
    levels: Mapping[str, Mapping[str, Change]]
    since_start: Mapping[str, Mapping[str, Change]]
    contrasts: Mapping[tuple[str, str], Mapping[str, Change]]


def compare(seeds: Sequence[Mapping[str, Measured]]) -> Results:
    """All figures of the report.

    Args:
        seeds: of each seed, policy -> what was measured.

    Raises:
        DataError: policies of one seed were asked different prompts, or there is no seed.
    """
    for policies in seeds:
        require_same_prompts(policies)

    def of(name: str, measure: str) -> list[Mapping[str, Mapping[int, float]]]:
        return [policies[name][measure] for policies in seeds]

    def differences(first: str, second: str) -> dict[str, Change]:
        found = {name: difference(of(first, name), of(second, name)) for name in MEASURES}
        return {name: change for name, change in found.items() if change is not None}

    levels = {arm: {m: found for m in MEASURES if (found := level(of(arm, m))) is not None} for arm in ARMS}
    since = {arm: differences(START, arm) for arm in ARMS if arm != START}
    return Results(len(seeds), levels, since, {pair: differences(*pair) for pair in CONTRASTS})


def claims(results: Results) -> list[Claim]:
    """Every claim with its outcome."""
    return [
        _trap(results, "rlvr", "Verified reward alone makes replies worse while they grow more often right."),
        _trap(results, "rlvr_brief", "With slight efficiency pressure it does."),
        _pressure(results),
        _restores(results),
        _complements(results),
        _forgets(results),
        _wears(results, "warm_rlvr", "Verified reward alone wears away a style that a judge had taught."),
        _wears(results, "warm_brief", "With slight efficiency pressure it does."),
        _narrows(results),
    ]


def headline(found: Sequence[Claim]) -> str:
    """The verdict in one sentence: on arms that begin terse, and on those with a style to lose."""
    worn = {claim.name: claim.outcome for claim in found if claim.name in ("warm_rlvr", "warm_brief")}
    if worn["warm_rlvr"] == "shown":
        said = "; a style that was taught before is worn away by verified reward alone"
    elif worn["warm_brief"] == "shown":
        said = "; a style that was taught before is worn away under efficiency pressure"
    elif set(worn.values()) == {"not shown"}:
        said = "; a style that was taught before stays"
    else:
        said = "; whether a style that was taught before stays is undecided"
    return _from_a_terse_start(found) + said


def _from_a_terse_start(found: Sequence[Claim]) -> str:
    alone, pressed = (claim.outcome for claim in found[:2])
    if alone == "shown":
        return "The trap shows with verified reward alone" + (", and with efficiency pressure" * (pressed == "shown"))
    if pressed == "shown":
        return "The trap shows under efficiency pressure, " + (
            "not with verified reward alone" if alone == "not shown" else "and is undecided with verified reward alone"
        )
    if alone == pressed == "not shown":
        return "The trap does not show, neither with verified reward alone nor under efficiency pressure"
    return "These runs do not decide whether the trap shows"


def _trap(results: Results, arm: str, claim: str) -> Claim:
    """Shown: accuracy rose, and something of how replies are liked or worded fell."""
    changes = results.since_start[arm]
    fell = [m for m in WATCHED if m in changes and changes[m].fell]
    told = "; ".join(_told(m, changes) for m in ("accuracy", *WATCHED, "words"))
    if "accuracy" not in changes or not changes["accuracy"].rose:
        return Claim(arm, claim, "undecided", f"Accuracy did not clearly rise, so there is nothing to pay for: {told}.")
    if fell:
        unliked = "preference_right" in fell
        how = (
            "and the other judge likes what is right less"
            if unliked
            else "though the other judge does not clearly mind"
        )
        return Claim(arm, claim, "shown", f"{_named(fell)} fell while accuracy rose, {how}: {told}.")
    if missing := [m for m in WATCHED if m not in changes]:
        return Claim(arm, claim, "undecided", f"There are no values of {_named(missing)}: {told}.")
    return Claim(arm, claim, "not shown", f"Accuracy rose and nothing of style or liking clearly fell: {told}.")


def _pressure(results: Results) -> Claim:
    changes = results.contrasts["rlvr", "rlvr_brief"]
    told = "; ".join(_told(m, changes) for m in ("words", "warm", "distinct", "preference_right", "accuracy"))
    outcome: Outcome = "not shown"
    if _fell(changes, "words") and _fell(changes, "warm"):
        outcome = "shown"
    elif not _decided(changes, "words", "warm") and not _rose(changes, "warm"):
        outcome = "undecided"
    return Claim(
        "pressure", "Efficiency pressure makes replies short and flat.", outcome, f"Against RLVR alone: {told}."
    )


def _restores(results: Results) -> Claim:
    claim = "A judge beside verified reward keeps accuracy and makes replies better liked."
    changes = results.contrasts["rlvr", "joint"]
    told = "; ".join(_told(m, changes) for m in ("accuracy", "preference_right", "warm", "distinct"))
    if _rose(changes, "preference_right") and not _fell(changes, "accuracy"):
        return Claim("joint", claim, "shown", f"Against RLVR alone, without a clear loss of accuracy: {told}.")
    if _rose(changes, "preference_right"):
        return Claim("joint", claim, "not shown", f"Better liked, and less often right: {told}.")
    outcome: Outcome = "not shown" if _fell(changes, "preference_right") else "undecided"
    return Claim("joint", claim, outcome, f"Not clearly better liked than RLVR alone: {told}.")


def _complements(results: Results) -> Claim:
    claim = "The judge does not replace verified reward."
    changes = results.contrasts["rlhf", "joint"]
    told = "; ".join(_told(m, changes) for m in ("accuracy", "preference_right", "warm"))
    if _rose(changes, "accuracy"):
        return Claim("rlhf", claim, "shown", f"Both together are more often right than the judge alone: {told}.")
    outcome: Outcome = "not shown" if _fell(changes, "accuracy") else "undecided"
    return Claim("rlhf", claim, outcome, f"Not clearly more often right than the judge alone: {told}.")


def _forgets(results: Results) -> Claim:
    claim = "A second stage by the judge alone forgets what verified reward taught."
    second, joint = results.contrasts["staged_first", "staged"], results.contrasts["staged", "joint"]
    told = f"{_told('accuracy', second)}; one run instead of two stages: {_told('accuracy', joint)}, " + "; ".join(
        _told(m, joint) for m in ("preference_right", "warm")
    )
    if _fell(second, "accuracy"):
        return Claim("staged", claim, "shown", f"In the second stage: {told}.")
    outcome: Outcome = "not shown" if _rose(second, "accuracy") else "undecided"
    said = "Accuracy rose on" if outcome == "not shown" else "No clear loss"
    return Claim("staged", claim, outcome, f"{said} in the second stage: {told}.")


def _wears(results: Results, arm: str, claim: str) -> Claim:
    """Shown: liking or courtesy fell since the joint arm's end. Accuracy needs not rise: it rose there."""
    changes = results.contrasts["joint", arm]
    told = "; ".join(_told(m, changes) for m in ("preference_right", "warm", "words", "accuracy"))
    if any(_fell(changes, m) for m in WATCHED):
        return Claim(arm, claim, "shown", f"Since the joint arm's end: {told}.")
    if any(m not in changes for m in WATCHED):
        return Claim(arm, claim, "undecided", f"Values are missing: {told}.")
    return Claim(arm, claim, "not shown", f"Nothing of liking or courtesy clearly fell: {told}.")


def _narrows(results: Results) -> Claim:
    claim = "Verified reward alone leaves fewer ways to say a thing."
    told = "; ".join(f"{arm}: {_told('distinct', changes)}" for arm, changes in results.since_start.items())
    mine = results.since_start["rlvr"]
    outcome: Outcome = "shown" if _fell(mine, "distinct") else "not shown" if _rose(mine, "distinct") else "undecided"
    return Claim("diversity", claim, outcome, f"Among sampled siblings, since the start: {told}.")


def _rose(changes: Mapping[str, Change], measure: str) -> bool:
    return measure in changes and changes[measure].rose


def _fell(changes: Mapping[str, Change], measure: str) -> bool:
    return measure in changes and changes[measure].fell


def _decided(changes: Mapping[str, Change], *measures: str) -> bool:
    return all(_rose(changes, name) or _fell(changes, name) for name in measures)


def _named(measures: Sequence[str]) -> str:
    names = [_WORDS[name] for name in measures]
    joined = " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
    return joined[0].upper() + joined[1:]


def _told(measure: str, changes: Mapping[str, Change]) -> str:
    name = _WORDS[measure]
    if measure not in changes:
        return f"{name}: no values"
    return f"{name} {shown(changes[measure], signed=True)}"


def shown(change: Change, *, signed: bool = False) -> str:
    """ "+0.12 (+0.05 to +0.19)" """
    form = "+.3f" if signed else ".3f"
    return f"{change.mean:{form}} ({change.low:{form}} to {change.high:{form}})"
