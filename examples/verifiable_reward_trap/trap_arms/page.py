"""The report as one page that needs no network: verdict, tables, curves, and dialogues to hear side by side.

What models and records say is data: Jinja escapes it, and the page runs no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlaudio.errors import AudioError
from rlaudio.evals.summary import DialogueResult, EvaluationResult
from rlaudio.observe import charts
from rlaudio.observe.listen import Narrator, Sound, encode
from rlaudio.observe.report import Clips, pick_examples
from rlaudio.runs import write_text_atomic
from trap_arms.measures import JUDGE, MEASURES, Change
from trap_arms.verdict import ARMS, CONTRASTS, START, Claim, Results, headline

_DIALOGUES = 6
_MAX_TEXT_CHARS = 400
_CURVES = {
    "reward/verified": "verified reward",
    "reward/judge": "the training judge",
    "style/words": "words per reply",
    "style/warm": "replies with courtesy",
    "style/distinct": "different replies among siblings",
    "kl": "KL to the start",
}
_SHARES = frozenset(("accuracy", "warm", "repetition", "disfluency", "distinct", "distinct_2"))


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one seed, what is shown beside the figures.

    Attributes:
        results: policy -> its greedy held-out dialogues.
        curves: arm -> curve -> points.
        alerts: arm -> the trap monitor's alert in words, or empty.
    """

    seed: int
    results: Mapping[str, EvaluationResult]
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]
    alerts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Cell:
    text: str
    interval: str
    tone: str


def basis(results: Results) -> str:
    """What the intervals are of."""
    prompts = min((one.num_prompts for one in results.levels[START].values()), default=0)
    if results.num_seeds == 1:
        return (
            "One seed. Intervals are 95 %, a bootstrap over prompts, paired: they speak of these very runs, and say "
            f"nothing of what another seed would do. At least {prompts} prompts in every figure of the start."
        )
    return (
        f"{results.num_seeds} seeds. Intervals are 95 %, Student's t over the seeds, paired by seed and prompt. "
        "They are of runs like these."
    )


def write_page(
    path: Path,
    *,
    results: Results,
    claims: Sequence[Claim],
    seen: Seen,
    judge: str,
    clips: Clips,
    narrator: Narrator | None,
) -> None:
    """Write the page, whole or not at all.

    Args:
        judge: how good the evaluating judge is, in words.
        narrator: reads replies out; None shows them as text.

    Raises:
        RunFolderError: the file cannot be written.
    """
    arms = {arm: about for arm, about in ARMS.items() if arm in results.levels}
    view: dict[str, Any] = {
        "results": results,
        "headline": headline(claims),
        "basis": basis(results),
        "claims": claims,
        "arms": arms,
        "measures": MEASURES,
        "rows": {m: [_level(results, arm, m) for arm in arms] for m in MEASURES},
        "contrasts": CONTRASTS,
        "contrast_rows": {m: [_change(results.contrasts[pair].get(m), m) for pair in CONTRASTS] for m in MEASURES},
        "judge": judge,
        "first_seed": seen.seed,
        "curves": {arm: _drawn(curves) for arm, curves in seen.curves.items()},
        "alerts": seen.alerts,
        "dialogues": _dialogues(seen.results, clips=clips, narrator=narrator),
    }
    write_text_atomic(path, _render(view))


def _level(results: Results, arm: str, measure: str) -> _Cell:
    found = results.levels[arm].get(measure)
    if found is None:
        return _Cell("-", "", "")
    change = results.since_start.get(arm, {}).get(measure)
    return _Cell(number(found.mean, measure), between(found, measure), _tone(change))


def _change(change: Change | None, measure: str) -> _Cell:
    if change is None:
        return _Cell("-", "", "")
    return _Cell(number(change.mean, measure, signed=True), between(change, measure, signed=True), _tone(change))


def _tone(change: Change | None) -> str:
    return "" if change is None else "rose" if change.rose else "fell" if change.fell else ""


def number(value: float, measure: str, *, signed: bool = False) -> str:
    """Shares in percent, everything else as it is."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f} %" if measure in _SHARES else f"{value:{sign}.2f}"


def between(change: Change, measure: str, *, signed: bool = False) -> str:
    low, high = (number(value, measure, signed=signed).removesuffix(" %") for value in (change.low, change.high))
    return f"{low} to {high}"


def _drawn(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[str, Markup]]:
    return [(label, charts.curve(curves[name], label=label)) for name, label in _CURVES.items() if curves.get(name)]


def _dialogues(
    results: Mapping[str, EvaluationResult], *, clips: Clips, narrator: Narrator | None
) -> list[dict[str, Any]]:
    start = results[START].dialogues
    by_id = {arm: {one.prompt_id: one for one in result.dialogues} for arm, result in results.items()}
    chosen = [first for first, _ in pick_examples([(one, one) for one in start], _DIALOGUES)]
    return [_dialogue(one, by_id, clips, narrator) for one in chosen]


def _dialogue(
    first: DialogueResult, by_id: Mapping[str, Mapping[str, DialogueResult]], clips: Clips, narrator: Narrator | None
) -> dict[str, Any]:
    said: dict[int, dict[str, Any]] = {}
    for arm, dialogues in by_id.items():
        for turn in dialogues[first.prompt_id].turns:
            view = said.setdefault(
                turn.turn,
                {
                    "user": turn.transcript[:_MAX_TEXT_CHARS],
                    "answer": turn.answer,
                    "sounds": [_sound(name, clips) for name in turn.clips],
                    "replies": [],
                },
            )
            liked = [part.value for part in turn.breakdown if part.source == JUDGE]
            view["replies"].append(
                {
                    "arm": arm,
                    "text": turn.reply[:_MAX_TEXT_CHARS],
                    "correct": turn.correct and turn.parsable,
                    "liked": f"{liked[0]:+.2f}" if liked else "",
                    "sound": narrator.speak(turn.reply) if narrator is not None else None,
                }
            )
    return {"task": first.task, "prompt_id": first.prompt_id, "turns": [said[turn] for turn in sorted(said)]}


def _sound(name: str, clips: Clips) -> Sound | str:
    """A user's sound, or why it cannot be heard: one that is lost must not cost the page."""
    try:
        return encode(clips.get(name).samples, lossless=False)
    except AudioError as error:
        return str(error)


def _render(view: Mapping[str, Any]) -> str:
    css = (resources.files("rlaudio.observe") / "page" / "report.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((Path(__file__).with_name("page.html")).read_text(encoding="utf-8"))
    return template.render(css=Markup(css), **view)
