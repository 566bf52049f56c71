"""`rlaudio train FILE` with `recipe: pipeline`: its stages in order; started again, it goes on where it was."""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rlaudio.config_loader import code_path, to_yaml
from rlaudio.config_stages import PipelineConfig
from rlaudio.errors import ConfigError, RlaudioError
from rlaudio.fingerprint import Contents
from rlaudio.preflight import check_platform, check_shm, check_versions, check_writable
from rlaudio.recipes.pipeline import (
    Gain,
    Pipeline,
    Stage,
    StageState,
    begin,
    collect,
    gains,
    is_done,
    made_from,
    read_pipeline,
    read_state,
    require_startable,
    tracked,
    write_state,
)
from rlaudio.runs import RunFolder, keep_run, write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from rlaudio.recipes.kept import Kept

RunStage = Callable[..., int]
"""(config path, overrides, resume=run folder or None, kept=Kept) -> exit code: `recipe_command`."""


def pipeline_command(config_path: str, overrides: Sequence[str], *, resume: str | None, run_stage: RunStage) -> int:
    """Run what is not done. Returns the exit code of the stage that failed, else 0; raises RlaudioError on failures.

    Args:
        resume: the pipeline's folder, if it is named at all: a pipeline goes on by being started again.
        run_stage: runs one stage.
    """
    from rlaudio.recipes.kept import Kept

    check_platform()
    check_versions()
    code_path(config_path)
    pipeline = read_pipeline(config_path, list(overrides))
    if resume and Path(resume).absolute() != pipeline.folder:
        raise ConfigError(
            f"--resume is {resume}, and this pipeline is kept in {pipeline.folder}: leave --resume out, a pipeline "
            "goes on by being started again; another run.name begins another one"
        )
    configs = require_startable(pipeline)
    check_writable(pipeline.config.run.root, setting="run.root")
    check_shm()
    config = pipeline.config
    again = shlex.join(["rlaudio", "train", config_path, *overrides])
    with keep_run(config.run.root, name=config.run.name, seed=config.run.seed, config=config_path) as folder:
        write_text_atomic(folder.config_yaml, to_yaml(config))
        with _Parent(config, folder) as parent, contextlib.closing(Kept()) as kept:
            code, states = _run_stages(pipeline, configs, parent, run_stage=run_stage, again=again, kept=kept)
            lines = gains(pipeline, states)
            write_json_atomic(folder.report_json, {"stages": [_plain(line) for line in lines]})
            parent.succeeded = code == 0
            parent.keep(folder.report_json)
    print_gains(lines)
    print(f"run: {folder.path}")
    return code


def _run_stages(
    pipeline: Pipeline,
    configs: Mapping[str, object],
    parent: "_Parent",
    *,
    run_stage: RunStage,
    again: str,
    kept: "Kept",
) -> tuple[int, dict[str, StageState]]:
    """(exit code, what is done)."""
    contents = Contents(pipeline.folder / "contents.json")
    states: dict[str, StageState] = {}
    for number, stage in enumerate(pipeline.stages, start=1):
        if states and next(reversed(states)) == pipeline.config.run.until:
            print(f"run.until={pipeline.config.run.until}: go on with another one, or with none", flush=True)
            break
        wanted = made_from(stage, configs[stage.name], contents)
        state = read_state(stage)
        title = f"== {stage.name} ({stage.recipe}), {number} of {len(pipeline.stages)}"
        if is_done(stage, state, wanted, contents):
            assert state is not None
            print(f"{title}: done before, {state.wall_s:.0f} s", flush=True)
            states[stage.name] = state
            continue
        state, unfinished = begin(stage, state, wanted)
        print(f"{title}{': going on with ' + str(unfinished) if unfinished else ''}", flush=True)
        started = time.monotonic()
        is_last = number == len(pipeline.stages) or stage.name == pipeline.config.run.until
        kept.begin(configs[stage.name], then=None if is_last else configs[pipeline.stages[number].name])
        try:
            code = run_stage(
                stage.config,
                [*stage.overrides, *parent.overrides()],
                resume=str(unfinished) if unfinished else None,
                kept=kept,
            )
        except RlaudioError:
            _say_again(stage, again)
            raise
        finally:
            state = replace(state, wall_s=state.wall_s + time.monotonic() - started)
            write_state(stage, state)
        if code:
            _say_again(stage, again)
            return code, states
        states[stage.name] = collect(stage, state, contents)
        contents.save()
    return 0, states


def _say_again(stage: Stage, again: str) -> None:
    print(f"the pipeline stopped in stage {stage.name!r}; go on with: {again}", file=sys.stderr, flush=True)


def print_gains(lines: Sequence[Gain]) -> None:
    table = Table("stage", "recipe", "on held-out dialogues, or its own figures", "gain in points (95 %)", "minutes")
    for line in lines:
        table.add_row(line.stage, line.recipe, line.level, line.change, f"{line.wall_s / 60:.1f}")
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _plain(line: Gain) -> dict[str, object]:
    return {
        "stage": line.stage,
        "recipe": line.recipe,
        "level": line.level,
        "gain": line.change,
        "wall_s": round(line.wall_s, 1),
    }


class _Parent:
    """The pipeline's own MLflow run, of which every stage's is a child. MLflow that is not there stops nothing."""

    def __init__(self, config: PipelineConfig, folder: RunFolder) -> None:
        self._tracking, self._root = config.tracking, folder.path.parent
        self._folder, self._backend, self.succeeded = folder, None, False
        if not config.tracking.mlflow:
            return
        from rlaudio.observe.mlflow_backend import MlflowBackend

        try:
            self._backend = MlflowBackend(
                uri=config.tracking.uri or f"sqlite:///{self._root / 'mlflow.db'}",
                experiment=config.tracking.experiment,
                run_name=folder.path.name,
                run_folder=folder.path,
                artifacts=self._root / "mlflow_artifacts",
            )
        except Exception as error:  # whatever a tracking server or its client raises
            print(f"warning: no MLflow run for the pipeline ({error}): stages have runs of their own", file=sys.stderr)

    def overrides(self) -> tuple[str, ...]:
        return tracked(self._tracking, root=self._root, parent=self._backend.run_id if self._backend else "")

    def keep(self, path: Path) -> None:
        self._quietly(lambda backend: backend.artifact(path))

    def __enter__(self) -> "_Parent":
        return self

    def __exit__(self, *_: object) -> None:
        self._quietly(lambda backend: backend.close("FINISHED" if self.succeeded else "FAILED"))

    def _quietly(self, call: Callable[..., None]) -> None:
        if self._backend is None:
            return
        try:
            call(self._backend)
        except Exception as error:  # as above
            print(f"warning: MLflow: {error}", file=sys.stderr)
