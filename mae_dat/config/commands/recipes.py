"""Flags of `mae-dat recipes`."""

import dataclasses

from mae_dat.config.command_config import CommandConfig


@dataclasses.dataclass(frozen=True)
class RecipesConfig(CommandConfig):
    """List the recipes, or print one: settings of a training that --config finds by name.

    To change a recipe, write it to a file, edit the file, and give --config the file: `mae-dat recipes RECIPE >
    mine.yaml`, then `--config mine.yaml`. Flags on the command line take precedence over both.
    """

    verb = "recipes"
    name: str | None = dataclasses.field(default=None, metadata={"positional": "RECIPE"})
    """The recipe to print (default: list all)."""
