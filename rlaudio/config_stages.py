"""Settings of recipes around training: what the policy chooses or says to learn from, evaluation, pipelines."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from rlaudio.config import PATH, PLACE, RunConfig, TrackingSettings


@dataclass
class CurationSettings:
    """Which records are worth training on: those that the policy neither always nor never gets right.

    Defaults are those of arXiv:2511.15848, 4.2: of 8 responses 3 to 6 are right.
    """

    k: int = 8  # dialogues that are played of each record
    keep: list[int] = field(default_factory=lambda: [3, 6])  # [lowest, highest] number of them that pass
    # Of the turns that a verifier speaks of, the share that must be right for a dialogue to pass.
    pass_share: float = 1.0
    # Names of the reward sources that say what is right. Empty: all that verify, and no judge model is served
    sources: list[str] = field(default_factory=list)
    max_records: int = 0  # the first so many; 0: all
    # The kept records. Empty: `kept.jsonl` in the run folder
    output: str = field(default="", metadata=PLACE)


@dataclass
class CurationConfig(RunConfig):
    """`rlaudio data curate`: the settings of an RL run, of which the learner's are not used, and what is kept."""

    recipe: str = "curate"
    curation: CurationSettings = field(default_factory=CurationSettings)


@dataclass
class FilterSettings:
    """What an answer must pass to be learned from: a reward source's verdict on its turn."""

    name: str = MISSING  # as it is counted, for example right, coherent, grounded
    source: str = MISSING  # name of one of `rewards.sources`
    detail: str = ""  # of what the source says, for example "kept" of AcousticGrounding. Empty: its value
    least: float = 1.0  # lower fails, and so does a turn of which the source says nothing


@dataclass
class DistilSettings:
    """Which answers of the policy it is fine-tuned on: rejection sampling (MGRD, arXiv:2511.15848)."""

    tasks: list[str] = field(default_factory=list)  # records of these tasks. Empty: of any
    axes: list[str] = field(default_factory=list)  # and of these axes
    max_records: int = 0  # the first so many of them; 0: all
    k: int = 8  # dialogues that are sampled of each
    filters: list[FilterSettings] = field(default_factory=list)  # in order; a turn counts for the first that it fails
    most: int = 2  # different answers that are kept of one record; 0: all
    # The records to fine-tune on. Empty: `records.jsonl` in the run folder
    output: str = field(default="", metadata=PLACE)


@dataclass
class DistilConfig(RunConfig):
    """`recipe: distil`: the settings of an RL run, of which the learner's are not used, and what is kept."""

    recipe: str = "distil"
    distil: DistilSettings = field(default_factory=DistilSettings)


@dataclass
class EvaluationConfig(RunConfig):
    """`recipe: evaluate`: several checkpoints on the held-out sets of an RL run's settings, compared in their order."""

    recipe: str = "evaluate"
    # Name -> checkpoint, in the order in which they are compared. Empty: that of `model.path` alone
    policies: dict[str, str] = field(default_factory=dict, metadata=PATH)
    # Dialogues that are sampled of a record, as training would, beside the greedy one: what diversity is measured on.
    #   They lie in `siblings-POLICY-SET.json`. 0: none
    siblings: int = 0
    sibling_records: int = 0  # the first so many records of each set; 0: all that are evaluated


@dataclass
class StageSettings:
    """One stage of a pipeline: a recipe with its own file."""

    name: str = MISSING
    recipe: str = MISSING  # sft, reward_model, curate, distil, rl, evaluate
    config: str = field(default=MISSING, metadata=PATH)
    # Settings over those of the file, names with dots: `model.path: ${stage.cold_start.model}`
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class PipelineRunSettings:
    name: str = MISSING
    root: str = field(default="runs", metadata=PLACE)  # the pipeline's folder, NAME-seedN, is made here
    seed: int = 0  # of every stage that has none of its own
    until: str = ""  # the last stage to run; started again with another one, or with none, it goes on


@dataclass
class PipelineConfig:
    """`recipe: pipeline`: stages in order, each with the results of those before it."""

    recipe: str = "pipeline"
    run: PipelineRunSettings = field(default_factory=PipelineRunSettings)
    stages: list[StageSettings] = field(default_factory=list)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    # Filled in when the file is read: stage -> result -> where it lies. `${stage.NAME.RESULT}` refers to it
    stage: dict[str, dict[str, str]] = field(default_factory=dict)
