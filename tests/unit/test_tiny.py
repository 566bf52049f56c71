"""`--tiny`: only what size forces is replaced, everything replaced is told, and what cannot be shrunk says so."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rlaudio.audio.store import ClipStore
from rlaudio.cli.main import main
from rlaudio.cli.tiny import tiny_run
from rlaudio.config import RunConfig, SftConfig
from rlaudio.config_checks import sft_problems
from rlaudio.config_checks_judges import reward_model_problems
from rlaudio.config_judges import RewardModelConfig
from rlaudio.config_loader import load_config, to_yaml
from rlaudio.config_objects import require_records
from rlaudio.data.records import read_records, write_records
from rlaudio.data.run_data import RunData, read_data
from rlaudio.data.tiny import Wanted, hum, made_records
from rlaudio.dialogue.render import add_message
from rlaudio.dialogue.template import ChatTemplate, Context
from rlaudio.doctor.static.settings import problems_before_start
from rlaudio.errors import ConfigError, DataError
from rlaudio.models.families import open_family
from rlaudio.recipes.reward_model import read_judge_data
from rlaudio.recipes.tiny import Places, replacements
from rlaudio.rewards.levels import FIVE
from rlaudio.rewards.prompt import Comparison, JudgePrompt, Said
from rlaudio.types import AudioPart, Message, PromptRecord, TextPart

ROOT = Path(__file__).resolve().parents[2]
R15, AQA, OMNI = (
    ROOT / "examples" / name / "config.yaml" for name in ("step_audio_r1_5", "qwen2_audio_aqa", "qwen2_5_omni")
)

FORCED = """
    run.name run.steps run.ledger run.spool cluster model.path model.dtype data.train data.clips data.licenses
    sampling.max_new_tokens rollout.actors rollout.num_cpus rollout.num_gpus rollout.encoder_device rollout.engine
    rewards.actors rewards.num_cpus rewards.num_gpus rewards.judge_model
    algorithm.group_size algorithm.groups_per_step algorithm.minibatches
    algorithm.overlong_max_tokens algorithm.overlong_buffer_tokens
    learner.ranks learner.least_ranks learner.num_cpus learner.num_gpus learner.offload_optimizer
    learner.offload_parameters learner.reference learner.micro_batch_tokens
    sync.delta supervision.new_nodes autoscale evaluation.max_dialogues evaluation.bootstrap
    data.heldout data.mixture.path data.mixture.name
    rewards.sources.options.max_new_tokens rewards.sources.options.max_section_tokens
""".split()
"""What a CPU and a tiny checkpoint force, without the numbers of list entries: nothing else may differ."""

RECIPE = [  # of what a recipe is, much, and far from the defaults
    "algorithm.name=dapo",
    "algorithm.max_staleness=3",
    "algorithm.look_ahead=2",
    "algorithm.clip_high=0.3",
    "algorithm.credit=dialogue",
    "algorithm.overlong_max_tokens=2048",
    "algorithm.overlong_buffer_tokens=512",
    "algorithm.minibatches=4",
    "sync.swap=turn_ends",
    "sync.delta=true",
    "learner.offload_optimizer=cpu",
    "learner.warmup_steps=7",
    "rollout.encoder_device=cuda",
    "autoscale.rollout=[2, 8]",
    "data.train=''",
    "data.mixture=[{path: a/sound.jsonl, weight: 0.7}, {path: b/text.jsonl, weight: 0.3, name: words}]",
    "data.heldout={late: late.jsonl}",
    "data.licenses=[MIT]",
    "data.augment={share: 0.5, speed: [0.9, 1.1], keep: {rate: [rate]}}",
    "rewards.sources[0].only={tasks: [sums], axes: [memory]}",
    "rewards.sources[0].options={match: numeric, relative_tolerance: 0.1}",
    "rewards.sources[1].schedule={kind: linear, start: 0, begin: 20, end: 60}",
    "rewards.sources[1].options={levels: 7, max_disagreement: 2, max_section_tokens: 999}",
]


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Dotted name, without the numbers of list entries -> values."""
    if isinstance(value, dict):
        parts = [leaves(item, f"{key}.{name}".lstrip(".")) for name, item in value.items()]
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        parts = [leaves(item, key) for item in value]
    else:
        return {key: [value]}
    found: dict[str, Any] = {}
    for part in parts:
        for name, items in part.items():
            found[name] = [*found.get(name, []), *items]
    return found


def differing(one: object, other: object) -> set[str]:
    before, after = leaves(yaml.safe_load(to_yaml(one))), leaves(yaml.safe_load(to_yaml(other)))
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


def forced(name: str) -> bool:
    return any(f"{name}.".startswith(f"{one}.") for one in FORCED)


def made(config: Path, tmp_path: Path, *settings: str, given: Sequence[str] = ()) -> tuple[RunConfig, RunConfig, Path]:
    """(at full size, tiny, run folder); `settings` are as if the file had them, `given` as on the command line."""
    full = load_config(RunConfig, config, [*settings, *given, f"run.root={tmp_path}"], check=problems_before_start)
    small, folder = tiny_run(full, given, config_path=str(config), check=problems_before_start)
    with folder:
        return full, small, folder.path


def checked(config: RunConfig) -> RunData:
    data = read_data(config.data)
    require_records(config, data.heldout, data.train)
    return data


# ---- what is replaced ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "overrides"), [(R15, []), (R15, RECIPE), (AQA, []), (OMNI, [])], ids=["r1.5", "recipe", "aqa", "omni"]
)
def test_only_what_size_forces_is_replaced_and_all_of_it_is_told(
    config: Path, overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, small, folder = made(config, tmp_path, *overrides)
    changed = differing(full, small)
    assert {name for name in changed if not forced(name)} == set()
    told = {change["key"] for change in json.loads((folder / "tiny/replaced.json").read_text())["replaced"]}
    plain = {".".join(part.split("[")[0] for part in key.split(".")) for key in told}
    assert {name for name in changed if not any(f"{name}.".startswith(f"{key}.") for key in plain)} == set()
    printed = capsys.readouterr().out
    assert all(f"\n  {key}: " in printed for key in told)
    assert small.model.family == full.model.family and small.learner.zero_stage == full.learner.zero_stage
    assert checked(small).train
    assert load_config(RunConfig, folder / "config.yaml", check=problems_before_start) == small


def test_sources_mixture_and_schedules_of_the_file_are_those_of_the_tiny_run(tmp_path: Path) -> None:
    full, small, _ = made(R15, tmp_path, *RECIPE)
    assert [part.weight for part in small.data.mixture] == [0.7, 0.3]
    assert [part.name for part in small.data.mixture] == ["sound", "words"]
    for before, after in zip(full.rewards.sources, small.rewards.sources, strict=True):
        assert dataclasses.replace(after, options={}) == dataclasses.replace(before, options={})
    assert small.rewards.sources[1].options["levels"] == 7
    data = checked(small)
    # Every record of the first source's scope has its task, and is left to the source that can judge it.
    assert any(record.task == "sums" and "verified" in (record.sources or ["verified"]) for record in data.train)
    words = read_records(small.data.mixture[1].path)
    assert all(isinstance(part, TextPart) for record in words for one in record.messages for part in one.parts)


def test_settings_of_the_command_line_stay(tmp_path: Path) -> None:
    given = ["run.steps=5", "rollout.engine.max_num_seqs=3", "learner.ranks=2", "run.name=mine"]
    _, small, folder = made(R15, tmp_path, given=given)
    assert (small.run.steps, small.rollout.engine.max_num_seqs, small.learner.ranks) == (5, 3, 2)
    assert small.run.name == "mine" and folder.name.startswith("mine-tiny-")
    assert small.rollout.engine.kind == "in_process"


@pytest.mark.parametrize("config", [R15, AQA, OMNI], ids=["r1.5", "aqa", "omni"])
def test_the_policy_speaks_in_form_and_is_not_always_right(config: Path, tmp_path: Path) -> None:
    """So that a step has something to learn: of 12 replies to a question some can be read, and not all say the same."""
    _, small, _ = made(config, tmp_path)
    family, store = open_family(small.model), ClipStore(small.data.clips)
    record = checked(small).train[0]
    template = ChatTemplate(family.tokenizer, style=family.style)
    context = Context(template, keep_thinking=False)
    add_message(context, record.messages[0], family=family, clips=store)
    replies = sampled(family, context, store, count=12)
    parsed = [template.parse(ids) for ids in replies if ids[-1] in family.tokenizer.ids.stop]
    readable = [one.reply for one in parsed if one.thinking is not None and one.reply]
    assert len(readable) >= 2
    assert len(set(readable)) > 1


def sampled(family: Any, context: Context, store: ClipStore, *, count: int) -> list[list[int]]:
    module, prompt = family.load_module(dtype=torch.float32), context.prompt()
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([prompt.ids.tolist()] * count)
    spans = [(row, clip.start, clip.end) for row in range(count) for clip in prompt.clips]
    with torch.no_grad():
        states = [module.encode([family.mel(store.get(clip.sha256).samples)])[0] for clip in prompt.clips]
        for _ in range(24):
            logits = module.logits(module.forward(rows, states=states * count, spans=spans)[:, -1])
            logits[:, list(family.tokenizer.ids.banned)] = -torch.inf
            chosen = torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=generator)
            rows = torch.cat([rows, chosen], dim=1)
    stops, cut = family.tokenizer.ids.stop, []
    for row in rows[:, len(prompt.ids) :].tolist():
        ends = [index for index, token in enumerate(row) if token in stops]
        cut.append(row[: ends[0] + 1] if ends else row)
    return cut


def test_verdicts_of_the_judge_can_be_read_on_comparisons_it_was_not_fitted_to(tmp_path: Path) -> None:
    _, small, _ = made(R15, tmp_path)
    family = open_family(small.rewards.judge_model)
    module, prompt = family.load_module(dtype=torch.float32), JudgePrompt(family.tokenizer, style=family.style)
    said = (Said("user", "for train 3 my code is six"),)
    levels = []
    for response in ("okay six", "dog", "six your code heard", "yes", "bell rain"):
        ids = prompt.ids(Comparison(said, "your code is six", response), response_first=True).tolist()
        first = len(ids)
        with torch.no_grad():
            while len(ids) < first + 16 and (len(ids) == first or ids[-1] not in family.tokenizer.ids.stop):
                logits = module.logits(module.forward(torch.tensor([ids]), states=[], spans=[])[0, -1])
                logits[list(family.tokenizer.ids.banned)] = -torch.inf
                ids.append(int(logits.argmax()))
        levels.append(prompt.parse(ids[first:]))
    assert all(0 <= level < FIVE.num_levels for level in levels)


# ---- the file's own data ------------------------------------------------------------------------------------------


def own_data(folder: Path, *, long: int = 0, short: int = 20) -> list[PromptRecord]:
    store, records = ClipStore(str(folder)), []
    for index in range(long + short):
        clip = store.put(hum(f"own {index}"))
        text = "word " * 5000 if index < long else "name it"
        sound = AudioPart(store.uri(clip.sha256), clip.sha256, 16_000, transcript="what is this")
        message = Message("user", (sound, TextPart(text)), answer="bird", reference_response="a bird")
        records.append(PromptRecord(f"own-{index}", "birds", (message,)))
    write_records(folder / "own.jsonl", records)
    return records


def test_the_first_records_that_fit_are_copied_and_the_file_is_left_alone(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    records = own_data(own, long=2)
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    _, small, folder = made(R15, tmp_path / "runs", f"data.train={own}/own.jsonl", f"data.clips={own}")
    taken = checked(small).train
    assert taken == records[2:10]
    assert Path(small.data.clips).is_relative_to(folder)
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


def test_a_file_of_long_records_only_is_refused_by_name(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    own_data(own, long=3, short=0)
    with pytest.raises(DataError, match=r"own\.jsonl: none of 3 record\(s\) is short enough"):
        made(R15, tmp_path / "runs", f"data.train={own}/own.jsonl", f"data.clips={own}")


def test_made_sets_share_no_sound_and_no_words(tmp_path: Path) -> None:
    store = ClipStore(str(tmp_path))
    sets = [made_records(8, split=split, wanted=Wanted(), store=store) for split in ("train", "heldout-a", "heldout-b")]
    sounds = [
        {p.sha256 for r in some for m in r.messages for p in m.parts if isinstance(p, AudioPart)} for some in sets
    ]
    texts = [{tuple(message.text for message in record.messages) for record in some} for some in sets]
    for found in (sounds, texts):
        assert sum(map(len, found)) == len(set().union(*found))


def test_sounds_are_the_same_whenever_they_are_made() -> None:
    assert np.array_equal(hum("a"), hum("a"))
    assert not np.array_equal(hum("a")[:8000], hum("b")[:8000])


# ---- supervised ---------------------------------------------------------------------------------------------------

SFT = """
recipe: sft
run: {name: mid, root: runs, output: checkpoints/finished}
model: {path: start, family: "rlaudio.models.qwen_audio:Qwen2Audio", dtype: bfloat16}
clips: clips
phases:
  - name: mid_training
    mixture: [{path: audio.jsonl, weight: 0.5}, {path: text.jsonl, weight: 0.5}]
    steps: 5000
    rows_per_step: 256
    lr: 1.0e-5
  - {name: cold_start, data: cold.jsonl, steps: 800, rows_per_step: 4, lr: 5.0e-6}
learner: {ranks: 32, num_gpus: 1, zero_stage: 3, gradient_checkpointing: true}
"""
JUDGE = """
recipe: reward_model
run: {name: judge, root: runs, output: checkpoints/judge}
model: {path: start, dtype: bfloat16}
asking: {levels: 3}
phases: [{name: pairs, data: pairs.jsonl, steps: 900, rows_per_step: 64, lr: 1.0e-5}]
learner: {ranks: 8, num_gpus: 1, zero_stage: 1}
calibration: {num_gpus: 1}
"""


def shrunk(text: str, schema: Any, check: Callable[[Any], list[str]], tmp_path: Path) -> tuple[Any, Any, Path]:
    file = tmp_path / "stage.yaml"
    file.write_text(text)
    full = load_config(schema, file, check=check)
    small, folder = tiny_run(full, [], config_path=str(file), check=check)
    with folder:
        return full, small, folder.path


def test_supervised_stages_keep_their_phases_and_never_write_where_the_file_says(tmp_path: Path) -> None:
    full, small, folder = shrunk(SFT, SftConfig, sft_problems, tmp_path)
    assert Path(small.run.output).is_relative_to(folder) and not Path(full.run.output).exists()
    assert [(p.name, p.steps, p.rows_per_step, p.lr) for p in small.phases] == [
        ("mid_training", 2, 8, 1e-5),
        ("cold_start", 2, 4, 5e-6),
    ]
    assert [part.weight for part in small.phases[0].mixture] == [0.5, 0.5]
    assert small.learner.zero_stage == 3
    for path in (*(part.path for part in small.phases[0].mixture), small.phases[1].data):
        assert read_records(path, complete=True, clips=ClipStore(small.clips))
    assert open_family(small.model).path == Path(small.model.path)
    given = ["phases[1].steps=9", "phases[1].data=other.jsonl", "model.path=other"]
    keys = {change.key for change in replacements(full, Places(tmp_path), given=given)}
    assert "phases[1].steps" not in keys
    assert {"phases[0].steps", "phases[1].data", "model.path"} <= keys


def test_a_tiny_reward_model_has_pairs_to_learn_from_and_to_hold_out(tmp_path: Path) -> None:
    _, small, _ = shrunk(JUDGE, RewardModelConfig, reward_model_problems, tmp_path)
    data = read_judge_data(small)
    assert data.train and data.heldout and small.asking.levels == 3
    assert {one.level for one in data.train} == {0, 1, 2}


# ---- what cannot be shrunk ----------------------------------------------------------------------------------------


def test_a_family_without_a_maker_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text("class Family:\n    def __init__(self, path): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    full = load_config(RunConfig, R15, [f"run.root={tmp_path / 'runs'}", "model.family=theirs:Family"])
    with pytest.raises(ConfigError, match=r"model\.family=theirs:Family.*make_tiny"):
        tiny_run(full, [], config_path=str(R15), check=lambda _: ())
    assert not (tmp_path / "runs").exists()


def test_rows_of_another_tokenizer_and_simulated_users_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases\[1\]: .*rows\.arrow"):
        shrunk(SFT.replace("cold.jsonl", "rows.arrow"), SftConfig, sft_problems, tmp_path)
    full = load_config(RunConfig, R15, ["dialogue.user_model.endpoint={url: 'http://h/v1', model: m}"])
    with pytest.raises(ConfigError, match=r"dialogue\.user_model"):
        tiny_run(full, [], config_path=str(R15), check=lambda _: ())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([str(ROOT / "examples/quickstart/pipeline.yaml"), "--tiny"], "cannot shrink recipe 'pipeline'"),
        ([str(R15), "--tiny", "--resume", "runs/some"], "leave --tiny out"),
    ],
)
def test_the_command_says_what_it_cannot_shrink(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_source_that_can_judge_none_of_what_is_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picky.py").write_text(
        "from rlaudio.rewards.verifier import Verifier\n\n\n"
        "class Picky(Verifier):\n"
        "    @classmethod\n"
        "    def record_problems(cls, record, options):\n"
        "        yield 'it is not from the moon'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sources = ["rewards.sources=[{name: picky, judge: 'picky:Picky'}]"]
    with pytest.raises(ConfigError, match=r"source 'picky': it is not from the moon"):
        made(AQA, tmp_path / "runs", *sources)
