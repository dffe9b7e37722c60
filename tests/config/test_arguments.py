"""The command line: words to values, help texts at the width of the terminal, and messages for mistakes."""

import dataclasses
from typing import Literal

import pytest

from mae_dat.config.errors import UsageError
from mae_dat.config.flags import flat_values
from mae_dat.config.parse import command_of, load_config
from mae_dat.config.runs import FinetuneConfig


@dataclasses.dataclass(frozen=True)
class TrainingGroup:
    """Training: how long, and
    how fast."""

    epochs: int = 3
    """Passes over
    the images."""
    lr: float | None = None
    """Learning rate (default: by the batch)."""


@dataclasses.dataclass(frozen=True)
class SmallConfig:
    """Do a small thing.

    It takes a moment, a little more than one line can tell at a width of eighty columns.
    """

    source: str = dataclasses.field(metadata={"positional": "SOURCE"})
    """What to read."""
    more: tuple[str, ...] = dataclasses.field(default=(), metadata={"positional": "MORE"})
    """What else to read."""
    fast: bool = False
    """Run fast. It may be wrong by 5 %."""
    check: bool = True
    """Check the result."""
    kind: Literal["a", "b"] = "a"
    """Kind of thing."""
    training: TrainingGroup = TrainingGroup()
    shares: tuple[float, float] = (0.25, 1.0)
    """Two shares. They add up."""


HELP = """\
usage: mae-dat small [flags] SOURCE [MORE...]

Do a small thing.

It takes a moment, a little more than one line can tell at a width of eighty
columns.

arguments:
  SOURCE               What to read.
  MORE                 What else to read.

flags:
  --fast               Run fast. It may be wrong by 5 %.
  --check, --no_check  Check the result (default: on; off with --no_check).
  --kind {a,b}         Kind of thing (default: a).

Training:
  How long, and how fast.

  --epochs N           Passes over the images (default: 3).
  --lr X               Learning rate (default: by the batch).

other flags:
  --shares X X         Two shares. They add up. Default: 0.25 1.
  --config FILE        YAML file of flags, or the name of a recipe (`mae-dat
                       recipes`). Flags on the command line take precedence.
  -h, --help           Print this help.

examples:
  mae-dat small A
  mae-dat small A --fast
"""


def test_the_help_fits_into_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    examples = ("mae-dat small A", "mae-dat small A --fast")
    assert command_of(SmallConfig, "mae-dat small", examples).help() == HELP


def test_help_is_printed_and_ends_with_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit) as ended:
            load_config(SmallConfig, ["--kind", "b", flag])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith("usage: mae-dat [flags] SOURCE")


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("A", {}),
        ("A B C", {"more": ("B", "C")}),
        ("A --fast B --epochs 5 C", {"more": ("B", "C"), "fast": True, "epochs": 5}),
        ("--fast --no_fast --no_check A", {"check": False}),
        ("--kind=b A", {"kind": "b"}),
        ("--lr 1e-3 A", {"lr": 1e-3}),
        ("A --lr None", {}),
        ("A --shares 1 2 --epochs=4 --epochs=5", {"shares": (1.0, 2.0), "epochs": 5}),
    ],
)
def test_words_become_values(arguments: str, changed: dict[str, object]) -> None:
    values = flat_values(load_config(SmallConfig, arguments.split()))
    assert values == {**flat_values(SmallConfig("A")), **changed}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("A --epochz 5", "mae-dat has no flag --epochz: did you mean --epochs? `mae-dat --help` lists all flags."),
        ("A --epochz=5", "mae-dat has no flag --epochz: did you mean --epochs?"),
        ("A --no_chek", "mae-dat has no flag --no_chek: did you mean --no_check or --check?"),
        ("A --ep 5", "mae-dat has no flag --ep: `mae-dat --help`"),
        ("A --epo 5", "mae-dat has no flag --epo: did you mean --epochs?"),
        ("A -epochs 5", "mae-dat has no flag -epochs: did you mean --epochs?"),
        ("A --xyz", "mae-dat has no flag --xyz: `mae-dat --help`"),
        ("A --epochs many", "--epochs must be a whole number, got 'many'. `mae-dat --help` lists all flags."),
        ("A --epochs", "--epochs needs a value"),
        ("A --lr fast", "--lr must be a number, or None, got 'fast'"),
        ("A --kind c", "--kind must be one of a, b, got 'c'"),
        ("A --fast=yes", "--fast takes no value, got 'yes'"),
        ("A --shares 1", "--shares needs 2 values"),
        ("A --shares 1 x", "--shares must be 2 numbers, got '1 x'"),
        ("--fast", "mae-dat needs SOURCE."),
    ],
)
def test_mistakes_are_named_with_the_way_out(arguments: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_config(SmallConfig, arguments.split())
    assert str(error.value).startswith(message)
    assert str(error.value).endswith("`mae-dat --help` lists all flags.")


def test_a_word_before_any_flag_is_no_flag() -> None:
    with pytest.raises(UsageError, match="there is no flag before 'DIR'"):
        load_config(FinetuneConfig, ["DIR", "--epochs", "3"])


def test_hyphens_and_underscores_are_the_same_in_the_name_of_a_flag() -> None:
    given = ["--output-dir", "my-out", "--no-pin-mem", "--input-size=64", "--finetune=my-weights"]
    config = load_config(FinetuneConfig, given)
    assert (config.run.output_dir, config.data.pin_mem, config.data.input_size) == ("my-out", False, (64,))
    assert config.classifier.finetune == "my-weights"


def test_a_quoted_text_of_flags_is_a_value() -> None:
    assert load_config(FinetuneConfig, ["--output_dir", "--a --b-c"]).run.output_dir == "--a --b-c"
