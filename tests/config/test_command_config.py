"""Configurations round-trip: from flags, files and commands, and back."""

import dataclasses
import importlib
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
from paths import GOLDEN
from tiny_runs import FINETUNE, PRETRAIN, draw_folder, finetune_in, pretrain_in

from mae_dat.config.arguments import split_verb
from mae_dat.config.command_config import CommandConfig
from mae_dat.config.commands.convert import ConvertConfig
from mae_dat.config.commands.detect import DetectConfig
from mae_dat.config.commands.scan import ScanConfig
from mae_dat.config.effects import flags_without_effect
from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.config.flags import REQUIRED, Flag, flags_of, flat_values
from mae_dat.config.parse import load_config
from mae_dat.config.runs import LINEAR_PROBE, FinetuneConfig, PretrainConfig
from mae_dat.verbs import VERBS


def config_class(verb: str) -> type[CommandConfig]:
    module, _, name = VERBS[verb].config.partition(":")
    found = getattr(importlib.import_module(f"mae_dat.{module}"), name)
    assert issubclass(found, CommandConfig)
    return found


def parse(command: str) -> Any:
    """The configuration of a command as it is typed."""
    program, *words = shlex.split(command)
    assert program == "mae-dat"
    name, arguments = split_verb(words, list(VERBS))
    return VERBS[name].load(arguments, name)


def check_command(config: Any) -> None:
    """The command gives the same settings, except for those that have no effect, which it leaves out."""
    values, parsed = flat_values(config), flat_values(parse(config.command()))
    while useless := flags_without_effect(config.verb, values, values):
        if all(values[name] == parsed[name] for name in useless):
            break
        values |= {name: parsed[name] for name in useless}  # without it, others may have no effect
    assert parsed == values, config.command()


def test_the_command_of_a_recipe_leaves_out_what_waits_for_a_switch() -> None:
    config = FinetuneConfig.from_yaml("small_finetune", data_path="DIR")
    assert config.dat.share == 0.05
    assert "--dat_share" not in config.command()
    check_command(config)
    assert "--dat_share 0.05" in FinetuneConfig.from_yaml("small_finetune", dat="released").command()


# ---- random settings ----


def random_value(flag: Flag, draw: random.Random) -> Any:
    """A value of the flag's type, with spaces, quotes and leading hyphens in texts."""

    def one() -> Any:
        if flag.choices:
            return draw.choice(flag.choices)
        if flag.kind is bool:
            return draw.random() < 0.5
        if flag.kind is int:
            return draw.randint(1, 9)
        if flag.kind is float:
            return draw.choice([0.5, 1e-05, 0.25, draw.random()])
        hyphen = "-" if flag.count == 1 and not flag.positional and draw.random() < 0.2 else ""
        return hyphen + "".join(draw.choices("ab 'ä=\"$/.", k=draw.randint(1, 8))).strip(" ")

    if flag.nullable and draw.random() < 0.2:
        return None
    if flag.count == 1:
        return one()
    return tuple(one() for _ in range(flag.count or draw.randint(bool(flag.positional), 3)))


@pytest.mark.parametrize("verb", VERBS)
def test_random_settings_survive_the_way_through_a_command_and_a_file(verb: str, tmp_path: Path) -> None:
    draw, kind, valid = random.Random(verb), config_class(verb), 0
    flags = flags_of(kind)
    for _ in range(90):
        chosen = [flag for flag in flags if flag.default is REQUIRED or draw.random() < 0.15]
        values = {flag.name: random_value(flag, draw) for flag in chosen}
        try:
            config = kind.from_flags(**values)
        except ConfigError:
            continue  # values that do not go together
        valid += 1
        check_command(config)
        if valid % 5 == 1:
            config.to_yaml(tmp_path / "config.yaml")
            assert kind.from_yaml(tmp_path / "config.yaml") == config
    assert valid >= 3


# ---- commands ----


def test_a_command_has_the_flags_that_differ_from_the_defaults() -> None:
    assert FinetuneConfig().command() == "mae-dat finetune"
    config = FinetuneConfig.from_flags(
        data_path=Path("my images"), dat=True, epochs=3, input_size=64, pin_mem=False, aa=None, compile=True, blr=0.001
    )
    assert config.command() == (
        "mae-dat finetune --data_path 'my images' --input_size 64 --no_pin_mem --compile --epochs 3 --dat released "
        "--aa None"
    )
    assert PretrainConfig.from_flags(norm_pix_loss=True).command() == "mae-dat pretrain --norm_pix_loss"
    assert ConvertConfig("OUT", "x.onnx", "onnx").command() == "mae-dat convert OUT x.onnx --to onnx"
    assert ScanConfig.from_flags(folder="DIR").command() == "mae-dat scan DIR"
    assert VERBS["demo"].load([], "demo").command() == "mae-dat demo"


def test_a_linear_probe_differs_from_its_own_defaults() -> None:
    probe = FinetuneConfig.from_flags(linear_probe=True)
    assert probe == LINEAR_PROBE
    assert probe.command() == "mae-dat finetune --linear_probe"
    longer = FinetuneConfig.from_flags(linear_probe=True, epochs=50, cls_token=False)
    assert longer.command() == "mae-dat finetune --no_cls_token --linear_probe --epochs 50"
    assert parse(longer.command()) == longer
    assert FinetuneConfig.from_flags(linear_probe=False).optim.epochs == 50


# ---- Python ----


def test_flags_of_every_group_are_given_by_name() -> None:
    config = FinetuneConfig.from_flags(epochs="3", dat="paper", crop_scale=[0.3, 1], suite=("clean", "generated"))
    assert (config.optim.epochs, config.dat.kind) == (3, "paper")
    assert (config.augment.crop_scale, config.evaluation.suite) == ((0.3, 1.0), ("clean", "generated"))
    assert dataclasses.is_dataclass(config)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"epochz": 3}, "FinetuneConfig has no setting 'epochz': did you mean epochs"),
        ({"kind": "released"}, "FinetuneConfig has no setting 'kind': "),
        ({"epochs": "many"}, "epochs must be a whole number, got 'many'."),
        ({"pin_mem": "no"}, "pin_mem must be true or false, got 'no'."),
        (
            {"dat": "strong"},
            "dat must be one of none, released, paper, symbolic, random, reconstruction, stored:DIR, got 'strong'.",
        ),
        ({"batch_size": 0}, "--batch_size must be at least 1, got 0."),
        ({"pretrained": True, "finetune": "PRE"}, "--pretrained and --finetune PRE: give one of them"),
    ],
)
def test_wrong_flags_in_python_get_the_messages_of_the_command_line(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        FinetuneConfig.from_flags(**flags)
    assert str(error.value).startswith(message)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="no SOURCE and no DEST given"):
        ConvertConfig.from_flags(to="timm")


def test_flags_take_precedence_over_a_file_or_recipe(tmp_path: Path) -> None:
    config = FinetuneConfig.from_yaml("small_finetune", epochs=7, data_path=tmp_path)
    assert (config.optim.epochs, config.data.data_path) == (7, str(tmp_path))
    assert config == load_config(
        FinetuneConfig, ["--config", "small_finetune", "--epochs", "7", "--data_path", str(tmp_path)]
    )
    with pytest.raises(MissingInputError, match="did you mean small_finetune"):
        FinetuneConfig.from_yaml("small_finetun")


# ---- runs ----


def test_the_settings_of_a_run_are_a_config(tmp_path: Path) -> None:
    images = draw_folder(tmp_path / "images", train=8, val=4, conflict=0)
    output = pretrain_in(tmp_path / "pre", images)
    given = [*PRETRAIN, "--data_path", str(images), "--output_dir", str(output)]
    config = PretrainConfig.from_yaml(output / "config.yaml")
    assert config == load_config(PretrainConfig, given) == parse(config.command())
    finetune_in(tmp_path / "out", images, "--dat")
    given = [*FINETUNE, "--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--dat"]
    finetuning = FinetuneConfig.from_yaml(tmp_path / "out" / "config.yaml")
    assert finetuning == load_config(FinetuneConfig, given) == parse(finetuning.command())


def test_the_settings_of_an_earlier_run_are_a_config() -> None:
    config = FinetuneConfig.from_yaml(GOLDEN / "earlier" / "dat" / "config.yaml")
    assert (config.classifier.model, config.dat.share, config.optim.epochs) == ("vit_tiny", 0.05, 2)
    assert parse(config.command()) == config


def test_names_of_earlier_runs_are_read_from_a_file_but_are_no_flags(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text in ("suite: corruptions", "suite: [corruptions]", "suite: [clean, corruptions]"):
        file.write_text(text)
        assert FinetuneConfig.from_yaml(file).evaluation.suite == ("clean", "generated")
    file.write_text("pictures_every: 3")
    assert FinetuneConfig.from_yaml(file).run.images_every == 3
    file.write_text("pictures_every: 3\nimages_every: 4")
    with pytest.raises(ConfigError, match="line 2: images_every is given again; the first is in .* line 1"):
        FinetuneConfig.from_yaml(file)
    with pytest.raises(ConfigError, match="no setting 'pictures_every': did you mean images_every"):
        FinetuneConfig.from_flags(pictures_every=3)


def test_the_settings_of_a_detector_are_a_config(tmp_path: Path) -> None:
    config = DetectConfig.from_flags(
        data_path="DIR", dat=True, eval=True, corrupted=True, severities=[1, 3], scale_jitter=(1, 1)
    )
    config.to_yaml(tmp_path / "config.yaml")
    assert DetectConfig.from_yaml(tmp_path / "config.yaml") == config
    text = (tmp_path / "config.yaml").read_text()
    assert text.startswith(
        "# mae-dat detect --data_path DIR --scale_jitter 1.0 1.0 --dat released --eval --corrupted --severities 1 3\n"
    )
    assert {line.partition(":")[0] for line in text.splitlines()[1:] if line[0] != "-"} == set(flat_values(config))
