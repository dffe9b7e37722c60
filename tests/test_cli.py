"""The table of verbs: every verb loads its configuration without torch, unknown ones get a suggestion."""

import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest
from paths import ROOT
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
    kind = inspect.signature(function).parameters["config"].annotation  # type: ignore[arg-type]
    assert isinstance(config, kind if isinstance(kind, type) else kind.__args__)
    assert type(config).verb == name


def _required(name: str) -> list[str]:
    required = {"convert": "OUT net.safetensors --to timm", "report": "OUT", "scan": "DIR", "get": "mae_dat_demo"}
    return required.get(name, "").split()


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


HEAVY = {"torch", "torchvision", "timm", "numpy", "yaml", "rich"}


def test_no_help_imports_torch() -> None:
    """Also not numpy, yaml and rich, which take a tenth of a second each; the launcher needs some of them."""
    code = (
        "import contextlib, io, sys\nfrom mae_dat.cli import VERBS, run\n"
        "for name in ('', *VERBS, 'visualize', 'tokenizer', 'submit'):\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        run([*name.split(), '--help'])\n"
        f"    heavy = {HEAVY} & set(sys.modules)\n"
        "    if 'torch' in heavy or (heavy and name != 'submit'): sys.exit(f'{name} imports {heavy}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", ["main_pretrain.py", "main_finetune.py", "submit.py"])
def test_scripts_print_help_and_reject_wrong_flags_without_torch(script: str) -> None:
    code = (
        "import runpy, sys\n"
        f"for sys.argv in ([{script!r}, '--help'], [{script!r}, '--epochz', '3', 'main_pretrain.py']):\n"
        "    try:\n"
        f"        runpy.run_path({script!r}, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print(end.code, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert (lines[0], lines[-1]) == ("0 False", "2 False"), done.stderr
    assert done.stdout.startswith(f"usage: {script} [flags]")


def test_a_verb_as_a_process_names_itself_in_its_help() -> None:
    command = [sys.executable, "-m", "mae_dat", "scan"]
    done = subprocess.run([*command, "--help"], env=environment(COLUMNS="80"), capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mae-dat scan ")
    assert done.stdout.endswith("examples:\n  mae-dat scan DIR\n  mae-dat scan DIR --verify\n")
    done = subprocess.run([*command[:-1], "scna"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no verb 'scna': did you mean scan")
