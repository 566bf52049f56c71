"""What no run can be started with: values out of range, unknown choices, settings at odds. Pure, all told at once.

`load_config(..., check=run_problems)` refuses them; the doctor's static row shows the same. A number that has no range
here may be any finite one. What needs the code that a configuration names, or its data, is in `config_objects`.
"""

import dataclasses
import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rlaudio.algorithm_facts import ALGORITHMS
from rlaudio.config import (
    AlgorithmSettings,
    AugmentSettings,
    AutoscaleSettings,
    ClusterSettings,
    CriticSettings,
    DataSettings,
    DialogueSettings,
    DoctorSettings,
    EndpointSettings,
    EngineConfig,
    EvaluationSettings,
    JudgeModelSettings,
    LearnerSettings,
    MixtureSettings,
    ModelSettings,
    PhaseSettings,
    RewardSettings,
    RolloutSettings,
    RunConfig,
    RunSettings,
    SamplingSettings,
    ScheduleSettings,
    ServedModelSettings,
    SftConfig,
    SftRunSettings,
    SourceSettings,
    SupervisionSettings,
    SyncSettings,
    TrapSettings,
)
from rlaudio.config_judges import (
    AgreementSettings,
    AskingSettings,
    CalibrationSettings,
    JudgedSetSettings,
    JudgeRunSettings,
    RewardModelConfig,
)
from rlaudio.config_stages import CurationSettings
from rlaudio.data.lines import KEEPS
from rlaudio.evals.summary import RESERVED_SETS
from rlaudio.rewards.levels import MAX_LEVELS
from rlaudio.rewards.scope import NEEDS
from rlaudio.secrets import has_url_password, is_secret_name


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers a setting may have; `why` says what is wrong with the others."""

    low: float
    high: float = math.inf
    above: bool = False
    why: str = ""

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        most = f" and at most {self.high:g}" if self.high < math.inf else ""
        return f"{low}{most}" + (f" ({self.why})" if self.why else "")


ZERO, ONE, ABOVE_ZERO = Range(0), Range(1), Range(0, above=True)
SHARE = Range(0, 1, above=True)
FACTOR = Range(0, 1)

RANGES: Mapping[type, Mapping[str, Range]] = {
    RunSettings: {
        "steps": Range(0, why="0 evaluates only"),
        "checkpoint_every": ONE,
        "seed": ZERO,
        "stop_deadline_s": ABOVE_ZERO,
        "spool_mb": ZERO,
    },
    SftRunSettings: {"seed": ZERO, "checkpoint_every": Range(0, why="0 saves nothing on the way")},
    DataSettings: {"max_clip_s": Range(0, why="0 is an hour")},
    MixtureSettings: {"weight": ABOVE_ZERO},
    JudgeRunSettings: {"seed": ZERO},
    AskingSettings: {
        "levels": Range(2, MAX_LEVELS),
        "max_new_tokens": Range(0, why="0 is the model's default"),
        "max_section_tokens": ONE,
    },
    CalibrationSettings: {
        "num_cpus": ZERO,
        "num_gpus": ZERO,
        "bootstrap": ONE,
        "max_in_flight": ONE,
        "verdict_deadline_s": ABOVE_ZERO,
        "start_deadline_s": ABOVE_ZERO,
    },
    AgreementSettings: {"steps": Range(0, why="0 leaves it out"), "exact_weight": FACTOR},
    RewardModelConfig: {"heldout_share": Range(0, 0.9, above=True)},
    AugmentSettings: {"share": Range(0, 1)},
    CurationSettings: {"k": ONE, "pass_share": SHARE, "max_records": Range(0, why="0 is all")},
    DialogueSettings: {"max_turns": ONE, "seconds_per_turn": ABOVE_ZERO},
    SamplingSettings: {
        "temperature": Range(0, above=True, why="greedy siblings are all alike, nothing can be learned"),
        "top_p": SHARE,
        "max_new_tokens": ONE,
    },
    EngineConfig: {
        "max_model_len": Range(2, why="a prompt and a reply"),
        "max_num_seqs": ONE,
        "kv_cache_mb": ONE,
        "gpu_memory_utilization": SHARE,
        "tensor_parallel": ONE,
    },
    RolloutSettings: {
        "actors": ONE,
        "num_cpus": ZERO,
        "num_gpus": ZERO,
        "start_deadline_s": ABOVE_ZERO,
        "group_deadline_s": ABOVE_ZERO,
        "alive_deadline_s": ABOVE_ZERO,
        "attempts": ONE,
        "encoder_cache_mb": ZERO,
    },
    RewardSettings: {
        "actors": ONE,
        "num_cpus": ZERO,
        "num_gpus": ZERO,
        "min_siblings": SHARE,
        "start_deadline_s": ABOVE_ZERO,
        "group_deadline_s": ABOVE_ZERO,
        "slow_after_s": ABOVE_ZERO,
        "alive_deadline_s": ABOVE_ZERO,
    },
    ScheduleSettings: {"begin": ZERO, "end": ZERO},
    EndpointSettings: {"timeout_s": ABOVE_ZERO, "attempts": ONE, "backoff_s": ZERO},
    AlgorithmSettings: {
        "group_size": ONE,
        "groups_per_step": ONE,
        "max_staleness": Range(0, why="0 is synchronous"),
        "epochs": ONE,
        "minibatches": ONE,
        "look_ahead": Range(0, why="0 takes groups in order, n lets n overtake a slow one"),
        "max_divergences_in_a_row": Range(1, why="1 ends the run at the first"),
        "max_dropped_in_a_row": ONE,
        "constant_tokens": Range(1, why="sums are divided by it"),
        "kl_coef": Range(0, why="below it would reward leaving the reference"),
        "importance_cap": Range(1, why="below it cuts tokens that need no correction"),
    },
    CriticSettings: {
        "lr": ZERO,
        "discount": FACTOR,
        "gae_lambda": FACTOR,
        "value_clip": ABOVE_ZERO,
        "decoder_coef": ZERO,
    },
    LearnerSettings: {
        "ranks": ONE,
        "num_cpus": ZERO,
        "num_gpus": ZERO,
        "lr": ZERO,
        "min_lr": ZERO,
        "warmup_steps": ZERO,
        "decay_steps": ZERO,
        "weight_decay": ZERO,
        "max_grad_norm": ZERO,
        "micro_batch_tokens": ONE,
        "step_deadline_s": ABOVE_ZERO,
        "start_deadline_s": ABOVE_ZERO,
        "max_restarts": Range(0, why="0 starts nobody again"),
        "least_ranks": Range(0, why="0 is all of them"),
    },
    SyncSettings: {"deadline_s": ABOVE_ZERO},
    AutoscaleSettings: {"look_s": ABOVE_ZERO, "cooldown_s": ZERO},
    SupervisionSettings: {
        "max_restarts": Range(0, why="0 starts nobody again"),
        "window_s": ABOVE_ZERO,
        "first_pause_s": ZERO,
        "longest_pause_s": ZERO,
        "place_deadline_s": ABOVE_ZERO,
        "drain_deadline_s": ZERO,
    },
    EvaluationSettings: {"max_dialogues": Range(0, why="0 is all"), "bootstrap": ONE, "examples": ZERO},
    ClusterSettings: {
        "nodes": ZERO,
        "gpus_per_node": ZERO,
        "room_deadline_s": ABOVE_ZERO,
        "gpu_memory_gb": ZERO,
        "cpus_per_node": ZERO,
        "memory_gb": ZERO,
    },
    TrapSettings: {
        "reference_steps": Range(8, why="fewer say nothing of the start"),
        "window_steps": Range(8, why="fewer say nothing of a change"),
        "false_alarm": Range(0, 0.5, above=True),
        "min_effect": ZERO,
    },
    PhaseSettings: {
        "steps": ONE,
        "rows_per_step": ONE,
        "lr": ZERO,
        "warmup_steps": ZERO,
        "lm_weight": ZERO,
        "ctc_weight": ZERO,
        "stop_at_loss": ZERO,
    },
}

DTYPES = ("float32", "bfloat16")

CHOICES: Mapping[type, Mapping[str, tuple[object, ...]]] = {
    AskingSettings: {"hears": ("transcript", "sound")},
    JudgedSetSettings: {"kind": ("pairs", "reward_bench_2", "judge_bench")},
    ModelSettings: {"dtype": DTYPES},
    JudgeModelSettings: {"dtype": DTYPES},
    ServedModelSettings: {"dtype": DTYPES},
    SourceSettings: {"normalise": ("", "centre", "std", "none")},
    ScheduleSettings: {"kind": ("constant", "linear", "warm_up")},
    DataSettings: {"same_words": ("refuse", "warn", "allow"), "verify": ("headers", "sounds")},
    DialogueSettings: {"unclosed_thinking": ("end", "continue")},
    EngineConfig: {"kind": ("in_process", "async_llm")},
    RolloutSettings: {"encoder_device": ("", "cpu", "cuda")},
    AlgorithmSettings: {
        "too_old": ("wait", "drop"),
        "credit": ("turn", "dialogue"),
        "average": ("", "dialogue", "token", "constant"),
        "kl_in": ("loss", "reward"),
        "kl_estimator": ("k1", "k2", "k3"),
        "correction": ("truncated", "ratio", "none"),
    },
    LearnerSettings: {
        "zero_stage": (0, 1, 2, 3),
        "offload_optimizer": ("none", "cpu"),
        "offload_parameters": ("none", "cpu"),
        "reference": ("", "whole", "sharded", "offload"),
    },
    SyncSettings: {
        "swap": ("in_flight", "turn_ends", "dialogue_ends", "abort"),
        "transport": ("object_store", "collective"),
    },
    DoctorSettings: {"on_failure": ("stop", "warn")},
}

MIXTURE_TOLERANCE = 1e-4
"""How far the shares of a mixture may be from summing to 1: thirds are written with a few digits."""

_NAME = re.compile(r"[\w.-][\w. -]*", re.ASCII)
"""Names become parts of file names and of metrics."""


def run_problems(config: RunConfig) -> list[str]:
    """One sentence per setting of an RL run that cannot be meant: its name, its value, the way out."""
    return [
        *recipe_problem(config.recipe, wanted="rl"),
        *value_problems(config),
        *secret_problems(config),
        *_algorithm_problems(config),
        *learner_problems(config.learner, dtype=config.model.dtype),
        *_rollout_problems(config),
        *_sync_problems(config),
        *_autoscale_problems(config),
        *_source_problems(config.rewards),
        *_user_problems(config.dialogue),
        *_trap_problems(config),
        *_heldout_problems(config.data.heldout),
        *_augment_problems(config.data.augment),
        *_mixture_problems(config.data.train, config.data.mixture, file="data.train", key="data.mixture"),
    ]


def sft_problems(config: SftConfig) -> list[str]:
    """The same for a supervised run."""
    return [
        *recipe_problem(config.recipe, wanted="sft"),
        *value_problems(config),
        *secret_problems(config),
        *learner_problems(config.learner, dtype=config.model.dtype),
        *unused_problems(config.learner),
        *phase_problems(config.phases),
    ]


def recipe_problem(found: str, *, wanted: str) -> list[str]:
    """What is wrong with `recipe`, in the command that runs `wanted`."""
    return [] if found == wanted else [f"recipe is {found!r} and this command runs {wanted!r}: use `rlaudio train`"]


def secret_problems(value: Any, *, key: str = "") -> Iterator[str]:
    """Texts in `value` and everything below it that are secrets, by their setting's name or as an address's password.

    A configuration is written into run folders, logs and MLflow.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items: list[tuple[str, Any]] = [(one.name, getattr(value, one.name)) for one in dataclasses.fields(value)]
    elif isinstance(value, Mapping):
        items = [(str(name), item) for name, item in value.items()]
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from secret_problems(item, key=f"{key}[{index}]")
        return
    else:
        if isinstance(value, str) and value and is_secret_name(key):
            yield f"{key} holds a secret: set it as a variable of the nodes' environment, and name that variable here"
        elif isinstance(value, str) and has_url_password(value) and not key.endswith("endpoint.url"):
            yield f"{key} holds an address with a password: leave both out, and set them in the environment"
        return
    for name, item in items:
        yield from secret_problems(item, key=f"{key}.{name}" if key else name)


# ---- single values ------------------------------------------------------------------------------------------------


def value_problems(value: Any, *, key: str = "") -> Iterator[str]:
    """Numbers and choices in `value` and everything below it that are outside `RANGES` and `CHOICES`, or not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{key} is {value}: set a finite number"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from value_problems(item, key=f"{key}[{index}]")
    elif dataclasses.is_dataclass(value):
        ranges, choices = RANGES.get(type(value), {}), CHOICES.get(type(value), {})
        for field in dataclasses.fields(value):
            name, item = f"{key}.{field.name}".lstrip("."), getattr(value, field.name)
            if field.name in choices and item not in choices[field.name]:
                yield f"{name} is {item!r}: set {_listed(choices[field.name])}"
            elif field.name in ranges and item not in ranges[field.name] and math.isfinite(item):
                yield f"{name} is {item:g}: set a number of {ranges[field.name]}"
            else:
                yield from value_problems(item, key=name)


def _listed(choices: Sequence[object]) -> str:
    named = [str(choice) if choice != "" else "nothing ('')" for choice in choices]
    return f"{', '.join(named[:-1])} or {named[-1]}"


# ---- settings at odds ---------------------------------------------------------------------------------------------


def learner_problems(learner: LearnerSettings, *, dtype: str) -> Iterator[str]:
    if dtype == "bfloat16" and learner.zero_stage == 0:
        yield (
            "learner.zero_stage is 0 and model.dtype bfloat16: stage 0 keeps no float32 master weights, "
            "set learner.zero_stage=1"
        )
    if learner.offload_optimizer == "cpu" and learner.zero_stage == 0:
        yield (
            "learner.offload_optimizer is cpu and learner.zero_stage 0: without ZeRO DeepSpeed keeps optimizer states "
            "beside the weights, set learner.zero_stage=1 or more"
        )
    if learner.offload_parameters == "cpu" and learner.zero_stage < 3:
        yield (
            f"learner.offload_parameters is cpu and learner.zero_stage {learner.zero_stage}: below stage 3 every "
            "forward needs all weights on the device, set learner.zero_stage=3"
        )
    if learner.least_ranks > learner.ranks:
        yield (
            f"learner.least_ranks is {learner.least_ranks} and learner.ranks {learner.ranks}: set 0 (all or none) to "
            f"{learner.ranks}"
        )
    if learner.num_gpus > 0 and learner.num_cpus <= 0:
        yield f"learner.num_cpus is {learner.num_cpus:g}: a rank needs a CPU beside its device, set at least 1"
    if len(learner.betas) != 2 or not all(0 <= beta < 1 for beta in learner.betas):
        yield f"learner.betas is {learner.betas}: set two numbers from 0 to below 1, for example [0.9, 0.99]"
    if learner.decay_steps > 0 and learner.min_lr > learner.lr:
        yield f"learner.min_lr is {learner.min_lr:g} and learner.lr {learner.lr:g}: the rate would rise, lower min_lr"


def _rollout_problems(config: RunConfig) -> Iterator[str]:
    rollout, sampling, dtype = config.rollout, config.sampling, config.model.dtype
    if rollout.encoder_device == "cuda" and rollout.num_gpus == 0:
        yield "rollout.encoder_device is cuda and rollout.num_gpus is 0: set it to cpu, or give the actors a device"
    if 0 < sampling.top_p < 1:
        # The engine records log-probabilities renormalised over the nucleus, the learner's are over everything.
        yield f"sampling.top_p is {sampling.top_p:g}: importance ratios would be off for every token, train with 1"
    if dtype in DTYPES and sampling.max_new_tokens >= rollout.engine.max_model_len >= 2:
        yield (
            f"sampling.max_new_tokens is {sampling.max_new_tokens} and rollout.engine.max_model_len "
            f"{rollout.engine.max_model_len}: no room for a prompt, lower the first or raise the second"
        )


def _autoscale_problems(config: RunConfig) -> Iterator[str]:
    for name, section, actors in (
        ("rollout", "rollout", config.rollout.actors),
        ("reward", "rewards", config.rewards.actors),
    ):
        limits = getattr(config.autoscale, name)
        if limits and (len(limits) != 2 or not 1 <= limits[0] <= limits[1]):
            yield f"autoscale.{name} is {limits}: set the least and the most actors, for example [1, 16]"
        elif limits and not limits[0] <= actors <= limits[1]:
            yield f"{section}.actors is {actors} and autoscale.{name} {limits}: begin with a number between the two"


def _sync_problems(config: RunConfig) -> Iterator[str]:
    if config.sync.delta and config.model.dtype == "float32":
        # A step moves nearly every float32 element: each sync would compare everything and then send everything.
        yield (
            "sync.delta is on and model.dtype float32: a difference is smaller only among bfloat16 elements, turn "
            "sync.delta off or set model.dtype=bfloat16"
        )
    sync = config.sync
    if sync.keep_kv_cache and sync.swap != "in_flight":
        yield (
            f"sync.keep_kv_cache is true and sync.swap {sync.swap}, which leaves no turn running that could keep a "
            "cache: leave the first out, or set sync.swap=in_flight"
        )


def _source_problems(rewards: RewardSettings) -> Iterator[str]:
    if not rewards.sources:
        yield "rewards.sources is empty, so there is nothing to learn from: name at least one source"
    elif all(source.is_measured for source in rewards.sources):
        yield "rewards.sources: every weight is 0, so all is measured and nothing to learn from: give one a weight"
    yield from name_problems([source.name for source in rewards.sources], key="rewards.sources", what="reward source")
    for index, source in enumerate(rewards.sources):
        yield from _mix_problems(source, key=f"rewards.sources[{index}]")
    judge = rewards.judge_model
    if judge.endpoint.url:
        if judge.path:
            yield "rewards.judge_model has a path and an endpoint.url: one judge answers, leave one of them out"
        yield from endpoint_problems(judge, key="rewards.judge_model")
    if rewards.reference_model.path and not judge.path:
        # The actor's environment is made for the judge's engine, before vLLM is imported.
        found = "is an endpoint" if judge.endpoint.url else "has no path"
        yield (
            f"rewards.reference_model needs a judge that is served here, and rewards.judge_model {found}: serve one, "
            "or use references of the record or of siblings"
        )


def _user_problems(dialogue: DialogueSettings) -> Iterator[str]:
    if dialogue.user_model.endpoint.url and dialogue.user_model.path:
        yield "dialogue.user_model has a path and an endpoint.url: one model speaks, leave one of them out"
    yield from endpoint_problems(dialogue.user_model, key="dialogue.user_model")


def endpoint_problems(judge: JudgeModelSettings, *, key: str) -> Iterator[str]:
    if not judge.endpoint.url:
        return
    if not re.match(r"https?://[^\s/@]+(/[^\s?#]*)?$", judge.endpoint.url):
        yield (
            f"{key}.endpoint.url is {_without_secrets(judge.endpoint.url)!r}: set an address such as "
            "http://host:8000/v1, without name or key in it"
        )
    if not judge.endpoint.model:
        yield f"{key}.endpoint.model is empty: name the model as the endpoint knows it"


def _trap_problems(config: RunConfig) -> Iterator[str]:
    known = [source.name for source in config.rewards.sources]
    for kind in ("verified", "preference"):
        for name in getattr(config.trap, kind):
            if name not in known:
                yield f"trap.{kind} names {name!r}, which is no reward source: set {', '.join(known)}"
    if both := set(config.trap.verified) & set(config.trap.preference):
        yield f"trap.verified and trap.preference both name {sorted(both)[0]!r}: a source is one of them"


def _mix_problems(source: SourceSettings, *, key: str) -> Iterator[str]:
    schedule, unset = source.schedule, ScheduleSettings()
    if schedule.kind == "constant" and schedule != unset:
        yield f"{key}.schedule has steps or a start and is constant: set its kind to linear or warm_up, or leave it out"
    if schedule.kind == "linear" and schedule.end <= schedule.begin:
        yield f"{key}.schedule goes from step {schedule.begin} to {schedule.end}: end must be above begin"
    if schedule.kind == "warm_up" and schedule.end < 1:
        yield f"{key}.schedule.end is {schedule.end}: say over how many steps the weight warms up"
    if schedule.kind == "warm_up" and (schedule.begin, schedule.start) != (0, 0.0):
        yield f"{key}.schedule: a warm-up begins at step 0 with nothing, leave begin and start out, or choose linear"
    if source.weight == 0 and schedule.kind == "warm_up":
        yield f"{key}.weight is 0, and a schedule warms up to it: set the weight it shall end at"
    for need in source.only.needs:
        if need not in NEEDS:
            match = difflib.get_close_matches(need, NEEDS, n=1)
            yield f"{key}.only.needs names {need!r}, " + (f"did you mean {match[0]}?" if match else _listed(NEEDS))


def _without_secrets(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//[key]@", url)


def _mixture_problems(path: str, mixture: Sequence[MixtureSettings], *, file: str, key: str) -> Iterator[str]:
    if path and mixture:
        yield f"{file} and {key} are both set: name one file, or the parts of a mixture"
    elif not path and not mixture:
        yield f"{file} is not set: name a file of records, or the parts of {key}"
    names = [part.name or PurePath(part.path).stem for part in mixture]
    yield from name_problems(names, key=key, what="part")
    total = sum(part.weight for part in mixture)
    if mixture and all(part.weight > 0 for part in mixture) and abs(total - 1) > MIXTURE_TOLERANCE:
        shares = ", ".join(f"{part.weight / total:.6g}" for part in mixture)
        yield f"the weights of {key} sum to {total:g}: they are shares and must sum to 1, as {shares} would"


_AMOUNTS = {
    "speed": Range(0.5, 2),
    "reverberation_s": Range(0.02, 3),
    "noise_snr_db": Range(-20, 80),
    "telephone_bits": Range(2, 16),
}


def _augment_problems(settings: AugmentSettings) -> Iterator[str]:
    for name, allowed in _AMOUNTS.items():
        pair = getattr(settings, name)
        if pair and (len(pair) != 2 or pair[0] > pair[1] or not all(amount in allowed for amount in pair)):
            yield f"data.augment.{name} is {pair}: set the least and the greatest, each {allowed}, or leave it out"
    used = any(getattr(settings, name) for name in _AMOUNTS)
    if used != (settings.share > 0):
        missing = "set a share above 0" if used else f"set the range of {', '.join(_AMOUNTS)}"
        yield f"data.augment.share is {settings.share:g} and would change nothing: {missing}, or leave data.augment out"
    for task, names in settings.keep.items():
        for name in names:
            if name not in KEEPS:
                match = difflib.get_close_matches(name, KEEPS, n=1)
                yield f"data.augment.keep.{task} names {name!r}: " + (
                    f"did you mean {match[0]}?" if match else f"set {_listed(KEEPS)}"
                )


def _heldout_problems(heldout: Mapping[str, str]) -> Iterator[str]:
    for name in heldout:
        if name in RESERVED_SETS:
            yield f"data.heldout.{name}: report.json uses the name {name!r} for itself, rename the set"
        elif not _NAME.fullmatch(name):
            yield f"data.heldout names a set {name!r}: use letters, digits and . _ - only, it becomes a file's name"


def name_problems(names: Sequence[str], *, key: str, what: str) -> Iterator[str]:
    for index, name in enumerate(names):
        if not _NAME.fullmatch(name):
            yield f"{key}[{index}].name is {name!r}: use letters, digits and . _ - only, it becomes a metric's name"
    for name, count in Counter(names).items():
        if count > 1:
            places = " and ".join(f"{key}[{index}]" for index, other in enumerate(names) if other == name)
            yield f"{places} have one name, {name!r}: give every {what} its own"


# ---- the algorithm ------------------------------------------------------------------------------------------------


def _algorithm_problems(config: RunConfig) -> Iterator[str]:
    settings, longest = config.algorithm, config.sampling.max_new_tokens
    if ":" not in settings.name and settings.name not in ALGORITHMS:
        match = difflib.get_close_matches(settings.name, ALGORITHMS, n=1, cutoff=0.5)
        meant = (
            f", did you mean {match[0]}?" if match else f": choose {', '.join(ALGORITHMS)} or `package.module:Class`"
        )
        yield f"algorithm.name={settings.name!r} is unknown{meant}"
    yield from _sibling_problems(settings)
    yield from _clip_problems(settings)
    yield from _kl_problems(settings)
    yield from _overlong_problems(settings, longest=longest)


def _sibling_problems(settings: AlgorithmSettings) -> Iterator[str]:
    name = settings.name
    if settings.group_size == 1:
        if settings.compares_siblings:
            yield f"algorithm.group_size=1: {name} compares siblings, at least 2 are needed"
        elif settings.drops_groups_without_signal:
            yield "algorithm.dynamic_sampling needs siblings: algorithm.group_size=1 drops every group"
    if settings.minibatches > settings.groups_per_step >= 1:
        yield (
            f"algorithm.minibatches is {settings.minibatches} and groups_per_step {settings.groups_per_step}: "
            "a group is not divided, so there are at most as many optimizer steps"
        )
    if not settings.has_critic and settings.critic != CriticSettings():
        yield f"algorithm.critic is set, and {name} has no critic: leave it out, or set algorithm.name=ppo"
    if settings.scale_advantages is not None and settings.scale_advantages not in settings.facts.may_scale:
        yield f"algorithm.scale_advantages={str(settings.scale_advantages).lower()} contradicts {name}: leave it out"


def _clip_problems(settings: AlgorithmSettings) -> Iterator[str]:
    low, high = settings.clip_low, settings.clip_high
    if settings.facts.clip_low is None and (low is not None or high is not None):
        yield f"algorithm.clip_low and clip_high: {settings.name} does not clip, leave them out"
    if (low is not None and not 0 <= low <= 1) or (high is not None and high < 0):
        yield f"algorithm.clip_low={low}, clip_high={high}: clip_low must lie in [0, 1], clip_high be at least 0"
    if settings.mask_low < 0 or settings.mask_high < 0 or settings.mask_low > 1 or 0 < settings.mask_high < 1:
        yield (
            f"algorithm.mask_low={settings.mask_low}, mask_high={settings.mask_high}: the range must hold 1, where a "
            "turn needs no correction"
        )
    if settings.correction == "none" and (settings.mask_low or settings.mask_high):
        yield (
            "algorithm.mask_low and mask_high look at recorded log-probs, algorithm.correction=none does not: leave "
            "them out, or choose another correction"
        )


def _kl_problems(settings: AlgorithmSettings) -> Iterator[str]:
    if settings.kl_in == "reward" and settings.kl_coef == 0:
        yield "algorithm.kl_in=reward without algorithm.kl_coef: set the coefficient, or leave kl_in out"
    if settings.kl_in == "loss" and settings.kl_estimator == "k1" and settings.kl_coef > 0:
        # d/dtheta E[log p] is 0 for tokens sampled from p: the term would be noise without a pull.
        yield (
            "algorithm.kl_estimator=k1 in the loss has a gradient of mean zero: use k2 (the same KL, with its true "
            "gradient) or k3, or set algorithm.kl_in=reward"
        )


def _overlong_problems(settings: AlgorithmSettings, *, longest: int) -> Iterator[str]:
    maximum, buffer = settings.overlong_max_tokens, settings.overlong_buffer_tokens
    if buffer > 0 and maximum <= 0:
        yield f"algorithm.overlong_buffer_tokens={buffer} without overlong_max_tokens: say which length is too long"
    elif maximum < 0 or not 0 <= buffer <= maximum:
        yield f"algorithm.overlong_buffer_tokens={buffer} must lie in [0, overlong_max_tokens={maximum}]"
    elif maximum > 0 and buffer == 0:
        yield f"algorithm.overlong_max_tokens={maximum} without overlong_buffer_tokens: nothing would be shaped"
    elif maximum > 0 and maximum - buffer >= longest:
        yield (
            f"overlong shaping starts above {maximum - buffer} tokens (algorithm.overlong_max_tokens - "
            f"overlong_buffer_tokens), and no turn has more than sampling.max_new_tokens={longest}: lower the first"
        )


# ---- supervised phases --------------------------------------------------------------------------------------------


def unused_problems(learner: LearnerSettings) -> Iterator[str]:
    """Settings of the learner that every phase has of its own: here they would be read by nobody."""
    unset = LearnerSettings()
    for name in ("lr", "warmup_steps", "train_encoder"):
        if getattr(learner, name) != getattr(unset, name):
            yield f"learner.{name} is {getattr(learner, name)}: a phase has its own, set phases[0].{name} instead"
    if learner.decay_steps != unset.decay_steps:
        yield f"learner.decay_steps is {learner.decay_steps}: a phase decays over its steps, set phases[0].cosine"


def phase_problems(phases: Sequence[PhaseSettings]) -> Iterator[str]:
    if not phases:
        yield "phases is empty, so nothing would be trained: name at least one phase with data and steps"
    yield from name_problems([phase.name for phase in phases], key="phases", what="phase")
    for index, phase in enumerate(phases):
        files = {"file": f"phases[{index}].data", "key": f"phases[{index}].mixture"}
        yield from _mixture_problems(phase.data, phase.mixture, **files)
        if phase.lm_weight == 0 and phase.ctc_weight == 0:
            yield f"phases[{index}]: lm_weight and ctc_weight are both 0, nothing would be trained: raise one"
        elif phase.pseudo_audio and (phase.ctc_weight > 0 or phase.lm_weight == 0):
            yield f"phases[{index}]: pseudo_audio has no sound, set ctc_weight=0 and lm_weight above 0"
