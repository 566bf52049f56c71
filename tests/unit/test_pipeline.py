"""A pipeline's stages without their training: order, references, what is done again, and what is refused at once.

The stages are files that are hashed: a stage's result says what it was made from, so equal results were made alike.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlaudio.cli.pipeline import pipeline_command
from rlaudio.config_loader import load_config
from rlaudio.errors import ConfigError, LearnerError
from rlaudio.fingerprint import Contents, fingerprint, inputs
from rlaudio.recipes.kept import Kept
from rlaudio.recipes.pipeline import SCHEMAS, read_pipeline
from rlaudio.runs import create_run, open_run

ORDER = ["mid", "cold", "judge", "curation", "joint", "evaluation"]
MOMENTS = 3
"""Of a stage: before its run folder is there, in its middle, and when its result lies there but nobody knows."""


_LOADED: dict[Any, Any] = {}


def loaded_once(schema: type[Any], path: str, overrides: Sequence[str] = (), *, check: Any = None) -> Any:
    """As `load_config`, which takes a tenth of a second for an RL run: these tests start pipelines again and again."""
    key = (schema, str(path), Path(path).read_bytes(), tuple(overrides), check)
    if key not in _LOADED:
        _LOADED[key] = load_config(schema, path, overrides, check=check)
    return copy.deepcopy(_LOADED[key])


@pytest.fixture(autouse=True)
def _loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaudio.recipes.pipeline.load_config", loaded_once)


class Killed(BaseException):
    """SIGKILL of the pipeline's process."""


class FakeStages:
    """What recipes do: run folders, work that can be cut off and gone on with, results.

    Args:
        dies_at: (stage, moment).
    """

    def __init__(self, dies_at: tuple[str, int] | None = None, *, fails: str = "") -> None:
        self._dies_at, self._fails = dies_at, fails
        self.ran: list[tuple[str, bool]] = []
        self.parents: set[str] = set()

    def __call__(self, config_path: str, overrides: Sequence[str], *, resume: str | None, kept: Kept) -> int:
        recipe = next(json.loads(line[7:]) for line in overrides if line.startswith("recipe="))
        config = loaded_once(SCHEMAS[recipe], config_path, overrides)
        self.ran.append((config.run.name, resume is not None))
        self.parents.add(config.tracking.parent)
        self._maybe_die(config.run.name, 0)
        if self._fails == config.run.name:
            raise LearnerError("the loss is not finite")
        made = open_run(resume) if resume else create_run(config.run.root, name=config.run.name, seed=config.run.seed)
        with made as folder:
            (folder.path / "half").write_text((folder.path / "half").read_text() if resume else "new")
            self._maybe_die(config.run.name, 1)
            self._leave(recipe, config, folder.path, text=self._made_from(config))
        self._maybe_die(config.run.name, 2)
        return 0

    def _maybe_die(self, stage: str, moment: int) -> None:
        if self._dies_at == (stage, moment):
            raise Killed

    def _made_from(self, config: Any) -> str:
        contents = [name + Contents().digest(path) for name, path in inputs(config)]
        return hashlib.sha256(json.dumps([config.run.seed, *contents]).encode()).hexdigest()

    def _leave(self, recipe: str, config: Any, run: Path, *, text: str) -> None:
        if recipe == "curate":
            Path(config.curation.output).write_text(text)
            (run / "report.json").write_text(json.dumps({"all": {"kept": 7, "records": 9}}))
            return
        if recipe == "evaluate":
            side = {"accuracy": {"all": 0.5}}
            names = list(config.policies)
            gain = {"accuracy": {"mean": 0.1, "ci95": [0.05, 0.15]}}
            levels, gains = {n: {"heldout": side} for n in names}, {n: {"heldout": gain} for n in names[1:]}
            report = {"policies": config.policies, "levels": levels, "gains": gains, "made_from": text}
            (run / "report.json").write_text(json.dumps(report))
            return
        out = run / "model" if recipe == "rl" else Path(config.run.output)
        out.mkdir(exist_ok=True)
        (out / "weights").write_text(text)
        (run / "calibration.json").write_text(json.dumps({"heldout": {"sign_accuracy": 0.88}}))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Files of every stage; code in them is found in the repository's own classes."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "weights").write_text("start")
    for name in ("mid", "cold", "pairs", "train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    learner = {"num_cpus": 1}
    rl = {
        "run": {"name": "x"},
        "model": {"path": "start"},
        "data": {"train": "train.jsonl", "clips": ".", "heldout": {"heldout": "heldout.jsonl"}},
        "rewards": {"sources": [{"name": "verified", "judge": "rlaudio.rewards.verified:VerifiedReward"}]},
    }
    sft = {"run": {"name": "x", "output": "x"}, "model": {"path": "start"}, "learner": learner}
    files = {
        "mid.yaml": {"recipe": "sft", **sft, "phases": [{"name": "a", "data": "mid.jsonl", "steps": 3}]},
        "cold.yaml": {"recipe": "sft", **sft, "phases": [{"name": "a", "data": "cold.jsonl", "steps": 3}]},
        "judge.yaml": {"recipe": "reward_model", **sft, "phases": [{"name": "a", "data": "pairs.jsonl", "steps": 3}]},
        "rl.yaml": rl,
    }
    for name, settings in files.items():
        (tmp_path / name).write_text(json.dumps(settings))
    write(tmp_path)
    return tmp_path


def stages() -> list[dict[str, Any]]:
    cold, judge, joint = "${stage.cold.model}", "${stage.judge.model}", "${stage.joint.model}"
    policies = {"start": "start", "mid": "${stage.mid.model}", "cold": cold, "joint": joint}
    rl = {"model.path": cold, "data.train": "${stage.curation.records}", "rewards.judge_model.path": judge}
    return [
        {"name": "mid", "recipe": "sft", "config": "mid.yaml"},
        {"name": "cold", "recipe": "sft", "config": "cold.yaml", "settings": {"model.path": "${stage.mid.model}"}},
        {"name": "judge", "recipe": "reward_model", "config": "judge.yaml"},
        {"name": "curation", "recipe": "curate", "config": "rl.yaml", "settings": {"model.path": cold}},
        {"name": "joint", "recipe": "rl", "config": "rl.yaml", "settings": rl},
        {"name": "evaluation", "recipe": "evaluate", "config": "rl.yaml", "settings": {"policies": policies}},
    ]


def write(world: Path, *, written: Any = None, **changes: Any) -> None:
    file = {
        "recipe": "pipeline",
        "run": {"name": "all", "seed": 3},
        "tracking": {"mlflow": False},
        "stages": stages() if written is None else written,
    }
    (world / "pipeline.yaml").write_text(json.dumps({**file, **changes}))


def start(world: Path, fake: FakeStages, *overrides: str) -> int:
    return pipeline_command(str(world / "pipeline.yaml"), overrides, resume=None, run_stage=fake)


def results(world: Path, *names: str) -> dict[str, str]:
    files = {"curation": "records.jsonl", "evaluation": "report.json"}
    folder = world / "runs" / "all-seed3" / "stages"
    return {name: (folder / name / files.get(name, "model/weights")).read_text() for name in names}


def test_killed_in_every_stage_the_results_are_those_of_one_go(world: Path) -> None:
    """One stage of each way in which results are left; all of it in one pipeline, killed again and again."""
    order = ["judge", "curation", "joint", "evaluation"]
    judge, start_policy = {"rewards.judge_model.path": "${stage.judge.model}"}, {"start": "start"}
    settings = {
        "curation": {"run.seed": 1},
        "joint": {"data.train": "${stage.curation.records}", **judge},
        "evaluation": {"policies": {**start_policy, "joint": "${stage.joint.model}"}},
    }
    chosen = [stage | {"settings": settings.get(stage["name"], {})} for stage in stages() if stage["name"] in order]
    write(world, written=chosen)
    whole = FakeStages()
    assert start(world, whole) == 0
    assert whole.ran == [(name, False) for name in order]
    wanted = results(world, *order)
    (world / "runs").rename(world / "whole")
    for place, stage in enumerate(order):
        for moment in range(MOMENTS):
            killed = FakeStages((stage, moment))
            with pytest.raises(Killed):
                start(world, killed)
            # Of the stage before nobody knew that it was done; what has a run folder is gone on with.
            before = [(order[place - 1], True)] if place and moment == 0 else []
            assert killed.ran == [*before, (stage, moment > 1)], (stage, moment)
    last = FakeStages()
    assert start(world, last) == 0 and last.ran == [(order[-1], True)]
    assert results(world, *order) == wanted
    for stage in order:
        (run,) = (world / "runs" / "all-seed3" / "stages" / stage / "runs").iterdir()
        assert (run / "half").read_text() == "new", "one run folder, gone on with"
    nothing = FakeStages()
    assert start(world, nothing) == 0 and nothing.ran == []


def test_the_table_has_a_line_and_a_gain_for_every_stage(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(world, FakeStages())
    (_, *lines) = json.loads((world / "runs" / "all-seed3" / "report.json").read_text())["stages"]
    told = {line["stage"]: (line["level"], line["gain"]) for line in lines}
    gain = "+10.0 (+5.0 to +15.0)"
    assert told == {
        "mid": ("heldout 50.0%", gain), "cold": ("heldout 50.0%", gain), "joint": ("heldout 50.0%", gain),
        "judge": ("right side 88%", ""), "curation": ("kept 7 of 9", ""), "evaluation": ("4 policies", ""),
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*ORDER, "(start)", gain))


def test_what_changed_is_repeated_with_what_it_concerns(world: Path) -> None:
    start(world, FakeStages())

    def ran_after(path: Path, text: str, *overrides: str) -> list[str]:
        path.write_text(text)
        fake = FakeStages()
        start(world, fake, *overrides)
        return [name + " resumed" * resumed for name, resumed in fake.ran]

    assert ran_after(world / "cold.jsonl", "cold") == [], "touched, and the same"
    assert ran_after(world / "pairs.jsonl", "other") == ["judge", "joint", "evaluation"]
    assert ran_after(world / "mid.jsonl", "other") == ["mid", "cold", "curation", "joint", "evaluation"]
    other = "stages[2].settings={run.seed: 9}"
    assert ran_after(world / "pairs.jsonl", "other", other) == ["judge", "joint", "evaluation"]
    model = world / "runs" / "all-seed3" / "stages" / "cold" / "model" / "weights"
    # Its run is whole and only has to leave its result again, which is as before: nothing behind it is repeated.
    assert ran_after(model, "tampered with", other) == ["cold resumed"]


def test_it_stops_where_it_is_told_to_and_goes_on_from_there(world: Path) -> None:
    def ran(*overrides: str) -> list[str]:
        fake = FakeStages()
        assert start(world, fake, *overrides) == 0
        return [name for name, _ in fake.ran]

    assert ran("run.until=cold") == ORDER[:2]
    assert ran("run.until=cold") == []
    assert ran("run.until=curation") == ORDER[2:4]
    assert ran() == ORDER[4:]
    assert "run.until is 'nowhere', the stages are mid, cold" in refused(world, "run.until=nowhere", began=True)


def test_a_half_done_stage_of_other_settings_is_not_gone_on_with(world: Path) -> None:
    with pytest.raises(Killed):
        start(world, FakeStages(("cold", 1)))
    fake = FakeStages()
    start(world, fake, "stages[1].settings.phases=[{name: a, data: cold.jsonl, steps: 4}]")
    assert fake.ran[0] == ("cold", False)


def test_a_stage_that_fails_ends_the_pipeline_and_says_how_to_go_on(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LearnerError):
        start(world, FakeStages(fails="judge"))
    said = capsys.readouterr().err
    assert "stopped in stage 'judge'; go on with: rlaudio train" in said
    fake = FakeStages()
    start(world, fake)
    assert [name for name, _ in fake.ran] == ORDER[2:]


# ---- what is refused before anything runs -------------------------------------------------------------------------


def refused(world: Path, *overrides: str, began: bool = False) -> str:
    fake = FakeStages()
    with pytest.raises(ConfigError) as caught:
        start(world, fake, *overrides)
    assert fake.ran == [], "nothing ran"
    assert (world / "runs").exists() == began
    return str(caught.value)


@pytest.mark.parametrize(
    ("index", "settings", "said"),
    [
        (1, {"model.path": "${stage.mdi.model}"}, r"stages[1] refers to ${stage.mdi.model}: did you mean 'mid'?"),
        (1, {"model.path": "${stage.joint.model}"}, "which is made later: put stage 'joint' before it"),
        (1, {"model.path": "${stage.cold.model}"}, "which is made later"),
        (4, {"data.train": "${stage.curation.model}"}, "stage 'curation' (curate) leaves records"),
        (4, {"algorithm.group_sise": 4}, "stage 'joint'"),
        (4, {"algorithm.group_size": 0}, "algorithm.group_size"),
        (4, {"data.train": "nowhere.jsonl"}, "nowhere.jsonl, which is not there"),
        (3, {"curation.keep": [9, 3]}, "stage 'curation'"),
        (0, {"run.output": "elsewhere"}, "stage 'mid' sets run.output, which the pipeline decides"),
        (4, {"dialogue.user": "rlaudio.dialogue.users:ScriptedUsr"}, "ScriptedUser"),
    ],
)
def test_a_bad_stage_is_told_of_before_the_first_one_runs(
    world: Path, index: int, settings: dict[str, Any], said: str
) -> None:
    changed = stages()
    changed[index]["settings"] = {**changed[index].get("settings", {}), **settings}
    write(world, written=changed)
    assert said in refused(world)


def test_names_and_recipes(world: Path) -> None:
    changed = stages()
    changed[1]["name"], changed[2]["recipe"], changed[3]["name"] = "mid", "reward", "a b"
    write(world, written=changed)
    told = refused(world)
    assert "stages[1].name is 'mid', as that of an earlier stage" in told
    assert "stages[2].recipe is 'reward': did you mean 'reward_model'?" in told
    assert "stages[3].name is 'a b'" in told
    write(world, written=[])
    assert "stages is empty" in refused(world)
    write(world, written=[{"name": "mid"}])
    assert "stages[0] needs name, recipe and config" in refused(world)


def test_results_lie_in_the_pipeline_s_own_folder(world: Path) -> None:
    pipeline = read_pipeline(str(world / "pipeline.yaml"))
    joint = next(stage for stage in pipeline.stages if stage.name == "joint").load()
    folder = pipeline.folder / "stages"
    assert joint.data.train == str(folder / "curation" / "records.jsonl")
    assert joint.rewards.judge_model.path == str(folder / "judge" / "model")
    assert joint.run.seed == 3 and joint.run.root == str(folder / "joint" / "runs")


# ---- fingerprints -------------------------------------------------------------------------------------------------


def test_a_fingerprint_knows_contents_and_not_places(tmp_path: Path) -> None:
    def of(folder: str, text: str, **settings: Any) -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        (place / "train.jsonl").write_text(text)
        config: Any = SCHEMAS["rl"]()
        config.run.name = config.model.path = config.data.clips = ""
        config.data.train, config.data.clips, config.run.root = str(place / "train.jsonl"), folder, folder
        for name, value in settings.items():
            setattr(config.algorithm, name, value)
        return fingerprint(config, contents=Contents())

    assert of("a", "x") == of("b", "x")
    assert len({of("a", "x"), of("a", "y"), of("a", "x", epochs=2)}) == 3


def test_what_is_remembered_of_a_file_ends_with_its_change(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache.json"
    file.write_text("one")
    first = Contents(cache)
    before = first.digest(file)
    first.save()
    assert Contents(cache).digest(file) == before
    file.write_text("three")
    assert Contents(cache).digest(file) != before
    cache.write_text("{broken")
    assert Contents(cache).digest(file) != before


def test_every_stage_says_what_comes_after_it_so_that_engines_can_be_left(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, str]] = []
    ended: list[str] = []

    def begin(self: Kept, stage: Any, *, then: Any) -> None:
        begun.append((stage.run.name, then.run.name if then else ""))

    monkeypatch.setattr(Kept, "begin", begin)
    monkeypatch.setattr(Kept, "close", lambda self: ended.append("closed"))
    with pytest.raises(LearnerError):
        start(world, FakeStages(fails="cold"))
    assert begun == [("mid", "cold"), ("cold", "judge")] and ended == ["closed"]
    begun.clear()
    assert start(world, FakeStages(), "run.until=joint") == 0
    assert begun == [("cold", "judge"), ("judge", "curation"), ("curation", "joint"), ("joint", "")]
    begun.clear()
    assert start(world, FakeStages()) == 0
    assert begun == [("evaluation", "")] and ended == ["closed"] * 3
