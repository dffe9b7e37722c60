"""The table of verbs: every verb loads its configuration without torch, unknown ones get a suggestion."""

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest
from tiny_runs import environment

from mae_dat.cli import LAUNCHER, VERBS, overview, run
from mae_dat.config.errors import UsageError


def find(place: str) -> object:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"mae_dat.{module}"), name)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_function_that_takes_its_configuration(name: str) -> None:
    verb = VERBS[name]
    config = verb.load(_required(name), name)
    assert dataclasses.is_dataclass(config)
    function = find(verb.run if isinstance(verb.run, str) else verb.run(config))
    assert [*inspect.signature(function).parameters] == ["config"]  # type: ignore[arg-type]
    assert type(config).__name__ in str(inspect.signature(function))  # type: ignore[arg-type]


def _required(name: str) -> list[str]:
    required = {"convert": ["OUT", "net.safetensors", "--to", "timm"], "report": ["OUT"], "scan": ["DIR"]}
    return required.get(name, [])


def test_the_overview_lists_every_verb_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert run(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text and verb.summary in text for name, verb in VERBS.items())
        assert f"  {LAUNCHER} " in text
    assert max(map(len, overview().splitlines())) <= 80


def test_an_unknown_verb_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"no verb 'evaluat': did you mean evaluate"):
        run(["evaluat", "--data_path", "DIR"])
    with pytest.raises(UsageError, match=r"no verb 'tokenizer trian': did you mean tokenizer train"):
        run(["tokenizer", "trian"])


def test_no_help_imports_torch() -> None:
    code = (
        "import contextlib, io, sys\nfrom mae_dat.cli import VERBS, run\n"
        "for name in ('', *VERBS, 'submit', 'visualize', 'tokenizer'):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        run([*name.split(), '--help'])\n"
        "    if 'torch' in sys.modules: sys.exit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_verb_as_a_process_names_itself_in_its_help() -> None:
    command = [sys.executable, "-m", "mae_dat", "scan"]
    done = subprocess.run([*command, "--help"], env=environment(COLUMNS="80"), capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mae-dat scan ")
    assert done.stdout.endswith("examples:\n  mae-dat scan DIR\n  mae-dat scan DIR --verify\n")
    done = subprocess.run([*command[:-1], "scna"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no verb 'scna': did you mean scan")
