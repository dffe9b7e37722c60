"""Recipes are found by name or path, described by their first line, and listed."""

from pathlib import Path

import pytest
from paths import ROOT

from mae_dat.config.commands.recipes import RecipesConfig
from mae_dat.config.errors import MissingInputError
from mae_dat.config.parse import load_config
from mae_dat.config.recipes import find_recipe, recipe_description, recipe_names
from mae_dat.config.runs import FinetuneConfig
from mae_dat.config.show_recipes import main


def test_every_file_of_configs_is_a_recipe() -> None:
    assert recipe_names() == sorted(path.stem for path in (ROOT / "configs").iterdir())
    assert "small_finetune" in recipe_names()


def test_config_takes_the_name_of_a_recipe_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_path = load_config(FinetuneConfig, ["--config", str(ROOT / "configs" / "small_finetune.yaml")])
    assert by_path.optim.blr == 4.0e-3
    assert load_config(FinetuneConfig, ["--config", "small_finetune"]) == by_path
    assert load_config(FinetuneConfig, ["--config=small_finetune"]) == by_path


def test_a_file_takes_precedence_over_a_recipe_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small_finetune").write_text("epochs: 7\n")
    assert find_recipe("small_finetune") == Path("small_finetune")
    Path("small_pretrain").mkdir()
    assert find_recipe("small_pretrain") == ROOT / "configs" / "small_pretrain.yaml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("small_finetun", "did you mean small_finetune"),
        ("configs/10k_dat.yaml", "did you mean the recipe 10k_dat?"),
        ("own.yaml", "did you mean mine_own.yaml?"),
        ("xyz", "known are mine_own.yaml, 100k_pretrain, "),
    ],
)
def test_an_unknown_name_gets_a_suggestion(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine_own.yaml").write_text("")
    with pytest.raises(MissingInputError) as error:
        find_recipe(name)
    assert str(error.value).startswith(f"--config {name}: no such file or recipe; {hint}")


def test_a_description_is_the_first_line() -> None:
    assert recipe_description("small_pretrain") == "Pretrain a small ViT at 64 px on two CPU cores"


def test_the_list_has_a_line_of_80_columns_for_each_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(RecipesConfig())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert max(map(len, lines)) <= 80


def test_a_printed_recipe_is_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    main(RecipesConfig("small_finetune"))
    assert capsys.readouterr().out == (ROOT / "configs" / "small_finetune.yaml").read_text()
    with pytest.raises(MissingInputError, match=r"no recipe 'small_fine': did you mean small_finetune"):
        main(RecipesConfig("small_fine"))
