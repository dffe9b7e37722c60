"""YAML files of settings: every mistake is reported with file, line, key, value and what is allowed."""

from pathlib import Path

import pytest

from mae_dat.config.errors import ConfigError
from mae_dat.config.flags import flags_of
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.config.yaml_files import read_settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blr: 1e-3\nepoch: 3", "recipe.yaml, line 2: unknown key 'epoch': did you mean epochs or start_epoch?"),
        ("zzz: 3", "recipe.yaml, line 1: unknown key 'zzz': known are data_path, "),
        ("3: 3", "recipe.yaml, line 1: unknown key '3': "),
        ("blr: 1e-3\n\nepochs: many", "recipe.yaml, line 3: epochs must be a whole number, got many."),
        ("epochs: 2.5", "recipe.yaml, line 1: epochs must be a whole number, got 2.5."),
        ("epochs: true", "recipe.yaml, line 1: epochs must be a whole number, got true."),
        ("epochs: null", "recipe.yaml, line 1: epochs must be a whole number, got null."),
        ("epochs: [1, 2]", "recipe.yaml, line 1: epochs must be a whole number, got [1, 2]."),
        ("blr: {a: 1}", "recipe.yaml, line 1: blr must be a number, got {'a': 1}."),
        ("clip_grad: no", "recipe.yaml, line 1: clip_grad must be a number, or None, got no."),
        ("output_dir: yes", "recipe.yaml, line 1: output_dir must be text, got yes."),
        (
            "dat: strong",
            "recipe.yaml, line 1: dat must be one of none, released, paper, symbolic, random, reconstruction, "
            "stored:DIR, got strong.",
        ),
        ("dat: no", "recipe.yaml, line 1: dat must be one of none, released, "),
        ("global_pool: 7", "recipe.yaml, line 1: global_pool must be true or false, got 7."),
        ("cutmix_minmax: [1]", "recipe.yaml, line 1: cutmix_minmax must be 2 numbers, or None, got [1]."),
        ("input_size: [64, wide]", "recipe.yaml, line 1: input_size must be whole numbers, got [64, 'wide']."),
        (
            "epochs: 3\nblr: 1e-3\nepochs: 4",
            "recipe.yaml, line 3: epochs is given again; the first is in {path}, line 1: remove one.",
        ),
        ("seed: 1\nbatch_size: 0", "recipe.yaml, line 2: --batch_size must be at least 1, got 0"),
        ("- epochs", "recipe.yaml, line 1: the file must contain `key: value` lines"),
        ("epochs", "recipe.yaml, line 1: the file must contain `key: value` lines"),
        (
            "epochs: 3\nblr: [",
            "recipe.yaml, line 2, column 7: not valid YAML: expected the node content, but found '<stream end>'.",
        ),
        (
            "epochs: !!python/object:os.system {}",
            "recipe.yaml, line 1, column 9: not valid YAML: could not determine a constructor",
        ),
    ],
)
def test_a_wrong_file_names_itself_the_line_the_key_and_what_is_allowed(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(FinetuneConfig, ["--config", str(path)])
    assert message.replace("{path}", str(path)) in str(error.value)
    assert str(error.value).startswith(str(path))


def test_a_value_that_the_command_line_replaces_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("batch_size: 8\n")
    with pytest.raises(ConfigError) as error:
        load_config(FinetuneConfig, ["--config", str(path), "--batch_size", "0"])
    assert str(error.value) == "--batch_size must be at least 1, got 0."


def test_values_are_read_as_their_flags_are(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "blr: 1e-4\ndat: true\ninput_size: 64\naa: null\nsuite: clean\noutput_dir: 2024\ncutmix_minmax: [0.2, 1]\n"
    )
    config = load_config(FinetuneConfig, ["--config", str(path)])
    assert (config.optim.blr, config.dat.kind, config.data.input_size) == (1e-4, "released", (64,))
    assert (config.augment.aa, config.evaluation.suite, config.run.output_dir) == (None, ("clean",), "2024")
    assert config.augment.cutmix_minmax == (0.2, 1.0)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("# nothing\n")
    assert load_config(FinetuneConfig, ["--config", str(tmp_path / "recipe.yaml")]) == FinetuneConfig()


def test_a_bomb_of_aliases_is_rejected_with_its_line(tmp_path: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(["a0: &a0 [lol]", *levels]))
    with pytest.raises(ConfigError, match=r"bomb\.yaml, line 2: aliases \(\*a0\) are not supported"):
        read_settings(path, flags_of(FinetuneConfig))


@pytest.mark.parametrize("text", ["epochs: " + "[" * 3000, "epochs: 2020-13-45", "epochs: \x00"])
def test_yaml_that_cannot_be_read_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        read_settings(path, flags_of(FinetuneConfig))
