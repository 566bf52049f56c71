"""Training a judge: labelled comparisons become supervised rows in both orders, the held-out ones a calibration report.

The training itself is the supervised recipe; optional reinforcement learning on agreement is the RL recipe (`rlaudio
train` on the configuration that is written here). This module makes what they read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlaudio.audio.store import ClipStore
from rlaudio.config import JudgeModelSettings, RunConfig, SftConfig
from rlaudio.config_checks_judges import HELDOUT
from rlaudio.config_judges import JudgeConfig, JudgeRunSettings, RewardModelConfig
from rlaudio.config_loader import to_yaml
from rlaudio.data.records import write_records
from rlaudio.dialogue.render import clip_pieces
from rlaudio.errors import ConfigError
from rlaudio.models.base import ModelFamily
from rlaudio.models.families import open_family
from rlaudio.recipes.judges import read_sets
from rlaudio.recipes.sft import load_rows, require_learnable
from rlaudio.rewards.agreement import agreement_records
from rlaudio.rewards.judged_sets import JudgedSet, labelled_set
from rlaudio.rewards.levels import Scale
from rlaudio.rewards.preference_rows import preference_rows, require_apart, require_rows_apart, split_heldout
from rlaudio.rewards.preferences import Labelled, read_preferences
from rlaudio.rewards.prompt import JudgePrompt
from rlaudio.runs import write_text_atomic

AGREEMENT_YAML = "agreement.yaml"


@dataclass(frozen=True, slots=True)
class JudgeData:
    """Everything a reward-model run reads, before an actor is started.

    Attributes:
        rows: by the path of a phase's data.
        train: the comparisons behind them, as far as they are not rows made before.
        heldout: kept apart from all of them.
        sets: what the finished judge is measured on, the held-out part first.
    """

    rows: Mapping[str, pa.RecordBatch]
    train: tuple[Labelled, ...]
    heldout: tuple[Labelled, ...]
    sets: tuple[JudgedSet, ...]


def read_judge_data(config: RewardModelConfig) -> JudgeData:
    """Read, check and split.

    Raises:
        DataError: a file cannot be read or holds bad records, something held out is learned from, or a reply cannot be
            learned.
    """
    family = open_family(config.model)
    scale = Scale(config.asking.levels)
    store = ClipStore(config.clips) if config.clips else None
    prompt = judge_prompt(config, family)

    def read(path: str) -> list[Labelled]:
        return read_preferences(path, scale=scale, hears=config.asking.hears == "sound", clips=store)

    paths = list(dict.fromkeys(phase.data for phase in config.phases))
    labelled = {path: read(path) for path in paths if not path.endswith(".arrow")}
    if config.heldout:
        heldout = read(config.heldout)
    else:
        heldout = []
        for path, some in labelled.items():
            labelled[path], held = split_heldout(some, share=config.heldout_share)
            heldout += held
        # Several phases may name the same comparisons in two files: each is asked once.
        heldout = list({(one.id, one.comparison): one for one in heldout}.values())
    train = [one for some in labelled.values() for one in some]
    require_apart(train, heldout)
    rows = {
        path: preference_rows(labelled[path], prompt, reasoning=config.reasoning)
        if path in labelled
        else load_rows(path, family=family, clips=config.clips)
        for path in paths
    }
    for path, batch in rows.items():
        require_rows_apart(batch, heldout, prompt)
        require_learnable(batch, path=path, banned=family.tokenizer.ids.banned)
    own = labelled_set(HELDOUT, heldout, scale=scale, num_resamples=config.calibration.bootstrap)
    return JudgeData(rows, tuple(train), tuple(heldout), (own, *read_sets(judge_config(config))))


def judge_prompt(config: RewardModelConfig, family: ModelFamily) -> JudgePrompt:
    """How the judge reads, in training as when it is served."""
    asking = config.asking
    clips = ClipStore(config.clips) if asking.hears == "sound" else None
    return JudgePrompt(
        family.tokenizer,
        style=family.style,
        instructions=asking.instructions or "judge",
        max_section_tokens=asking.max_section_tokens,
        scale=Scale(asking.levels),
        pieces=None if clips is None else lambda part: clip_pieces(part, family=family, clips=clips),
    )


def sft_config(config: RewardModelConfig) -> SftConfig:
    """The supervised part, for `run_sft` with the rows of `JudgeData`."""
    return SftConfig(
        run=config.run,
        model=config.model,
        clips=config.clips,
        phases=config.phases,
        learner=config.learner,
        tracking=config.tracking,
    )


def judge_config(config: RewardModelConfig) -> JudgeConfig:
    """The finished judge, to be measured as it will be served."""
    model = config.model
    return JudgeConfig(
        run=JudgeRunSettings(config.run.name, config.run.root, config.run.seed),
        judge_model=JudgeModelSettings(
            path=config.run.output, family=model.family, dtype=model.dtype, options=model.options, engine=config.engine
        ),
        asking=config.asking,
        clips=config.clips,
        calibration=config.calibration,
    )


def resource_needs(config: RewardModelConfig) -> dict[str, tuple[float, float]]:
    """What Ray is asked for: the learner has ended when the judge is served."""
    learner, served = config.learner, config.calibration
    return {
        "learner or judge": (
            max(learner.ranks * learner.num_cpus, served.num_cpus),
            max(learner.ranks * learner.num_gpus, served.num_gpus),
        )
    }


# ---- reinforcement learning on agreement --------------------------------------------------------------------------


def write_agreement(config: RewardModelConfig, data: JudgeData, *, folder: Path, policy: str) -> Path:
    """Write the records and the configuration of an RL run in which the judge is the policy; returns the latter.

    Args:
        policy: the checkpoint it starts from.

    Raises:
        DataError: a text is longer than `asking.max_section_tokens`: a played prompt is not cut.
        ConfigError: `agreement.settings` has something that no RL run has.
    """
    family = open_family(config.model)
    prompt = judge_prompt(config, family)
    for name, labelled in (("train", data.train), ("heldout", data.heldout)):
        records = agreement_records(labelled, prompt, family=family)
        write_records(folder / f"agreement-{name}.jsonl", records)
    path = folder / AGREEMENT_YAML
    write_text_atomic(path, _agreement_yaml(config, folder=folder, policy=policy))
    return path


def _agreement_yaml(config: RewardModelConfig, *, folder: Path, policy: str) -> str:
    asking, agreement = config.asking, config.agreement
    written: dict[str, Any] = {
        "run": {
            "name": "agreement",
            "root": str(folder / "agreement"),
            "seed": config.run.seed,
            "steps": agreement.steps,
            "checkpoint_every": max(agreement.steps, 1),
        },
        "model": {**_plain(config.model), "path": policy},
        "data": {
            "train": str(folder / "agreement-train.jsonl"),
            "heldout": {"pairs": str(folder / "agreement-heldout.jsonl")},
            "clips": config.clips or str(folder / "no-clips"),
        },
        "sampling": {"max_new_tokens": asking.max_new_tokens or 32},
        "rollout": {"engine": _plain(config.engine)},
        "rewards": {
            "sources": [
                {
                    "name": "agreement",
                    "judge": "rlaudio.rewards.agreement:VerdictAgreement",
                    "options": {"levels": asking.levels, "exact_weight": agreement.exact_weight},
                }
            ]
        },
        "learner": _plain(config.learner),
        "evaluation": {"bootstrap": config.calibration.bootstrap},
        "tracking": _plain(config.tracking),
    }
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), written, agreement.settings)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(
            f"agreement.settings cannot be those of an RL run ({' '.join(str(error).split())}): correct them, their "
            "names are those of `rlaudio train`"
        ) from error
    return str(OmegaConf.to_yaml(merged))


def _plain(settings: object) -> Any:
    return OmegaConf.to_container(OmegaConf.create(to_yaml(settings)))


def trained_policy(folder: Path) -> Path:
    """The checkpoint that the RL run below `folder` wrote last."""
    return max((folder / "agreement").glob("*/model"), key=lambda path: path.stat().st_mtime)
