"""Which pipelines make up the experiment, what they left, and the report on it. What is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlaudio.audio.store import ClipStore
from rlaudio.errors import RunFolderError
from rlaudio.evals.summary import EvaluationResult, read_evaluation
from rlaudio.observe.listen import Narrator
from rlaudio.observe.tracker import read_curves
from rlaudio.recipes.pipeline import Pipeline, Stage, latest_run, read_pipeline, read_state
from rlaudio.runs import write_json_atomic
from trap_arms.measures import Measured, measure
from trap_arms.page import Seen, basis, write_page
from trap_arms.verdict import ARMS, Claim, Results, claims, compare, headline

HERE = Path(__file__).resolve().parents[1]
JUDGE, EVALUATION, SET = "judge", "evaluation", "heldout"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run.

    Attributes:
        tiny: two steps per arm and a few prompts, judged by the judge that trains: proves the mechanics, says nothing.
    """

    seeds: tuple[int, ...]
    tiny: bool = False
    here: Path = HERE

    @property
    def pipeline(self) -> str:
        return str(self.here / "pipeline.yaml")

    @property
    def judge_pipeline(self) -> str:
        return str(self.here / "judge_pipeline.yaml")

    @property
    def world(self) -> Path:
        """Where the quickstart's records and sounds lie."""
        return self.here.parent / "quickstart" / "data"

    def arms(self, seed: int, *, until: str = "") -> tuple[str, ...]:
        """Overrides of `pipeline.yaml` for one seed."""
        given = [f"run.seed={seed}", *([f"run.until={until}"] if until else [])]
        return (*given, *_TINY) if self.tiny else tuple(given)

    def read(self, seed: int) -> Pipeline:
        return read_pipeline(self.pipeline, self.arms(seed))

    def report_folder(self) -> Path:
        return self.read(self.seeds[0]).folder.parent / ("trap-tiny-report" if self.tiny else "trap-report")


Train = Callable[[Sequence[str]], int]
"""`rlaudio` with its arguments: the exit code."""


def run(plan: Plan, *, train: Train, until: str = "") -> int:
    """The judge that evaluates, then every seed's arms, up to one stage if it is named. Returns an exit code."""
    if not plan.tiny:
        code = train(["train", plan.judge_pipeline])
        if code or until == JUDGE:
            return code
    for seed in plan.seeds:
        if code := train(["train", plan.pipeline, *plan.arms(seed, until=until)]):
            return code
    return 0


_TINY = (
    "run.name=trap-tiny",
    *(f"stages[{index}].settings.run={{steps: 2, checkpoint_every: 1}}" for index in range(8)),
    *(f"stages[{index}].settings.doctor={{before_train: false}}" for index in range(8)),
    "stages[8].settings.rewards={judge_model: {path: ../quickstart/checkpoints/judge}}",
    "stages[8].settings.evaluation={max_dialogues: 12}",
    "stages[8].settings.siblings=2",
    "stages[8].settings.sibling_records=6",
)


def report(plan: Plan, *, narrator: Narrator | None) -> tuple[Results, list[Claim], Path]:
    """Read what every seed's evaluation left and write `report.json` and `report.html`; returns the latter's path.

    Args:
        narrator: reads replies out; None shows them as text.

    Raises:
        RunFolderError: a seed is not evaluated. DataError: its policies were asked different prompts.
    """
    pipelines = {seed: plan.read(seed) for seed in plan.seeds}
    measured = [_measured(pipeline) for pipeline in pipelines.values()]
    results = compare(measured)
    found = claims(results)
    folder = plan.report_folder()
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / "report.json", as_json(results, found, seeds=plan.seeds))
    first = pipelines[plan.seeds[0]]
    page = folder / "report.html"
    write_page(
        page,
        results=results,
        claims=found,
        seen=_seen(first, seed=plan.seeds[0]),
        judge=judge_in_words(plan),
        clips=ClipStore(str(plan.world)),
        narrator=narrator,
    )
    return results, found, page


def as_json(results: Results, found: Sequence[Claim], *, seeds: Sequence[int]) -> dict[str, Any]:
    """What `report.json` holds."""
    return {
        "seeds": list(seeds),
        "headline": headline(found),
        "intervals": basis(results),
        "claims": [asdict(claim) for claim in found],
        "levels": {arm: {m: asdict(c) for m, c in levels.items()} for arm, levels in results.levels.items()},
        "since_start": {arm: {m: asdict(c) for m, c in some.items()} for arm, some in results.since_start.items()},
        "contrasts": {
            f"{second} - {first}": {m: asdict(c) for m, c in some.items()}
            for (first, second), some in results.contrasts.items()
        },
    }


def judge_in_words(plan: Plan) -> str:
    """How good the evaluating judge is on comparisons that it did not learn from."""
    if plan.tiny:
        return "A trial of the mechanics: the judge that trained evaluates, and no figure here means anything."
    stage = _stage(read_pipeline(plan.judge_pipeline), JUDGE)
    figures = json.loads((_run_of(stage) / "calibration.json").read_text(encoding="utf-8"))["heldout"]
    return (
        "Another one than trains: other random weights at the start, other comparisons, of the same small world. "
        f"On {figures['num_pairs']} comparisons that it did not learn from: right verdict of five in "
        f"{figures['accuracy']:.0%}, right side {figures['sign_accuracy']:.0%}, both orders consistent "
        f"{figures['consistency']:.0%}, unreadable {figures['failure_rate']:.1%}. What it cannot tell apart widens the "
        "intervals of its figures and pulls differences towards zero."
    )


def _measured(pipeline: Pipeline) -> dict[str, Measured]:
    return {
        arm: measure(_read(pipeline, f"evaluation-{arm}-{SET}.json"), _read(pipeline, f"siblings-{arm}-{SET}.json"))
        for arm in ARMS
    }


def _read(pipeline: Pipeline, name: str) -> EvaluationResult:
    return read_evaluation(_run_of(_stage(pipeline, EVALUATION)) / name)


def _seen(pipeline: Pipeline, *, seed: int) -> Seen:
    runs = {stage.name: _run_of(stage) for stage in pipeline.stages if stage.name in ARMS}
    return Seen(
        seed,
        results={arm: _read(pipeline, f"evaluation-{arm}-{SET}.json") for arm in ARMS},
        curves={name: read_curves(run / "metrics" / "metrics.jsonl") for name, run in runs.items()},
        alerts={name: _alert(run) for name, run in runs.items()},
    )


def _alert(run: Path) -> str:
    trap: Mapping[str, Any] = json.loads((run / "report.json").read_text(encoding="utf-8"))["trap"]["training"]
    if alert := trap.get("alert"):
        return (
            f"by step {alert['step']} verified reward rose by {alert['verified']:.1f} deviations of a step while the "
            f"training judge's fell by {-alert['preference']:.1f}"
        )
    return ""


def _stage(pipeline: Pipeline, name: str) -> Stage:
    return next(stage for stage in pipeline.stages if stage.name == name)


def _run_of(stage: Stage) -> Path:
    """The run folder of a stage that is done."""
    state = read_state(stage)
    if state is None or not state.outputs:
        raise RunFolderError(f"stage {stage.name!r} of {stage.folder.parents[1].name} is not done: run it first")
    return latest_run(stage, state)
