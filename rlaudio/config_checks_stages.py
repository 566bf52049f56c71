"""What no curation, distillation, evaluation or pipeline can be started with: `config_checks` for `config_stages`."""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rlaudio.config_checks import run_problems
from rlaudio.config_stages import CurationConfig, DistilConfig, EvaluationConfig

RESULTS = {
    "sft": {"model": "model"},
    "reward_model": {"model": "model"},
    "curate": {"records": "records.jsonl"},
    "distil": {"records": "records.jsonl"},
    "rl": {"model": "model"},
    "evaluate": {"report": "report.json"},
}
"""Recipe of a stage -> what it leaves -> the name of that in the stage's folder."""

_STAGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_REFERENCE = re.compile(r"\$\{stage\.([^}]*)\}")


def curation_problems(config: CurationConfig) -> list[str]:
    """One sentence per setting that cannot be meant: its name, its value, the way out.

    The file may be that of an RL run: then its recipe says so.
    """
    recipe = "rl" if config.recipe == "curate" else config.recipe
    return [*run_problems(dataclasses.replace(config, recipe=recipe)), *_keep_problems(config)]


def distil_problems(config: DistilConfig) -> list[str]:
    """The same of a distillation, whose file may be that of an RL run."""
    recipe = "rl" if config.recipe == "distil" else config.recipe
    found = run_problems(dataclasses.replace(config, recipe=recipe))
    distil = config.distil
    for setting, value, least in (("k", distil.k, 1), ("most", distil.most, 0), ("max_records", distil.max_records, 0)):
        if value < least:
            found.append(f"distil.{setting} is {value}: set {least} or more")
    if config.data.augment.share > 0:
        found.append(
            f"data.augment.share is {config.data.augment.share:g}: answers are written to the sounds as they lie, set 0"
        )
    if not distil.filters:
        found.append("distil.filters is empty, so every answer would be learned from: name at least one")
    names = [one.name for one in distil.filters]
    known = [source.name for source in config.rewards.sources]
    for index, one in enumerate(distil.filters):
        place = f"distil.filters[{index}]"
        if not _STAGE_NAME.fullmatch(one.name) or one.name in RESERVED_FATES:
            found.append(
                f"{place}.name is {one.name!r}: use letters, digits and _, and none of {_listed(RESERVED_FATES)}"
            )
        elif one.name in names[:index]:
            found.append(f"{place}.name is {one.name!r}, as that of an earlier filter: rename one of them")
        if one.source not in known:
            found.append(
                f"{place}.source is {one.source!r}, and rewards.sources are {_listed(known)}: name one of them"
            )
        if not math.isfinite(one.least):
            found.append(f"{place}.least is {one.least}: set a finite number")
    return found


RESERVED_FATES = ("kept", "behind", "spare", "unparsable", "unplayed", "unjudged")
"""What else may become of a turn, see `rlaudio.data.distil`."""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def evaluation_problems(config: EvaluationConfig) -> list[str]:
    """The same of an evaluation, whose file may be that of an RL run."""
    recipe = "rl" if config.recipe == "evaluate" else config.recipe
    found = run_problems(dataclasses.replace(config, recipe=recipe))
    if not config.data.heldout:
        found.append("data.heldout is empty, so there is nothing to evaluate on: name at least one set")
    for setting, value in (("siblings", config.siblings), ("sibling_records", config.sibling_records)):
        if value < 0:
            found.append(f"{setting} is {value}: set 0 or more")
    if config.sibling_records and not config.siblings:
        found.append(f"sibling_records is {config.sibling_records} and siblings 0: say how many are sampled of each")
    for name in config.policies:
        if not _STAGE_NAME.fullmatch(name):
            found.append(f"policies names one {name!r}: use letters, digits and _, it becomes a file's name")
    return found


def stage_problems(stages: object) -> list[str]:
    """What is wrong with a pipeline's stages as they are written: names, recipes, and references to each other."""
    if not isinstance(stages, list) or not stages:
        return ["stages is empty: name at least one"]
    found: list[str] = []
    known: dict[str, str] = {}
    for index, stage in enumerate(stages):
        place = f"stages[{index}]"
        if not isinstance(stage, dict) or not {"name", "recipe", "config"} <= stage.keys():
            found.append(f"{place} needs name, recipe and config")
            continue
        name, recipe = str(stage["name"]), str(stage["recipe"])
        found += _reference_problems(stage, place=place, earlier=known, later=_names(stages[index:]))
        if not _STAGE_NAME.fullmatch(name):
            found.append(f"{place}.name is {name!r}: use letters, digits and _, the first a letter")
        elif name in known:
            found.append(f"{place}.name is {name!r}, as that of an earlier stage: rename one of them")
        if recipe not in RESULTS:
            found.append(f"{place}.recipe is {recipe!r}{_nearest(recipe, list(RESULTS))}")
        known[name] = recipe
    return found


def _names(stages: list[Any]) -> list[str]:
    return [str(stage.get("name")) for stage in stages if isinstance(stage, dict)]


def _reference_problems(
    stage: dict[str, Any], *, place: str, earlier: dict[str, str], later: list[str]
) -> Iterator[str]:
    for text in _texts(stage):
        for reference in _REFERENCE.findall(text):
            name, _, result = reference.partition(".")
            if name in earlier and result in RESULTS.get(earlier[name], {}):
                continue
            if name in earlier:
                has = ", ".join(RESULTS.get(earlier[name], {}))
                yield f"{place} refers to ${{stage.{reference}}}, and stage {name!r} ({earlier[name]}) leaves {has}"
            elif name in later:
                yield f"{place} refers to ${{stage.{reference}}}, which is made later: put stage {name!r} before it"
            else:
                yield f"{place} refers to ${{stage.{reference}}}{_nearest(name, list(earlier))}"


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _nearest(wanted: str, known: list[str]) -> str:
    match = difflib.get_close_matches(wanted, known, n=1)
    return f": did you mean {match[0]!r}?" if match else f": there are {', '.join(known) or 'no stages before it'}"


def _keep_problems(config: CurationConfig) -> Iterator[str]:
    curation = config.curation
    keep, k = curation.keep, curation.k
    if len(keep) != 2 or not 0 <= keep[0] <= keep[1] <= k:
        yield (
            f"curation.keep is {list(keep)}: give [lowest, highest] number of the {k} dialogues (curation.k) that "
            "must pass, for example [3, 6]"
        )
    elif keep == [0, k]:
        yield f"curation.keep is {list(keep)} of {k}: that keeps every record, there would be nothing to choose"
    known = [source.name for source in config.rewards.sources]
    for name in curation.sources:
        if name not in known:
            yield f"curation.sources names {name!r}, and rewards.sources are {', '.join(known)}: name one of them"
