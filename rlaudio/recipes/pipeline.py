"""A pipeline: stages in order, each a recipe with its own file, each with the results of those before it.

Nothing is trained here: a stage is run by its recipe's own command. This module says what there is to run, what each
stage depends on, and what of it was done before:

```
NAME-seedN/
  stages/STAGE/runs/      the run folders of its recipe; the newest is gone on with
  stages/STAGE/RESULT     what later stages refer to as ${stage.STAGE.RESULT}
  stages/STAGE/stage.json what it was made from, as one hash, and the hashes of its results
```

A stage is done when its hash is that of its settings and inputs today, and its results are what it left. So a pipeline
that was killed goes on where it was, and one whose file was changed repeats what the change concerns.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaudio.config import RunConfig, SftConfig, TrackingSettings
from rlaudio.config_checks import run_problems, secret_problems, sft_problems
from rlaudio.config_checks_judges import reward_model_problems
from rlaudio.config_checks_stages import (
    RESULTS,
    curation_problems,
    distil_problems,
    evaluation_problems,
    stage_problems,
)
from rlaudio.config_judges import RewardModelConfig
from rlaudio.config_loader import code_path, load_config, read_plain
from rlaudio.config_objects import object_problems
from rlaudio.config_stages import CurationConfig, DistilConfig, EvaluationConfig, PipelineConfig
from rlaudio.errors import ConfigError, RunFolderError
from rlaudio.fingerprint import Contents, fingerprint, inputs
from rlaudio.runs import kept_path, write_json_atomic

SCHEMAS: Mapping[str, type[Any]] = {
    "sft": SftConfig,
    "reward_model": RewardModelConfig,
    "curate": CurationConfig,
    "distil": DistilConfig,
    "rl": RunConfig,
    "evaluate": EvaluationConfig,
}
_CHECKS: Mapping[str, Callable[[Any], list[str]]] = {
    "sft": sft_problems,
    "reward_model": reward_model_problems,
    "curate": curation_problems,
    "distil": distil_problems,
    "rl": run_problems,
    "evaluate": evaluation_problems,
}
_OUTPUTS = {"sft": "run.output", "reward_model": "run.output", "curate": "curation.output", "distil": "distil.output"}
"""Settings by which a recipe is told where its result goes; of the others it is found in the run folder."""

_DECIDES_NOTHING = ("config.run.name", "config.run.stop_deadline_s", "config.tracking")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage, ready to be run.

    Attributes:
        overrides: of its file: `key=value`, tracking apart.
        folder: of the stage.
        results: name -> where it lies when the stage is done.
    """

    name: str
    recipe: str
    config: str
    overrides: tuple[str, ...]
    folder: Path
    results: Mapping[str, Path]

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    def load(self, *, check: Callable[[Any], Iterable[str]] | None = None) -> Any:
        """Its configuration, as its recipe will read it. Raises ConfigError, naming the stage."""
        try:
            return load_config(SCHEMAS[self.recipe], self.config, self.overrides, check=check)
        except ConfigError as error:
            raise ConfigError(f"stage {self.name!r}: {error}") from error


@dataclass(frozen=True, slots=True)
class Pipeline:
    config: PipelineConfig
    folder: Path
    stages: tuple[Stage, ...]


def read_pipeline(path: str, overrides: tuple[str, ...] | list[str] = ()) -> Pipeline:
    """Read a pipeline's file, with its references resolved to where the results will lie.

    Raises:
        ConfigError: the file, a name, a recipe or a reference is wrong.
    """
    bare: PipelineConfig = load_config(PipelineConfig, path, [*overrides, "stages=[]"])
    plain = read_plain(path, overrides).get("stages")
    if problems := [*stage_problems(plain), *secret_problems(bare)]:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    assert isinstance(plain, list), "stage_problems saw a list"
    folder = kept_path(bare.run.root, name=bare.run.name, seed=bare.run.seed)
    places = {
        stage["name"]: {result: str(folder / "stages" / stage["name"] / file) for result, file in found.items()}
        for stage in plain
        if (found := RESULTS[stage["recipe"]])
    }
    config: PipelineConfig = load_config(PipelineConfig, path, [*overrides, f"stage={json.dumps(places)}"])
    stages = []
    for settings in config.stages:
        own = folder / "stages" / settings.name
        results = {result: own / file for result, file in RESULTS[settings.recipe].items()}
        given = {"run.seed": config.run.seed, **settings.settings}
        forced = {"recipe": settings.recipe, "run.name": settings.name, "run.root": str(own / "runs")}
        if output := _OUTPUTS.get(settings.recipe):
            (forced[output],) = (str(path) for path in results.values())
        if clash := sorted(forced.keys() & settings.settings.keys()):
            raise ConfigError(f"{path}: stage {settings.name!r} sets {', '.join(clash)}, which the pipeline decides")
        lines = tuple(f"{key}={json.dumps(value)}" for key, value in {**given, **forced}.items())
        stages.append(Stage(settings.name, settings.recipe, settings.config, lines, own, results))
    if config.run.until and config.run.until not in places:
        raise ConfigError(f"{path}: run.until is {config.run.until!r}, the stages are {', '.join(places)}")
    return Pipeline(config, folder, tuple(stages))


def require_startable(pipeline: Pipeline) -> dict[str, Any]:
    """Check every stage's settings, code and files as far as they are there, before the first one runs.

    Returns:
        Stage -> its configuration.

    Raises:
        ConfigError: settings that a stage would refuse, or inputs that are missing and that no earlier stage makes.
    """
    made: set[str] = set()
    problems: list[str] = []
    configs: dict[str, Any] = {}
    for stage in pipeline.stages:
        code_path(stage.config)
        config = configs[stage.name] = stage.load(check=_CHECKS[stage.recipe])
        if not isinstance(config, RewardModelConfig):
            problems += [f"stage {stage.name!r}: {said}" for said in object_problems(config)]
        for setting, path in inputs(config):
            if path not in made and not Path(path).exists():
                problems.append(f"stage {stage.name!r}: {setting} is {path}, which is not there: make or correct it")
        made |= {str(path) for path in stage.results.values()}
    if problems:
        raise ConfigError("; ".join(problems))
    return configs


def tracked(tracking: TrackingSettings, *, root: Path, parent: str) -> tuple[str, ...]:
    """Overrides by which a stage's MLflow run is a part of the pipeline's."""
    uri = tracking.uri or f"sqlite:///{root / 'mlflow.db'}"
    values = {**dataclasses.asdict(tracking), "uri": uri, "parent": parent}
    return tuple(f"tracking.{name}={json.dumps(value)}" for name, value in values.items())


# ---- what was done before -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageState:
    """What `stage.json` holds.

    Attributes:
        made_from: hash of the stage's settings and inputs.
        earlier: names of run folders that were there when this was begun; they are of something else.
        outputs: result -> hash of its content; empty until the stage is done.
        wall_s: of all attempts.
    """

    made_from: str
    earlier: list[str] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    wall_s: float = 0.0


def read_state(stage: Stage) -> StageState | None:
    """None where the stage was never begun, or where it cannot be known: then it begins anew."""
    try:
        return StageState(**json.loads((stage.folder / "stage.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_state(stage: Stage, state: StageState) -> None:
    write_json_atomic(stage.folder / "stage.json", dataclasses.asdict(state))


def made_from(stage: Stage, config: object, contents: Contents) -> str:
    """One hash of a stage's settings (`config`, as it was loaded) and inputs, which are there.

    Raises:
        RunFolderError: one is not.
    """
    settings = {"recipe": stage.recipe, "config": config}
    return fingerprint(settings, contents=contents, leave_out=_DECIDES_NOTHING)


def is_done(stage: Stage, state: StageState | None, wanted: str, contents: Contents) -> bool:
    """Whether the stage was made from what it is made from today, and left what lies there."""
    if state is None or state.made_from != wanted or state.outputs.keys() != stage.results.keys():
        return False
    try:
        return all(contents.digest(path) == state.outputs[name] for name, path in stage.results.items())
    except RunFolderError:
        return False


def begin(stage: Stage, state: StageState | None, wanted: str) -> tuple[StageState, Path | None]:
    """Begin a stage, or go on with it: (its state, the run folder to resume)."""
    stage.runs.mkdir(parents=True, exist_ok=True)
    found = sorted(path.parent for path in stage.runs.glob("*/run.json"))
    if state is None or state.made_from != wanted:
        _remove_results(stage)
        state = StageState(wanted, earlier=[path.name for path in found])
        write_state(stage, state)
        return state, None
    own = [path for path in found if path.name not in state.earlier]
    return state, max(own, key=lambda path: path.stat().st_mtime, default=None)


def collect(stage: Stage, state: StageState, contents: Contents) -> StageState:
    """Put a finished stage's results where later stages look for them, and write down that it is done.

    Raises:
        RunFolderError: the recipe ended well and left nothing.
    """
    run = latest_run(stage, state)
    for name, place in stage.results.items():
        source = {"rl": run / "model", "evaluate": run / "report.json"}.get(stage.recipe)
        if source is not None:
            _remove(place)
            place.symlink_to(os.path.relpath(source, place.parent))
        if not place.exists():
            raise RunFolderError(f"stage {stage.name!r} ended and left no {name} at {place}: look at {run}")
    outputs = {name: contents.digest(path) for name, path in stage.results.items()}
    done = dataclasses.replace(state, outputs=outputs)
    write_state(stage, done)
    return done


def latest_run(stage: Stage, state: StageState) -> Path:
    """The run folder that the stage was made in. Raises RunFolderError: there is none."""
    own = [path.parent for path in stage.runs.glob("*/run.json") if path.parent.name not in state.earlier]
    if not own:
        raise RunFolderError(f"stage {stage.name!r} has no run folder below {stage.runs}: delete {stage.folder}")
    return max(own, key=lambda path: path.stat().st_mtime)


def _remove_results(stage: Stage) -> None:
    for place in stage.results.values():
        _remove(place)


def _remove(place: Path) -> None:
    if place.is_symlink() or place.is_file():
        place.unlink()
    elif place.is_dir():
        shutil.rmtree(place)


# ---- what it came to ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gain:
    """One line of the table at the end.

    Attributes:
        level: what the stage's result is worth, in words.
        change: over what there was before, in points with interval; empty where there is nothing to compare with.
    """

    stage: str
    recipe: str
    level: str
    change: str
    wall_s: float


def gains(pipeline: Pipeline, states: Mapping[str, StageState]) -> list[Gain]:
    """Each stage's gain: of policies as the evaluation stages measured them, of others in their own figures.

    Policies that were evaluated and that no stage made come first.
    """
    measured: dict[str, tuple[str, str]] = {}
    made = {str(stage.results["model"]) for stage in pipeline.stages if "model" in stage.results}
    lines = []
    for stage in pipeline.stages:
        if stage.recipe == "evaluate" and stage.name in states:
            report = _read(latest_run(stage, states[stage.name]) / "report.json")
            measured |= (found := _measured(report))
            lines += [Gain(f"({n})", "", *found[p], 0.0) for n, p in report["policies"].items() if p not in made]
    for stage in pipeline.stages:
        if stage.name not in states:
            continue
        state = states[stage.name]
        level, change = measured.get(str(stage.results.get("model")), ("", ""))
        if not level:
            level = _own_words(stage, latest_run(stage, state))
        lines.append(Gain(stage.name, stage.recipe, level, change, state.wall_s))
    return lines


def _measured(report: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Path of a policy -> (its level, its gain) on every set."""
    found = {}
    for name, path in report["policies"].items():
        levels, changes = report["levels"][name], report["gains"].get(name, {})
        level = ", ".join(f"{heldout} {side['accuracy']['all']:.1%}" for heldout, side in levels.items())
        change = ", ".join(points(side["accuracy"]) for side in changes.values())
        found[path] = (level, change)
    return found


def points(change: Mapping[str, Any]) -> str:
    """A change of a share, in points, with its interval."""
    low, high = change["ci95"]
    return f"{100 * change['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _own_words(stage: Stage, run: Path) -> str:
    if stage.recipe == "reward_model":
        figures = _read(run / "calibration.json").get("heldout", {})
        return ", ".join(
            f"{words} {figures[key]:.0%}"
            for key, words in (
                ("sign_accuracy", "right side"),
                ("consistency", "consistent"),
                ("failure_rate", "unreadable"),
            )
            if figures.get(key) is not None
        )
    if stage.recipe == "curate":
        counts = _read(run / "report.json")["all"]
        return f"kept {counts['kept']} of {counts['records']}"
    if stage.recipe == "distil":
        counts = _read(run / "report.json")["turns"]
        return f"kept {counts['kept']} of {sum(counts.values())} turns"
    if stage.recipe == "evaluate":
        return f"{len(_read(run / 'report.json')['policies'])} policies"
    return "not evaluated"


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path} cannot be read ({error}): delete its stage's folder to make it again") from error
