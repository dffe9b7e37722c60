"""The command table: every command runs by name, unknown ones get a suggestion, and listing them imports no torch."""

import importlib
import inspect
import subprocess
import sys

import pytest
from tiny_runs import environment

from mae_dat.cli import COMMANDS, overview, run
from mae_dat.config.errors import ConfigError


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_that_takes_arguments(name: str) -> None:
    main = importlib.import_module(COMMANDS[name].module).main
    assert next(iter(inspect.signature(main).parameters)) == "arguments"


def test_the_overview_lists_every_command_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        run(arguments)
        text = capsys.readouterr().out
        assert all(f"  {name} " in text and command.summary in text for name, command in COMMANDS.items())
    assert max(map(len, overview().splitlines())) <= 80


def test_an_unknown_command_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"no command 'robustnes': did you mean robustness"):
        run(["robustnes", "--data", "DIR"])


def test_listing_the_commands_imports_no_torch() -> None:
    code = "import sys; from mae_dat.cli import run; run([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True).returncode == 0


def test_a_command_as_a_process_names_itself_in_its_help() -> None:
    command = [sys.executable, "-m", "mae_dat", "scan"]
    done = subprocess.run([*command, "--help"], env=environment(COLUMNS="80"), capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mae-dat scan ")
    done = subprocess.run([*command[:-1], "scna"], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (64, "error: there is no command 'scna': did you mean scan?\n")
