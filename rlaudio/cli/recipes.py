"""`rlaudio train CONFIG`: the recipe is named in the file, the command that runs it is here."""

from collections.abc import Sequence

from rlaudio.config_loader import peek
from rlaudio.errors import ConfigError

RECIPES = ("rl", "sft", "reward_model", "curate")


def recipe_command(config_path: str, overrides: Sequence[str], *, resume: str | None) -> int:
    """Run what `recipe` names, "rl" where the file says nothing. Returns the exit code.

    Raises:
        ConfigError: an unknown recipe, or one that cannot be resumed.
    """
    recipe = peek(config_path, "recipe", overrides, default="rl")
    if recipe not in RECIPES:
        raise ConfigError(f"{config_path}: recipe is {recipe!r}: set {', '.join(RECIPES)}, or leave it out for rl")
    if recipe == "rl":
        from rlaudio.cli.train import train_command

        return train_command(config_path, overrides, resume=resume)
    if recipe == "curate":
        from rlaudio.cli.data_curate import curate_command

        return curate_command(config_path, overrides, resume=resume)
    if resume:
        raise ConfigError(
            f"--resume goes on with a run of the recipe rl, and {config_path} has {recipe}: start it anew"
        )
    if recipe == "sft":
        from rlaudio.cli.sft import sft_command

        return sft_command(config_path, overrides)
    from rlaudio.cli.reward_model import reward_model_command

    return reward_model_command(config_path, overrides)
