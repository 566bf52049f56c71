"""Which pipelines make up the experiment, what they left, and the table of it. What is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from spoken_world.stages import HEARD

from mgrd_study.measures import (
    CONTRASTS,
    LAST,
    MEASURES,
    POLICIES,
    START,
    Change,
    accuracy,
    difference,
    level,
    measure,
)
from rlaudio.errors import RunFolderError
from rlaudio.evals.summary import EvaluationResult, read_evaluation
from rlaudio.recipes.pipeline import Pipeline, latest_run, read_pipeline, read_state
from rlaudio.runs import write_json_atomic, write_text_atomic

HERE = Path(__file__).resolve().parents[1]
START_STAGE = "cold_start"
SETS = ("voices_known", "voices_new")
"""Held-out questions about the sound: spoken by voices of training, and by others."""
OTHER = "other"

Train = Callable[[Sequence[str]], int]
"""`rlaudio` with its arguments: the exit code."""
Outcome = Literal["shown", "not shown", "undecided"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        tiny: a few steps and questions: proves the mechanics, says nothing.
    """

    seeds: tuple[int, ...]
    tiny: bool = False
    here: Path = HERE

    @property
    def pipeline(self) -> str:
        return str(self.here / "pipeline.yaml")

    @property
    def start(self) -> tuple[str, ...]:
        """The pipeline of where everything begins, with its overrides."""
        return (str(self.here / "start.yaml"), *(_TINY_START if self.tiny else ()))

    def arms(self, seed: int, *, until: str = "") -> tuple[str, ...]:
        """Overrides of `pipeline.yaml` for one seed."""
        given = [f"run.seed={seed}", *([f"run.until={until}"] if until else [])]
        return (*given, *_TINY) if self.tiny else tuple(given)

    def read(self, seed: int) -> Pipeline:
        return read_pipeline(self.pipeline, self.arms(seed))

    def report_folder(self) -> Path:
        return self.read(self.seeds[0]).folder.parent / ("mgrd-tiny-report" if self.tiny else "mgrd-report")


_TINY_START = ("run.name=mgrd-tiny-start", 'stages[0].settings={"phases[0].steps": 2, "phases[0].rows_per_step": 8}')
_TINY_MODEL = "../../runs/mgrd-tiny-start-seed0/stages/cold_start/model"
_TINY = (
    "run.name=mgrd-tiny",
    *(f"stages[{at}].settings.model={{path: {_TINY_MODEL}}}" for at in (0, 1, 6)),
    *(f"stages[{at}].settings.distil={{max_records: 12}}" for at in (0, 3)),
    *(f"stages[{at}].settings.phases[0].{what}" for at in (1, 4) for what in ("steps=2", "rows_per_step=8")),
    *(f"stages[{at}].settings.run={{steps: 2, checkpoint_every: 1}}" for at in (2, 5, 6)),
    f"stages[7].settings.policies.start={_TINY_MODEL}",
    *(f"stages[{at}].settings.evaluation={{max_dialogues: 8}}" for at in (7, 8)),
)


def run(plan: Plan, *, train: Train, until: str = "") -> int:
    """Where everything begins, then every seed, up to one stage if it is named. Returns an exit code."""
    code = train(["train", *plan.start])
    if code or until == START_STAGE:
        return code
    for seed in plan.seeds:
        if code := train(["train", plan.pipeline, *plan.arms(seed, until=until)]):
            return code
    return 0


# ---- what they left -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Results:
    """Levels and contrasts by scope ("all", a task, a set): scope -> policy or pair -> measure -> change.

    Attributes:
        other: policy -> its change of accuracy since the start on the other tasks: what was forgotten.
        silence: measure -> level of the last policy where it hears nothing.
        kept: of every seed and distillation, what became of the sampled turns.
    """

    seeds: tuple[int, ...]
    levels: Mapping[str, Mapping[str, Mapping[str, Change]]]
    contrasts: Mapping[str, Mapping[tuple[str, str], Mapping[str, Change]]]
    other: Mapping[str, Change]
    silence: Mapping[str, Change]
    kept: Mapping[str, Mapping[str, int]]


def collect(plan: Plan) -> Results:
    """Read what every seed's evaluation left.

    Raises:
        RunFolderError: a seed is not evaluated. DataError: its policies were asked different questions.
    """
    pipelines = [plan.read(seed) for seed in plan.seeds]
    scopes: dict[str, tuple[tuple[str, ...], str | None]] = {
        "all": (SETS, None),
        **{task: (SETS, task) for task in HEARD},
        **{name: ((name,), None) for name in SETS},
    }
    found = {
        scope: {
            policy: [measure(_evaluations(one, policy, sets), task=task) for one in pipelines] for policy in POLICIES
        }
        for scope, (sets, task) in scopes.items()
    }
    others = {policy: [accuracy(_evaluations(one, policy, (OTHER,))) for one in pipelines] for policy in POLICIES}
    quiet = [measure(_evaluations(one, LAST, SETS, stage="silence")) for one in pipelines]

    def of(scope: str, policy: str, name: str) -> list[dict[str, float]]:
        return [values[name] for values in found[scope][policy]]

    return Results(
        plan.seeds,
        levels={s: {p: {m: level(of(s, p, m)) for m in MEASURES} for p in POLICIES} for s in scopes},
        contrasts={
            s: {(a, b): {m: difference(of(s, a, m), of(s, b, m)) for m in MEASURES} for a, b in CONTRASTS}
            for s in scopes
        },
        other={policy: difference(others[START], others[policy]) for policy in POLICIES if policy != START},
        silence={name: level([values[name] for values in quiet]) for name in MEASURES},
        kept={
            f"seed {seed}, {stage}": json.loads((_run_of(one, stage) / "report.json").read_text("utf-8"))["turns"]
            for seed, one in zip(plan.seeds, pipelines, strict=True)
            for stage in ("distil_1", "distil_2")
        },
    )


def verdict(results: Results) -> tuple[Outcome, str]:
    """Whether the claim shows, by its interval alone: MGRD raises the share of grounded, right answers."""
    change = results.contrasts["all"][START, LAST]["grounded_right"]
    outcome: Outcome = "shown" if change.rose else "not shown" if change.fell else "undecided"
    against = results.contrasts["all"]["rl_only", LAST]["grounded_right"]
    beside = "more than" if against.rose else "less than" if against.fell else "not clearly otherwise than"
    return outcome, (
        f"MGRD changes the share of grounded, right answers by {in_points(change)} points; {beside} reinforcement "
        f"learning alone ({in_points(against)})."
    )


def in_points(change: Change) -> str:
    return f"{100 * change.mean:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def in_percent(change: Change) -> str:
    return f"{100 * change.mean:.1f} ({100 * change.low:.1f} to {100 * change.high:.1f})"


def basis(results: Results) -> str:
    """What the intervals are of."""
    if len(results.seeds) == 1:
        return "95 % bootstrap over dialogues of one seed: says nothing of other seeds"
    return f"95 % by Student's t over {len(results.seeds)} seeds"


def tables(results: Results) -> str:
    """The report in Markdown."""
    num = results.levels["all"][START]["right"].num_dialogues
    heads = ["questions", "policy", *MEASURES]
    lines = [
        f"Shares of turns in %, {num} held-out dialogues per seed. Intervals: {basis(results)}.",
        "",
        *(f"- `{name}`: {words}" for name, words in MEASURES.items()),
        "",
        *_markdown(
            heads,
            [
                [scope, policy, *(in_percent(one) for one in measures.values())]
                for scope, policies in results.levels.items()
                for policy, measures in policies.items()
            ],
        ),
        "",
        *_markdown(
            ["questions", "difference in points", *MEASURES],
            [
                [scope, f"{second} - {first}", *(in_points(one) for one in measures.values())]
                for scope, pairs in results.contrasts.items()
                for (first, second), measures in pairs.items()
            ],
        ),
        "",
        *_markdown(
            ["control", "figure"],
            [
                [f"{LAST} hearing silence, {name}", in_percent(results.silence[name])]
                for name in ("grounded_right", "right", "says")
            ]
            + [[f"other tasks, {policy} - {START}, points", in_points(one)] for policy, one in results.other.items()],
        ),
        "",
        *_markdown(
            ["distillation", *next(iter(results.kept.values()))],
            [[name, *map(str, turns.values())] for name, turns in results.kept.items()],
        ),
    ]
    return "\n".join(lines) + "\n"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def report(plan: Plan) -> tuple[Results, Path]:
    """Write `report.json` and `report.md`; returns the latter's path. Raises as `collect`."""
    results = collect(plan)
    outcome, words = verdict(results)
    folder = plan.report_folder()
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder.joinpath("report.json"), as_json(results))
    warning = "A trial of the mechanics: no figure here means anything.\n\n" if plan.tiny else ""
    path = folder / "report.md"
    write_text_atomic(path, f"# MGRD, seeds {list(plan.seeds)}\n\n{warning}**{outcome}**: {words}\n\n{tables(results)}")
    return results, path


def as_json(results: Results) -> dict[str, Any]:
    """What `report.json` holds."""
    outcome, words = verdict(results)
    return {
        "seeds": list(results.seeds),
        "outcome": outcome,
        "words": words,
        "intervals": basis(results),
        "levels": {
            s: {p: {m: asdict(c) for m, c in some.items()} for p, some in policies.items()}
            for s, policies in results.levels.items()
        },
        "contrasts": {
            s: {f"{b} - {a}": {m: asdict(c) for m, c in some.items()} for (a, b), some in pairs.items()}
            for s, pairs in results.contrasts.items()
        },
        "other": {policy: asdict(change) for policy, change in results.other.items()},
        "silence": {name: asdict(change) for name, change in results.silence.items()},
        "kept": {name: dict(turns) for name, turns in results.kept.items()},
    }


def _evaluations(
    pipeline: Pipeline, policy: str, sets: Sequence[str], *, stage: str = "evaluation"
) -> list[EvaluationResult]:
    run = _run_of(pipeline, stage)
    return [read_evaluation(run / f"evaluation-{policy}-{name}.json") for name in sets]


def _run_of(pipeline: Pipeline, name: str) -> Path:
    """The run folder of a stage that is done."""
    stage = next(stage for stage in pipeline.stages if stage.name == name)
    state = read_state(stage)
    if state is None or not state.outputs:
        raise RunFolderError(f"stage {name!r} of {pipeline.folder.name} is not done: run it first")
    return latest_run(stage, state)
