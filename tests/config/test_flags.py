"""Flags are read from dataclasses with their help, and values from every source are checked by the same rules."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mae_dat.config.commands.tokenizer import DistillConfig
from mae_dat.config.flags import REQUIRED, Flag, WrongValueError, build_config, flags_of, flat_values
from mae_dat.config.runs import FinetuneConfig

FLAGS = {flag.name: flag for flag in flags_of(FinetuneConfig)}


def test_types_become_facts() -> None:
    def facts(name: str) -> tuple[Any, ...]:
        flag = FLAGS[name]
        return flag.kind, flag.count, flag.nullable, len(flag.choices)

    assert facts("epochs") == (int, 1, False, 0)
    assert facts("lr") == (float, 1, True, 0)
    assert facts("dat") == (str, 1, False, 7)
    assert facts("input_size") == (int, None, False, 0)
    assert facts("crop_scale") == (float, 2, False, 0)
    assert facts("cutmix_minmax") == (float, 2, True, 0)
    assert facts("compile") == (bool, 1, False, 0)
    assert (FLAGS["dat"].bare, FLAGS["at"].bare) == ("released", None)


def test_help_is_the_docstring_of_the_field_on_one_line_inherited_or_not() -> None:
    assert FLAGS["log_dir"].help == "Folder for TensorBoard's files (default: the output folder)."
    help_texts = {flag.name: flag.help for flag in flags_of(DistillConfig)}
    assert help_texts["steps"] == "Training steps."
    assert help_texts["teacher"].startswith("Tokenizer to imitate")
    assert not [flag.name for flag in FLAGS.values() if "\n" in flag.help]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", "3", 3),
        ("epochs", np.int64(3), 3),
        ("blr", "1e-4", 1e-4),
        ("blr", np.float32(0.5), 0.5),
        ("blr", 1, 1.0),
        ("lr", None, None),
        ("lr", "None", None),
        ("output_dir", Path("a/b"), "a/b"),
        ("compile", True, True),
        ("dat", True, "released"),
        ("dat", "paper", "paper"),
        ("input_size", 64, (64,)),
        ("input_size", [64, "48"], (64, 48)),
        ("crop_scale", (0.3, 1), (0.3, 1.0)),
        ("suite", "clean", ("clean",)),
        ("suite", [], ()),
        ("cutmix_minmax", None, None),
    ],
)
def test_values_are_converted(name: str, value: Any, expected: Any) -> None:
    converted = FLAGS[name].convert(value)
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("epochs", 2.5, "a whole number"),
        ("epochs", True, "a whole number"),
        ("epochs", None, "a whole number"),
        ("epochs", [3], "a whole number"),
        ("blr", "fast", "a number"),
        ("output_dir", None, "text"),
        ("compile", "yes", "true or false"),
        ("compile", 1, "true or false"),
        ("dat", False, "one of none, released, paper, symbolic, random, reconstruction, stored:DIR"),
        ("crop_scale", (0.3, 0.4, 0.5), "2 numbers"),
        ("input_size", "wide", "whole numbers"),
        ("lr", "x", "a number, or None"),
    ],
)
def test_wrong_values_are_named_by_what_is_expected(name: str, value: Any, expected: str) -> None:
    with pytest.raises(WrongValueError) as error:
        FLAGS[name].convert(value)
    assert str(error.value) == expected


def test_a_value_becomes_the_words_that_set_it() -> None:
    assert FLAGS["epochs"].words(3) == ["--epochs", "3"]
    assert FLAGS["crop_scale"].words((0.3, 1.0)) == ["--crop_scale", "0.3", "1.0"]
    assert FLAGS["pin_mem"].words(False) == ["--no_pin_mem"]
    assert FLAGS["pin_mem"].words(True) == ["--pin_mem"]
    assert FLAGS["lr"].words(None) == ["--lr", "None"]
    assert FLAGS["output_dir"].words("-x") == ["--output_dir=-x"]
    assert FLAGS["suite"].words(()) == ["--suite"]
    assert Flag("source", REQUIRED, str, positional="SOURCE").words("A") == ["A"]


def test_a_configuration_is_built_from_values_and_gives_them_back() -> None:
    config = build_config(FinetuneConfig, {"epochs": 3, "dat": "paper"})
    assert (config.optim.epochs, config.optim.min_lr, config.dat.kind) == (3, 1e-6, "paper")
    assert flat_values(config) == {**flat_values(FinetuneConfig()), "epochs": 3, "dat": "paper"}
