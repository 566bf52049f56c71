"""`--tiny`: which settings of a full-size file are replaced so that it runs on a CPU in minutes, and by what.

Everything that is not in here stays as the file has it: algorithm, rewards with weights and schedules, mixtures,
staleness, learning rate, ZeRO stage. `recipes/tiny_parts.py` makes the checkpoints and dialogues that replace the
file's.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from rlaudio.config import (
    ClusterSettings,
    EngineConfig,
    LearnerSettings,
    MixtureSettings,
    PhaseSettings,
    RunConfig,
    ServedModelSettings,
    SftConfig,
)
from rlaudio.config_judges import RewardModelConfig
from rlaudio.data.tiny import LICENSE
from rlaudio.errors import ConfigError
from rlaudio.models.base import TinyFamily
from rlaudio.registry import load_object
from rlaudio.rewards.generative import GenerativeJudge

Config = RunConfig | SftConfig | RewardModelConfig

MAX_MODEL_LEN = 1024
"""Positions of the tiny checkpoints."""
MAX_NEW_TOKENS = 24
STEPS = 2
ROWS_PER_STEP = 8

_CPU = "no GPU is asked for"
_ALONE = "one process of each kind"
_SHORT = "a run of minutes"
_CONTEXT = "what the tiny checkpoint has positions for"
_FOLDER = "in the run folder"

_ALWAYS = re.compile(r"data\..*|clips|heldout|phases|phases\[\d+\]\.(data|mixture)\b.*|model\.path")
"""What is shrunk also where the command line names it: the policy's checkpoint, and data."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """One setting: its name as an override has it, what the file says, what takes its place, and why."""

    key: str
    old: Any
    new: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)} ({self.why})"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tiny parts of a run lie, all below `root`."""

    root: Path

    @property
    def data(self) -> Path:
        """Root of the clip store, and folder of the record files."""
        return self.root / "data"

    @property
    def policy(self) -> Path:
        return self.root / "policy"

    @property
    def judge(self) -> Path:
        return self.root / "judge"

    def file(self, split: str) -> Path:
        return self.data / f"{split}.jsonl"


def require_shrinkable(config: Config) -> None:
    """Raises ConfigError where `--tiny` could not replace what the file names: known before anything is written."""
    families = {"model.family": config.model.family}
    if isinstance(config, RunConfig):
        rewards, user = config.rewards, config.dialogue.user_model
        if rewards.judge_model.path:
            families["rewards.judge_model.family"] = rewards.judge_model.family
        if rewards.reference_model.path:
            families["rewards.reference_model.family"] = rewards.reference_model.family
        if user.path or user.endpoint.url:
            raise ConfigError(
                "--tiny cannot replace dialogue.user_model: a random model says nothing that a dialogue could go on "
                "from; pass dialogue.user=rlaudio.dialogue.users:ScriptedUser and take user_model out"
            )
    else:
        for index, phase in enumerate(config.phases):
            if rows := [path for path in _paths(phase) if path.endswith(".arrow")]:
                raise ConfigError(
                    f"--tiny cannot replace phases[{index}]: {rows[0]} holds rows in the ids of another tokenizer; "
                    "name records"
                )
    for key, name in families.items():
        if not hasattr(load_object(name), "make_tiny"):
            raise ConfigError(
                f"--tiny cannot make a small checkpoint of {key}={name}: the class has no `make_tiny` (see "
                f"{TinyFamily.__module__}:{TinyFamily.__name__}); write it, or train at full size"
            )


def replacements(config: Config, places: Places, *, given: Sequence[str] = ()) -> list[Replaced]:
    """What `--tiny` replaces, in the order of the file.

    Args:
        config: as the file and its overrides say.
        given: overrides of the command line, `key=value`: what they set is left as it is, checkpoints and data apart.
    """
    if isinstance(config, RunConfig):
        found = _of_run(config, places)
    else:
        found = _of_phases(config, places)
    keys = [override.partition("=")[0].strip() for override in given]
    kept = [key for key in keys if not _ALWAYS.fullmatch(key)]
    return [one for one in found if one.old != one.new and not any(_within(one.key, key) for key in kept)]


def replaced(config: Any, changes: Iterable[Replaced]) -> Any:
    """A copy of `config` in which the changes are made."""
    config = copy.deepcopy(config)
    for change in changes:
        *path, last = _steps(change.key)
        place: Any = config
        for step in path:
            place = getattr(place, step) if isinstance(step, str) and hasattr(place, step) else place[step]
        if isinstance(last, str) and hasattr(place, last):
            setattr(place, last, change.new)
        else:
            place[last] = change.new
    return config


# ---- reinforcement learning ---------------------------------------------------------------------------------------


def _of_run(config: RunConfig, places: Places) -> Iterator[Replaced]:
    run, algorithm, sampling = config.run, config.algorithm, config.sampling
    yield Replaced("run.name", run.name, f"{run.name}-tiny", "so that nobody takes it for the real one")
    yield _most("run.steps", run.steps, STEPS, _SHORT)
    yield Replaced("run.ledger", run.ledger, "", _FOLDER)
    yield Replaced("run.spool", run.spool, "", _FOLDER)
    yield from _of_cluster(config)
    yield from _of_model(config.model.path, config.model.dtype, path=places.policy)
    yield from _of_data(config, places)
    tokens = min(sampling.max_new_tokens, MAX_NEW_TOKENS)
    yield Replaced("sampling.max_new_tokens", sampling.max_new_tokens, tokens, _CONTEXT)
    yield from _of_rollout(config)
    yield from _of_rewards(config, places)
    yield _most("algorithm.group_size", algorithm.group_size, 4, _SHORT)
    yield _most("algorithm.groups_per_step", algorithm.groups_per_step, 2, _SHORT)
    yield _most("algorithm.minibatches", algorithm.minibatches, 2, "a group is not divided")
    share = tokens / sampling.max_new_tokens
    for name in ("overlong_max_tokens", "overlong_buffer_tokens"):
        old = getattr(algorithm, name)
        yield Replaced(f"algorithm.{name}", old, math.ceil(old * share), "as sampling.max_new_tokens")
    yield from _of_learner(config.learner)
    yield Replaced("sync.delta", config.sync.delta, False, "a difference of float32 is no smaller than the whole")
    yield Replaced("supervision.new_nodes", config.supervision.new_nodes, False, "nobody adds nodes")
    for pool in ("rollout", "reward"):
        yield Replaced(f"autoscale.{pool}", getattr(config.autoscale, pool), [], _ALONE)
    evaluation = config.evaluation
    dialogues = min(evaluation.max_dialogues or 4, 4)
    yield Replaced("evaluation.max_dialogues", evaluation.max_dialogues, dialogues, _SHORT)
    yield _most("evaluation.bootstrap", evaluation.bootstrap, 200, _SHORT)


def _of_cluster(config: RunConfig) -> Iterator[Replaced]:
    unset = ClusterSettings()
    for field in dataclasses.fields(unset):
        if field.name != "room_deadline_s":
            old, new = getattr(config.cluster, field.name), getattr(unset, field.name)
            yield Replaced(f"cluster.{field.name}", old, new, "this machine alone")


def _of_data(config: RunConfig, places: Places) -> Iterator[Replaced]:
    data = config.data
    why = "a few dialogues, see above"
    yield Replaced("data.train", data.train, str(places.file("train")) if data.train else "", why)
    names = part_names(data.mixture)
    for index, (part, name) in enumerate(zip(data.mixture, names, strict=True)):
        yield Replaced(f"data.mixture[{index}].path", part.path, str(places.file(f"train-{name}")), why)
        yield Replaced(f"data.mixture[{index}].name", part.name, name, "as before")
    for name, path in data.heldout.items():
        yield Replaced(f"data.heldout.{name}", path, str(places.file(f"heldout-{name}")), why)
    yield Replaced("data.clips", data.clips, str(places.data), _FOLDER)
    if data.licenses and LICENSE not in data.licenses:
        yield Replaced("data.licenses", data.licenses, [*data.licenses, LICENSE], "of dialogues that are made here")


def _of_rollout(config: RunConfig) -> Iterator[Replaced]:
    rollout = config.rollout
    yield _most("rollout.actors", rollout.actors, 1, _ALONE)
    yield _most("rollout.num_cpus", rollout.num_cpus, 0.7, "two cores for three roles")
    yield Replaced("rollout.num_gpus", rollout.num_gpus, 0.0, _CPU)
    device = "" if rollout.encoder_device == "cuda" else rollout.encoder_device
    yield Replaced("rollout.encoder_device", rollout.encoder_device, device, _CPU)
    yield from _of_engine(rollout.engine, key="rollout.engine")


def _of_rewards(config: RunConfig, places: Places) -> Iterator[Replaced]:
    rewards = config.rewards
    yield _most("rewards.actors", rewards.actors, 1, _ALONE)
    yield _most("rewards.num_cpus", rewards.num_cpus, 0.5, "two cores for three roles")
    yield Replaced("rewards.num_gpus", rewards.num_gpus, 0.0, _CPU)
    judge, key = rewards.judge_model, "rewards.judge_model"
    if judge.endpoint.url:
        yield Replaced(f"{key}.endpoint.url", judge.endpoint.url, "", "a tiny judge is served here instead")
        yield Replaced(f"{key}.endpoint.model", judge.endpoint.model, "", "as its url")
        yield Replaced(f"{key}.family", judge.family, config.model.family, "that of the policy")
        yield Replaced(f"{key}.options", judge.options, config.model.options, "those of the policy")
    if judge.path or judge.endpoint.url:
        yield from _of_model(judge.path, judge.dtype, path=places.judge, key=key)
        yield from _of_engine(judge.engine, key=f"{key}.engine")
        for index, source in enumerate(rewards.sources):
            yield from _of_judge_options(source.judge, source.options, key=f"rewards.sources[{index}].options")
    policy: ServedModelSettings = rewards.reference_model
    if policy.path:
        yield from _of_model(policy.path, policy.dtype, path=places.policy, key="rewards.reference_model")
        yield from _of_engine(policy.engine, key="rewards.reference_model.engine")


def _of_judge_options(judge: str, options: dict[str, Any], *, key: str) -> Iterator[Replaced]:
    """What a judge reads and writes must fit its context."""
    made = load_object(judge)
    if isinstance(made, type) and issubclass(made, GenerativeJudge):
        for name, most, default in (("max_new_tokens", 16, 32), ("max_section_tokens", 64, 256), ("max_history", 4, 1)):
            old = options.get(name)
            new = old if (old or default) <= most else most
            yield Replaced(f"{key}.{name}", old, new, _CONTEXT)


# ---- supervised ---------------------------------------------------------------------------------------------------


def _of_phases(config: SftConfig | RewardModelConfig, places: Places) -> Iterator[Replaced]:
    run = config.run
    yield Replaced("run.name", run.name, f"{run.name}-tiny", "so that nobody takes it for the real one")
    yield Replaced("run.output", run.output, str(places.root / "trained"), _FOLDER)
    yield from _of_model(config.model.path, config.model.dtype, path=places.policy)
    yield Replaced("clips", config.clips, str(places.data), _FOLDER)
    why = "a few dialogues, see above"
    for index, phase in enumerate(config.phases):
        key = f"phases[{index}]"
        if phase.data:
            yield Replaced(f"{key}.data", phase.data, str(places.file(f"{phase.name}")), why)
        for part, (settings, name) in enumerate(zip(phase.mixture, part_names(phase.mixture), strict=True)):
            path = str(places.file(f"{phase.name}-{name}"))
            yield Replaced(f"{key}.mixture[{part}].path", settings.path, path, why)
        yield _most(f"{key}.steps", phase.steps, STEPS, _SHORT)
        yield _most(f"{key}.rows_per_step", phase.rows_per_step, ROWS_PER_STEP, _SHORT)
    yield from _of_learner(config.learner)
    if isinstance(config, RewardModelConfig):
        yield Replaced("heldout", config.heldout, str(places.file("heldout")), why)
        yield Replaced("agreement.steps", config.agreement.steps, 0, _SHORT)
        yield from _of_engine(config.engine, key="engine")
        calibration = config.calibration
        yield Replaced("calibration.sets", calibration.sets, [], "a tiny judge cannot read them")
        yield _most("calibration.num_cpus", calibration.num_cpus, 1.0, "two cores")
        yield Replaced("calibration.num_gpus", calibration.num_gpus, 0.0, _CPU)
        yield _most("calibration.bootstrap", calibration.bootstrap, 200, _SHORT)
        asking = config.asking
        yield _most("asking.max_new_tokens", asking.max_new_tokens, 16, _CONTEXT)
        yield _most("asking.max_section_tokens", asking.max_section_tokens, 64, _CONTEXT)


# ---- what both have -----------------------------------------------------------------------------------------------


def _of_model(old_path: str, old_dtype: str, *, path: Path, key: str = "model") -> Iterator[Replaced]:
    yield Replaced(f"{key}.path", old_path, str(path), "a tiny random checkpoint of the same family")
    yield Replaced(f"{key}.dtype", old_dtype, "float32", "the dtype of CPUs")


def _of_engine(engine: EngineConfig, *, key: str) -> Iterator[Replaced]:
    yield Replaced(f"{key}.kind", engine.kind, "in_process", "the engine of CPUs")
    yield Replaced(f"{key}.tensor_parallel", engine.tensor_parallel, 1, _CPU)
    yield _most(f"{key}.max_model_len", engine.max_model_len, MAX_MODEL_LEN, _CONTEXT)
    yield _most(f"{key}.max_num_seqs", engine.max_num_seqs, 16, _SHORT)
    yield _most(f"{key}.kv_cache_mb", engine.kv_cache_mb, 64, _SHORT)


def _of_learner(learner: LearnerSettings) -> Iterator[Replaced]:
    yield _most("learner.ranks", learner.ranks, 1, _ALONE)
    yield _most("learner.least_ranks", learner.least_ranks, 1, _ALONE)
    yield _most("learner.num_cpus", learner.num_cpus, 0.7, "two cores for three roles")
    yield Replaced("learner.num_gpus", learner.num_gpus, 0.0, _CPU)
    for name in ("offload_optimizer", "offload_parameters"):
        yield Replaced(f"learner.{name}", getattr(learner, name), "none", "there is no device to offload from")
    reference = "" if learner.reference == "offload" else learner.reference
    yield Replaced("learner.reference", learner.reference, reference, "there is no device to offload from")
    yield _most("learner.micro_batch_tokens", learner.micro_batch_tokens, 4096, _SHORT)


def part_names(mixture: Sequence[MixtureSettings]) -> list[str]:
    """What the parts of a mixture are called."""
    return [part.name or PurePath(part.path).stem for part in mixture]


def _paths(phase: PhaseSettings) -> list[str]:
    return [phase.data] if phase.data else [part.path for part in phase.mixture]


def _most(key: str, old: float, most: float, why: str) -> Replaced:
    return Replaced(key, old, min(old, most), why)


def _within(key: str, given: str) -> bool:
    """Whether one of them names a part of the other."""
    one, other = _steps(key), _steps(given)
    short = min(len(one), len(other))
    return one[:short] == other[:short]


def _steps(key: str) -> list[str | int]:
    return [int(step) if step.isdecimal() else step for step in re.findall(r"[^.\[\]]+", key)]


def _shown(value: Any) -> str:
    return "nothing" if value in ("", [], None) else str(value)
