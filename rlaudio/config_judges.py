"""JudgeConfig and RewardModelConfig: settings for judges, measured (`rlaudio judge`) and trained (`rlaudio train`)."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from rlaudio.config import (
    PATH,
    PLACE,
    EngineConfig,
    JudgeModelSettings,
    LearnerSettings,
    ModelSettings,
    PhaseSettings,
    SftRunSettings,
    TrackingSettings,
)


@dataclass
class AskingSettings:
    """How a judge is asked: as it was trained. Names as in the options of `GenerativeJudge`."""

    levels: int = 5
    hears: str = "transcript"  # "sound" gives it the user's sounds
    instructions: str = ""  # empty: "judge" for a served model, a full explanation for an endpoint
    max_new_tokens: int = 0  # 0: 32 for a served model, 1024 for an endpoint
    max_section_tokens: int = 256


@dataclass
class JudgedSetSettings:
    """Comparisons with a known verdict."""

    name: str = MISSING
    path: str = field(default=MISSING, metadata=PATH)
    # "pairs" (`rlaudio/rewards/preferences.py`), or a local copy of "reward_bench_2" or "judge_bench" (JSONL, Parquet)
    kind: str = "pairs"


@dataclass
class CalibrationSettings:
    """Figures of a judge on comparisons that it did not learn from; see `rlaudio/rewards/calibration.py`."""

    sets: list[JudgedSetSettings] = field(default_factory=list)
    num_cpus: float = 1.0  # of the actor that serves the judge
    num_gpus: float = 0.0
    bootstrap: int = 2000
    max_in_flight: int = 256  # questions at the judge at once
    verdict_deadline_s: float = 120.0
    start_deadline_s: float = 300.0


@dataclass
class JudgeRunSettings:
    name: str = MISSING
    root: str = field(default="runs", metadata=PLACE)
    seed: int = 0


@dataclass
class JudgeConfig:
    """`rlaudio judge`: how good is a judge, served here or behind an endpoint?"""

    run: JudgeRunSettings = field(default_factory=JudgeRunSettings)
    judge_model: JudgeModelSettings = field(default_factory=JudgeModelSettings)
    asking: AskingSettings = field(default_factory=AskingSettings)
    clips: str = field(default="", metadata=PLACE)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)


@dataclass
class AgreementSettings:
    """Reinforcement learning after the supervised phases: the reward is agreement with the known verdict."""

    steps: int = 0  # 0: none
    exact_weight: float = 0.5  # for the exact level; the rest for the right side
    settings: dict[str, Any] = field(default_factory=dict)  # of the RL run, over those that the recipe writes


@dataclass
class RewardModelConfig:
    """A judge from preference pairs and rubric labels. A phase's data are those (JSONL) or rows made before (Arrow)."""

    recipe: str = "reward_model"
    run: SftRunSettings = field(default_factory=SftRunSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    asking: AskingSettings = field(default_factory=AskingSettings)
    clips: str = field(default="", metadata=PLACE)
    heldout: str = field(default="", metadata=PATH)  # preference file; empty: a share of the phases' own
    heldout_share: float = 0.1  # of the dialogues, by content
    reasoning: str = "A B"  # what is written before the verdict where a record has no reasoning: never nothing
    phases: list[PhaseSettings] = field(default_factory=list)
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    agreement: AgreementSettings = field(default_factory=AgreementSettings)
    engine: EngineConfig = field(default_factory=EngineConfig)  # that serves the finished judge
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
