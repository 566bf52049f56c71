"""`--tiny` of `rlaudio train` and `rlaudio sft`: a run folder with tiny parts, and in print what was replaced."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from rlaudio.config import RunConfig, SftConfig
from rlaudio.config_judges import RewardModelConfig
from rlaudio.config_loader import to_yaml
from rlaudio.errors import ConfigError
from rlaudio.recipes.tiny import Places, replaced, replacements, require_shrinkable
from rlaudio.recipes.tiny_parts import make_parts, write_told
from rlaudio.runs import RunFolder, create_run, write_text_atomic

C = TypeVar("C", RunConfig, SftConfig, RewardModelConfig)

FOLDER = "tiny"


def tiny_run(
    config: C, overrides: Sequence[str], *, config_path: str, check: Callable[[C], Iterable[str]]
) -> tuple[C, RunFolder]:
    """A new, locked run folder with tiny checkpoints and dialogues in it, and the configuration that uses them.

    Args:
        config: as the file and its overrides say, checked.
        check: says what is wrong with the tiny one.

    Raises:
        RlaudioError: something that the file names cannot be shrunk; before the folder is made where that is known.
    """
    require_shrinkable(config)
    folder = create_run(config.run.root, name=f"{config.run.name}-tiny", seed=config.run.seed, config=config_path)
    try:
        places = Places(folder.path / FOLDER)
        changes = replacements(config, places, given=overrides)
        told = make_parts(config, changes, places)
        small: C = replaced(config, changes)
        write_told(places.root / "replaced.json", told, changes)
        write_text_atomic(folder.config_yaml, to_yaml(small))
        print("--tiny made:", *told, sep="\n  ")
        print("and replaced; every other setting is the file's:", *changes, sep="\n  ")
        print("What a tiny run learns means nothing: it shows that the recipe runs.", flush=True)
        if problems := list(check(small)):
            raise ConfigError("the tiny settings: " + "".join(f"\n  - {problem}" for problem in problems))
    except BaseException:
        folder.release()
        raise
    return small, folder
