"""Recipes: the YAML files of `configs/`, which `--config` finds by their names, such as `small_finetune`."""

from pathlib import Path

from mae_dat.config.errors import MissingInputError, suggest

_PACKAGE = Path(__file__).parents[1]
# The wheel holds the recipes inside the package. In a checkout they are at its top.
RECIPES_FOLDER = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the YAML file that `--config` names: the path of a file, or the name of a recipe.

    A file takes precedence over a recipe of the same name. Raises MissingInputError with a suggestion.
    """
    path, names = Path(name), recipe_names()
    if path.is_file():
        return path
    if name in names:
        return RECIPES_FOLDER / f"{name}.yaml"
    if path.stem in names:  # a path as in a checkout
        hint = f"did you mean the recipe {path.stem}?"
    else:
        hint = suggest(name, [*sorted(map(str, path.parent.glob("*.yaml"))), *names])
    raise MissingInputError(f"--config {name}: no such file or recipe; {hint}")


def recipe_description(name: str) -> str:
    """Return what a recipe does: the sentence in its first line."""
    first, *_ = (RECIPES_FOLDER / f"{name}.yaml").read_text().splitlines()
    return first.removeprefix("# ").removesuffix(".")
