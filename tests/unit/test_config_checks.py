"""What cannot be run is refused before anything starts: setting, value and way out, all of them at once."""

import asyncio
import copy
import dataclasses
import functools
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml

from rlaudio.cli.main import main
from rlaudio.config import (
    AlgorithmSettings,
    LearnerSettings,
    PhaseSettings,
    RunConfig,
    ScheduleSettings,
    SftConfig,
    SourceSettings,
)
from rlaudio.config_checks import CHOICES, RANGES, run_problems, sft_problems
from rlaudio.config_judges import JudgeConfig, RewardModelConfig
from rlaudio.config_loader import code_path, load_config
from rlaudio.config_objects import object_problems, record_problems
from rlaudio.doctor.rows import failures
from rlaudio.doctor.static import static_rows
from rlaudio.doctor.static.settings import problems_before_start
from rlaudio.errors import ConfigError, ResourceError
from rlaudio.preflight import check_writable
from rlaudio.recipes.sft import exported_if_cancelled
from rlaudio.types import AudioPart, Message, PromptRecord, RubricItem, TextPart

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples/quickstart/config.yaml"
POLICY = ROOT / "examples/quickstart/policy.yaml"


@functools.cache
def loaded(schema: type, path: Path) -> Any:
    return load_config(schema, path)


def changed(override: str) -> RunConfig:
    """The quickstart with one value set, without the cost of reading it again."""
    config: RunConfig = copy.deepcopy(loaded(RunConfig, QUICKSTART))
    key, _, value = override.partition("=")
    *path, last = re.findall(r"[^.\[\]]+", key)
    node: Any = config
    for part in path:
        node = node[int(part)] if part.isdecimal() else getattr(node, part)
    setattr(node, last, yaml.safe_load(value))
    return config


def run_complaint(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, QUICKSTART, overrides, check=run_problems)
    return str(caught.value)


def sft_complaint(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(SftConfig, POLICY, overrides, check=sft_problems)
    return str(caught.value)


# ---- every setting ------------------------------------------------------------------------------------------------


def numbers(schema: Any) -> Iterator[tuple[type, str]]:
    """(settings class, field) of every number below a schema."""
    for name, hint in get_type_hints(schema).items():
        for inner in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from numbers(inner)
            elif inner in (int, float) and get_origin(hint) is not list:
                yield schema, name


def test_every_number_of_a_configuration_has_a_range_or_a_reason_to_have_none() -> None:
    judged_with_others = {
        (AlgorithmSettings, name)
        for name in (
            *("clip_low", "clip_high", "mask_low", "mask_high"),
            *("overlong_max_tokens", "overlong_buffer_tokens"),
        )
    }
    chosen = {(LearnerSettings, "zero_stage")}
    free = {(SourceSettings, "weight"), (ScheduleSettings, "start")}  # below 0 it is a penalty
    ranged = {(schema, name) for schema, ranges in RANGES.items() for name in ranges}
    schemas = (RunConfig, SftConfig, JudgeConfig, RewardModelConfig)
    assert {number for schema in schemas for number in numbers(schema)} - ranged == judged_with_others | chosen | free


def test_ranges_and_choices_speak_of_settings_that_exist() -> None:
    for table in (RANGES, CHOICES):
        for schema, names in table.items():
            assert names.keys() <= {field.name for field in dataclasses.fields(schema)}


def test_the_examples_are_accepted() -> None:
    for config in (QUICKSTART, ROOT / "examples/step_audio_r1_5/config.yaml"):
        load_config(RunConfig, config, check=run_problems)
    load_config(SftConfig, POLICY, check=sft_problems)


def test_what_train_refuses_first_accepts_the_quickstart() -> None:
    code_path(QUICKSTART)
    load_config(RunConfig, QUICKSTART, check=problems_before_start)


BAD_VALUES = [
    *("algorithm.max_staleness=-1", "algorithm.epochs=0", "algorithm.groups_per_step=0", "algorithm.kl_coef=-1"),
    *("evaluation.bootstrap=0", "evaluation.max_dialogues=-5", "run.checkpoint_every=0", "run.steps=-4"),
    *("rollout.attempts=0", "rollout.actors=0", "learner.ranks=0", "learner.micro_batch_tokens=0", "learner.lr=-1"),
    *("dialogue.max_turns=0", "rewards.actors=0", "run.seed=-1", "sync.deadline_s=0", "learner.lr=.nan"),
    *("rewards.sources[0].weight=.inf", "rollout.engine.max_num_seqs=0", "rewards.judge_model.engine.kv_cache_mb=0"),
    *("dialogue.unclosed_thinking=typo", "doctor.on_failure=ignore", "model.dtype=half", "sync.swap=now"),
    *("sync.transport=pigeon",),
]


@pytest.mark.parametrize("override", BAD_VALUES)
def test_a_value_that_cannot_be_run_names_setting_value_and_way_out(override: str) -> None:
    setting, _, value = override.partition("=")
    (said,) = run_problems(changed(override))
    assert re.match(rf"{re.escape(setting)} is '?{re.escape(value.strip('.'))}'?: set ", said)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["algorithm.clip_low=-3"], "clip_low=-3"),
        (["algorithm.group_size=1"], "algorithm.group_size=1: grpo compares siblings"),
        (["learner.betas=[2,3]"], r"learner.betas is \[2.0, 3.0\]: set two numbers"),
        (["learner.betas=[0.9]"], "learner.betas"),
        (["learner.min_lr=1", "learner.decay_steps=9"], "learner.min_lr is 1 and learner.lr"),
        (["rewards.sources[1].name=verified"], r"sources\[0\] and rewards.sources\[1\] have one name, 'verified'"),
        (["rewards.sources[1].name=a/b"], r"rewards.sources\[1\].name is 'a/b'"),
        (["data.heldout.seed=x.jsonl"], "data.heldout.seed: report.json uses the name 'seed'"),
        (["data.heldout.throughput=x.jsonl"], "rename the set"),
        (["data.heldout.timings_s=x.jsonl"], "rename the set"),
        (["data.heldout={a/b: x.jsonl}"], "a set 'a/b'"),
        (["data.heldout=[]"], r"data.heldout = \[\] is not a mapping"),
        (["rewards.sources[7].weight=1"], r"has rewards.sources\[0\] to rewards.sources\[1\], there is no .*\[7\]"),
        (["sampling.max_new_tokens=320"], "no room for a prompt"),
        (["sync.swap=abort", "sync.keep_kv_cache=true"], "sync.keep_kv_cache is true and sync.swap abort"),
        (["sync.delta=true"], "sync.delta is on and model.dtype float32"),
    ],
)
def test_settings_at_odds_are_named(overrides: Sequence[str], named: str) -> None:
    assert re.search(named, run_complaint(*overrides))


def test_all_problems_are_listed_at_once() -> None:
    said = run_complaint("run.steps=-1", "algorithm.kl_estimator=k1", "learner.ranks=0", "rewards.sources=[]")
    for named in ("run.steps", "kl_estimator", "learner.ranks", "rewards.sources"):
        assert f"\n  - {named}" in said or f"\n  - algorithm.{named}" in said
    assert str(QUICKSTART) in said


@pytest.mark.parametrize("override", [*BAD_VALUES, "rewards.sources=[]", "learner.betas=[2,3]"])
def test_the_static_row_says_the_same_and_no_other_row_breaks_on_it(override: str) -> None:
    config = changed(override)
    row = next(row for row in static_rows(config) if row.name == "static_settings")
    assert row in failures([row])
    assert set(run_problems(config)) <= set(row.reason.split("; "))


# ---- supervised runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["phases=[]"], "phases is empty"),
        (["phases[0].steps=-1"], r"phases\[0\].steps is -1: set a number of at least 1"),
        (["phases[1].rows_per_step=-1"], r"phases\[1\].rows_per_step is -1"),
        (["phases[1].rows_per_step=0"], r"phases\[1\].rows_per_step is 0"),
        (["phases[2].name=encoder"], r"phases\[1\] and phases\[2\] have one name, 'encoder'"),
        (["phases[0].lm_weight=0"], r"phases\[0\]: lm_weight and ctc_weight are both 0"),
        (["phases[0].ctc_weight=1"], r"phases\[0\]: pseudo_audio has no sound"),
        (["learner.lr=3e-4"], r"learner.lr is 0.0003: a phase has its own, set phases\[0\].lr"),
        (["learner.micro_batch_tokens=0"], "learner.micro_batch_tokens is 0"),
        (["phases[9].steps=3"], r"phases has phases\[0\] to phases\[3\], there is no phases\[9\]"),
        (["phases[x].steps=3"], r"there is no phases\[x\]"),
        (["phases=[]", "phases[0].steps=3"], "phases is empty, there is no"),
    ],
)
def test_a_supervised_run_is_refused_as_early(overrides: Sequence[str], named: str) -> None:
    assert re.search(named, sft_complaint(*overrides))


def test_phases_made_by_code_are_checked_too() -> None:
    config = SftConfig(phases=[PhaseSettings(name="a", data="d", steps=1), PhaseSettings(name="a", data="d", steps=2)])
    assert [problem for problem in sft_problems(config) if "one name" in problem]


# ---- code that a configuration names ------------------------------------------------------------------------------


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "config_checks_code.py").write_text(
        textwrap.dedent("""
        class Voice:
            def __init__(self) -> None:
                raise OSError("no such speaker")
        class NeedsMore:
            def __init__(self, services, *, name, threshold): ...
        class Anything:
            def __init__(self, services, **options): ...
        text = "not a class"
        """)
    )
    (tmp_path / "config_checks_stopped.py").write_text("raise KeyboardInterrupt\n")
    return tmp_path


def objects(override: str) -> str:
    config = changed(override)
    if not override.startswith("evaluation.voice"):
        config.evaluation.voice = ""
    return "\n".join(object_problems(config))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        (
            "rewards.sources[0].options={corect_weight: 1}",
            r"sources\[0\].options.corect_weight is not an option of .*VerifiedReward: did you mean correct_weight\?",
        ),
        ("rewards.sources[0].options={name: x}", r"sources\[0\].options.name is not an option"),
        ("rewards.sources[0].options={services: x}", r"sources\[0\].options.services is not an option"),
        ("rewards.sources[0].judge=config_checks_code:NeedsMore", r"sources\[0\].judge: .*'threshold'"),
        ("rewards.sources[0].judge=config_checks_code:text", "a str: name a class"),
        ("rewards.sources[0].judge=config_checks_code:Gone", "Gone"),
        ("dialogue.user=rlaudio.rewards.verified:VerifiedReward", "dialogue.user is .* has no `move`"),
        ("dialogue.user=rlaudio.dialogue.player:DialoguePlayer", "dialogue.user: .* cannot be built"),
        (
            "dialogue.user=rlaudio.dialogue.simulated:SimulatedUser",
            "dialogue.user: .* cannot be built .*'voices'.* see dialogue.user_options",
        ),
        ("model.options={sise: 1}", "model.options.sise is not an option"),
        ("rewards.judge_model.family=no.such:Family", "rewards.judge_model.family: .*no module"),
        ("algorithm.name=config_checks_code:Gone", "algorithm.name: .*Gone"),
        ("evaluation.voice=config_checks_code:Voice", r"evaluation.voice: .*OSError: no such speaker"),
    ],
)
def test_code_and_options_are_bound_before_an_actor_does(user_code: Path, override: str, named: str) -> None:
    assert re.search(named, objects(override))


def test_code_that_can_be_built_is_accepted(user_code: Path) -> None:
    assert objects("rewards.sources[0].options={correct_weight: 1, unplayed: -1}") == ""
    anything = changed("rewards.sources[0].judge=config_checks_code:Anything")
    anything.rewards.sources[0].options = {"what": 1}
    anything.evaluation.voice = ""
    assert object_problems(anything) == []


# ---- records ------------------------------------------------------------------------------------------------------


def record(task: str = "t", turns: int = 1) -> PromptRecord:
    said = tuple(Message(role="user", parts=(TextPart("hello"),)) for _ in range(turns))
    return PromptRecord(id="r", task=task, messages=said)


def test_heldout_records_without_a_place_in_the_report_are_named() -> None:
    config = RunConfig()
    config.dialogue.max_turns = 2
    assert record_problems(config, {"h": [record(turns=2)]}) == []
    assert "task 'all'" in record_problems(config, {"h": [record("all")]})[0]
    (said,) = record_problems(config, {"h": [record(), record(turns=3)]})
    assert "dialogue.max_turns is 2" in said
    assert "set dialogue.max_turns=3" in said


JUDGE = "rlaudio.rewards.generative:GenerativeJudge"


def judged_by(**options: Any) -> RunConfig:
    config = RunConfig()
    config.rewards.sources = [
        SourceSettings("verified", "rlaudio.rewards.verified:VerifiedReward"),
        SourceSettings("judge", JUDGE, options=options),
    ]
    return config


def said_of(record: PromptRecord, **options: Any) -> list[str]:
    return record_problems(judged_by(**options), {}, [record])


def test_a_record_that_a_source_cannot_judge_is_named_before_anything_starts() -> None:
    bare = PromptRecord("r9", "t", (Message("user", (TextPart("hi"),)),))
    (said,) = said_of(bare)
    assert said.startswith("data.train: record 'r9': source 'judge': no turn has a `reference_response`")
    assert said_of(bare, reference="siblings") == said_of(bare, reference="policy") == []
    assert said_of(dataclasses.replace(bare, sources=("verified",))) == []
    whole = dataclasses.replace(bare, messages=(dataclasses.replace(bare.messages[0], reference_response="hello"),))
    assert said_of(whole) == []
    ruled = dataclasses.replace(whole.messages[0], reference_response=None, rubric=(RubricItem("kind"),))
    (said,) = said_of(dataclasses.replace(bare, messages=(*whole.messages, ruled)))
    assert "record 'r9'" in said and "rubric of 'hi' has no `reference_response`" in said


def test_a_judge_that_reads_needs_transcripts() -> None:
    sound = Message("user", (AudioPart("a.wav", "a" * 64, 16_000),), reference_response="hello")
    (said,) = said_of(PromptRecord("r9", "t", (sound,)))
    assert "record 'r9'" in said and "transcript" in said
    assert said_of(PromptRecord("r9", "t", (sound,)), hears="sound") == []


def test_an_unknown_source_is_named_with_the_nearest_and_many_records_are_one_sentence() -> None:
    records = [
        PromptRecord(f"r{n}", "t", (Message("user", (TextPart("hi"),)),), sources=("verifed",)) for n in range(3)
    ]
    said = record_problems(judged_by(), {"h": records})
    assert said[0] == "data.heldout.h: record 'r0' (and 2 more): its `sources` name 'verifed', did you mean 'verified'?"
    assert len(said) == 1


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rewards.judge_model.endpoint.url=http://h/v1"], "a path and an endpoint.url"),
        (["rewards.judge_model.path=''", "rewards.judge_model.endpoint.url=http://h/v1"], "endpoint.model is empty"),
        (["rewards.judge_model.path=''", "rewards.judge_model.endpoint.url=h:8000"], "endpoint.url is 'h:8000'"),
        (["rewards.judge_model.endpoint.attempts=0"], "endpoint.attempts is 0"),
        (["rewards.judge_model.endpoint.api_key=sk-1"], "api_key"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_refused(overrides: Sequence[str], named: str) -> None:
    assert re.search(named, run_complaint(*overrides))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["rewards.judge_model.endpoint={url: 'http://h/v1', model: m}"], "rewards.judge_model is an endpoint"),
        ([], "rewards.judge_model has no path"),
    ],
)
def test_a_frozen_policy_beside_no_served_judge_is_refused(overrides: Sequence[str], named: str) -> None:
    said = run_complaint("rewards.judge_model.path=''", "rewards.reference_model.path=here", *overrides)
    assert f"rewards.reference_model needs a judge that is served here, and {named}: serve one" in said


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rewards.sources[1].options={orders: bth}", "rewards.sources[1].options.orders is 'bth': did you mean both?"),
        ("rewards.sources[1].options={levels: 11}", "rewards.sources[1].options.levels is 11: set a whole number"),
        ("rewards.sources[1].options={phi: [1, 0]}", "rewards.sources[1].options.phi is [1, 0]: set 5 rising numbers"),
        ("rewards.sources[1].options={reference: policy}", "rewards.sources[1].options.reference is 'policy' and"),
        ("rewards.judge_model.path=''", "rewards.sources[1] ('judge') needs a judge model: set"),
    ],
)
def test_a_judges_options_are_looked_at_before_its_actor_starts(override: str, named: str) -> None:
    (said,) = objects(override).splitlines()
    assert said.startswith(named)


def test_a_key_in_an_address_is_refused_and_not_repeated() -> None:
    said = "; ".join(run_problems(changed("rewards.judge_model.endpoint.url=https://me:sk-secret@h/v1")))
    assert "without name or key" in said and "sk-secret" not in said


# ---- places and Ctrl-C --------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named_with_its_setting(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "runs", setting="run.root")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for place in (Path("/proc/x"), tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError, match=rf"run.root is {place}, and .* cannot be written"):
            check_writable(place, setting="run.root")


@pytest.mark.parametrize("command", ["doctor", "sft", "train"])
def test_ctrl_c_is_one_line_and_130(user_code: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    config = POLICY if command == "sft" else QUICKSTART
    assert main([command, str(config), "model.family=config_checks_stopped:Family"]) == 130
    assert capsys.readouterr().err.splitlines() == [f"stopped: rlaudio {command} wrote nothing more"]


async def test_a_cancelled_supervised_run_exports_whole_or_not_at_all(tmp_path: Path) -> None:
    said: list[str] = []

    async def export(path: Path) -> None:
        await asyncio.to_thread(path.mkdir)
        await asyncio.sleep(0.01)
        await asyncio.to_thread((path / "weights").write_text, "w")

    async def work() -> None:
        async with exported_if_cancelled(export, tmp_path / "stopped", say=said.append):
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(os.listdir, tmp_path) == ["stopped"]
    assert await asyncio.to_thread(os.listdir, tmp_path / "stopped") == ["weights"]
    assert len(said) == 1


def test_no_step_at_all_is_an_evaluation() -> None:
    config = copy.deepcopy(loaded(RunConfig, QUICKSTART))
    config.run.steps = 0
    assert run_problems(config) == []
