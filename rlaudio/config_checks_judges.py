"""What no judge can be measured or trained with; the part of `config_checks` for `config_judges`."""

from collections.abc import Iterator, Sequence

from rlaudio.config_checks import (
    endpoint_problems,
    learner_problems,
    name_problems,
    phase_problems,
    recipe_problem,
    unused_problems,
    value_problems,
)
from rlaudio.config_judges import JudgeConfig, JudgedSetSettings, RewardModelConfig

HELDOUT = "heldout"
"""The name of the part of the data that a judge does not learn from."""


def judge_problems(config: JudgeConfig) -> list[str]:
    """One sentence per setting that cannot be meant: its name, its value, the way out."""
    found = [*value_problems(config), *_set_problems(config.calibration.sets), *_ears_problems(config)]
    if not config.calibration.sets:
        found.append("calibration.sets is empty, so there is nothing to judge: name at least one set")
    model = config.judge_model
    if bool(model.path) == bool(model.endpoint.url):
        found.append("judge_model needs a path or an endpoint.url, and not both: one judge answers")
    return [*found, *endpoint_problems(model, key="judge_model")]


def reward_model_problems(config: RewardModelConfig) -> list[str]:
    """The same for training a judge."""
    found = [
        *recipe_problem(config.recipe, wanted="reward_model"),
        *value_problems(config),
        *learner_problems(config.learner, dtype=config.model.dtype),
        *unused_problems(config.learner),
        *phase_problems(config.phases),
        *_set_problems(config.calibration.sets),
        *_ears_problems(config),
    ]
    files = [phase.data for phase in config.phases if not str(phase.data).endswith(".arrow")]
    if not config.heldout and not files:
        found.append("heldout is empty and every phase has rows made before: give a preference file to hold out")
    if config.agreement.steps and not files:
        found.append(
            "agreement.steps needs known verdicts, and every phase has rows made before: give preference files"
        )
    if not config.reasoning.strip():
        found.append(
            "reasoning is empty: a verdict without any reasoning before it cannot be read, leave the setting out"
        )
    for index, one in enumerate(config.calibration.sets):
        if one.name == HELDOUT:
            found.append(f"calibration.sets[{index}].name is {HELDOUT!r}, which is the held-out part's: rename the set")
    return found


def _set_problems(sets: Sequence[JudgedSetSettings]) -> Iterator[str]:
    yield from name_problems([one.name for one in sets], key="calibration.sets", what="set")


def _ears_problems(config: JudgeConfig | RewardModelConfig) -> Iterator[str]:
    if config.asking.hears == "sound" and not config.clips:
        yield "asking.hears is sound and clips is empty: set clips to the root of the clip store"
