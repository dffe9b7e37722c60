"""Flags of `mae-dat recipes`."""

import dataclasses
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class RecipesConfig:
    """List the recipes, or print one: settings of a training that --config finds by name.

    To change a recipe, write it into a file and pass that file: mae-dat recipes NAME > mine.yaml, then --config
    mine.yaml. Flags on the command line take precedence over both.
    """

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = None
    """The recipe to print (default: list all)."""
