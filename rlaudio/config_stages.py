"""CurationConfig and PipelineConfig: settings for choosing records by the policy, and for stages that run in order."""

from dataclasses import dataclass, field

from rlaudio.config import PLACE, RunConfig


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
