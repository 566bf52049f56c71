"""`rlaudio train CONFIG`: the recipe is named in the file, the command that runs it is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlaudio.config_loader import peek
from rlaudio.errors import ConfigError

if TYPE_CHECKING:
    from rlaudio.recipes.kept import Kept

TINY_RECIPES = ("rl", "sft", "reward_model")
"""Recipes that `--tiny` knows how to shrink."""

RECIPES = ("rl", "sft", "reward_model", "curate", "distil", "evaluate", "pipeline")


def recipe_command(
    config_path: str,
    overrides: Sequence[str],
    *,
    resume: str | None,
    tiny: bool = False,
    kept: Kept | None = None,
) -> int:
    """Run what `recipe` names, "rl" where the file says nothing. Returns the exit code.

    Args:
        kept: engines and judges that "rl" stages of a pipeline leave each other.
        tiny: on a CPU in minutes, with tiny checkpoints and a few dialogues in place of the file's.

    Raises:
        ConfigError: an unknown recipe, or one that cannot be shrunk.
    """
    recipe = peek(config_path, "recipe", overrides, default="rl")
    if recipe not in RECIPES:
        raise ConfigError(f"{config_path}: recipe is {recipe!r}: set {', '.join(RECIPES)}, or leave it out for rl")
    if tiny and resume:
        raise ConfigError("--tiny and --resume: a tiny run's own config.yaml is tiny already, leave --tiny out")
    if tiny and recipe not in TINY_RECIPES:
        raise ConfigError(
            f"{config_path}: --tiny cannot shrink recipe {recipe!r}, only {', '.join(TINY_RECIPES)}; of a pipeline "
            "name the files of its stages"
        )
    if recipe == "rl":
        from rlaudio.cli.train import train_command

        return train_command(config_path, overrides, resume=resume, tiny=tiny, kept=kept)
    if recipe == "pipeline":
        from rlaudio.cli.pipeline import pipeline_command

        return pipeline_command(config_path, overrides, resume=resume, run_stage=recipe_command)
    if recipe == "evaluate":
        from rlaudio.cli.evaluate import evaluate_command

        return evaluate_command(config_path, overrides, resume=resume)
    if recipe == "curate":
        from rlaudio.cli.data_curate import curate_command

        return curate_command(config_path, overrides, resume=resume)
    if recipe == "distil":
        from rlaudio.cli.distil import distil_command

        return distil_command(config_path, overrides, resume=resume)
    if recipe == "sft":
        from rlaudio.cli.sft import sft_command

        return sft_command(config_path, overrides, resume=resume, tiny=tiny)
    from rlaudio.cli.reward_model import reward_model_command

    return reward_model_command(config_path, overrides, resume=resume, tiny=tiny)
