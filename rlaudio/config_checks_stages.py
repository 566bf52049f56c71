"""What no curation can be started with; the part of `config_checks` for `config_stages`."""

import dataclasses
from collections.abc import Iterator

from rlaudio.config_checks import run_problems
from rlaudio.config_stages import CurationConfig


def curation_problems(config: CurationConfig) -> list[str]:
    """One sentence per setting that cannot be meant: its name, its value, the way out.

    The file may be that of an RL run: then its recipe says so.
    """
    recipe = "rl" if config.recipe == "curate" else config.recipe
    return [*run_problems(dataclasses.replace(config, recipe=recipe)), *_keep_problems(config)]


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
