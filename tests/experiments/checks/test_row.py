"""Rows of the table: their layout, and checks that raise or warn."""

import logging
import re

import pytest

from mae_dat.config.errors import ConfigError, InterruptError
from mae_dat.experiments.checks.row import CheckRow, describe_error, format_row, run_check

LONG = "a check found something that takes many words to describe, more of them than fit into one line of the table"


@pytest.mark.parametrize("state", ["ok", "warning", "failed", "-"])
@pytest.mark.parametrize("name", ["torch", "the name of a row without a gap"])
def test_a_row_fits_into_80_columns(state: str, name: str) -> None:
    row = CheckRow(state, name, f"{LONG}\nsecond line", f"pip install {LONG}")  # type: ignore[arg-type]
    lines = format_row(row).split("\n")
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"  {state} ")
    column = lines[0].index(name)
    assert " ".join(" ".join(lines).split()) == f"{state} {name} {LONG} second line fix: pip install {LONG}"
    text_columns = {len(line) - len(line.lstrip()) for line in lines[1:]}
    assert min(text_columns) > column
    assert len(text_columns) == 2  # the text, and further lines of the fix


def test_colors_change_no_character() -> None:
    row = CheckRow("failed", "torch", LONG, "pip install torch")
    colored = format_row(row, color=True)
    assert colored != format_row(row)
    assert re.sub(r"\033\[\d*m", "", colored) == format_row(row)


def test_a_command_is_not_broken_inside_a_word() -> None:
    fix = "pip install --index-url https://download.pytorch.org/whl/cpu/with/a/path/of/many/folders torch"
    assert "https://download.pytorch.org/whl/cpu/with/a/path/of/many/folders" in format_row(
        CheckRow("failed", "torch", "missing", fix)
    )


def test_a_check_that_raises_is_a_failed_row() -> None:
    def fail() -> CheckRow:
        raise OSError("libcudart.so.13:\n  cannot open shared object file")

    assert run_check("torch", fail, "pip install torch") == [
        CheckRow("failed", "torch", "OSError: libcudart.so.13: cannot open shared object file", "pip install torch")
    ]
    assert describe_error(KeyError()) == "KeyError"
    assert len(describe_error(ValueError("x " * 5000))) < 600


def test_an_error_of_the_user_contains_its_fix() -> None:
    def fail() -> CheckRow:
        raise ConfigError("--device tpu is not a device: use cuda, cpu or auto.")

    assert run_check("precision", fail, "report it") == [
        CheckRow("failed", "precision", "--device tpu is not a device: use cuda, cpu or auto.")
    ]


def test_ctrl_c_ends_the_command() -> None:
    def interrupt() -> CheckRow:
        raise InterruptError("stopped at step 1; to resume, run the same command again", 75)

    with pytest.raises(InterruptError, match=r"^interrupted\.$") as caught:
        run_check("pretraining", interrupt)
    assert caught.value.exit_code == 75


def test_what_a_check_warns_about_is_part_of_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    def check() -> list[CheckRow]:
        logging.getLogger("mae_dat.training.loop").warning("the learning rate is %s", "0")
        logging.getLogger("another.package").warning("deprecated")
        return [CheckRow("ok", "first", "done"), CheckRow("ok", "second", "done")]

    handlers = list(logging.getLogger().handlers)
    first, second = run_check("runs", check)
    assert first == CheckRow("ok", "first", "done")
    assert second == CheckRow("warning", "second", "done\nthe learning rate is 0")
    assert logging.getLogger().handlers == handlers
    assert capsys.readouterr().err == ""
