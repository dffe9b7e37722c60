"""The command `mae-dat recipes`: list the recipes, or print one."""

from mae_dat.config.commands.recipes import RecipesConfig
from mae_dat.config.errors import MissingInputError, suggest
from mae_dat.config.recipes import RECIPES_FOLDER, recipe_description, recipe_names


def main(config: RecipesConfig) -> None:
    """Run the command. Raises MissingInputError for an unknown recipe."""
    if config.name is None:
        names = recipe_names()
        column = max(map(len, names)) + 2
        print("\n".join(f"{name:<{column}}{recipe_description(name)}" for name in names))
        return
    if config.name not in recipe_names():
        hint = suggest(config.name, recipe_names())
        raise MissingInputError(f"no recipe {config.name!r}: {hint} `mae-dat recipes` lists all.")
    print((RECIPES_FOLDER / f"{config.name}.yaml").read_text(), end="")
