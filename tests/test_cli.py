"""The table of verbs: every verb shows its help and parses its flags without torch; mistakes get a suggestion."""

import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys

import pytest
from paths import ROOT
from tiny_runs import environment

import mae_dat
from mae_dat.cli import family_overview, overview, run
from mae_dat.config.arguments import Command, help_text
from mae_dat.config.commands.submit import launcher_command
from mae_dat.config.errors import UsageError
from mae_dat.config.parse import run_command
from mae_dat.verbs import FAMILIES, LAUNCHER, VERBS

REQUIRED = {
    "completion": "bash", "convert": "OUT net.safetensors --to timm", "corrupt": "DIR", "get": "mae_dat_demo",
    "predict": "photo.jpg",
    "report": "OUT", "scan": "DIR", "split": "DIR OUT",
}  # fmt: skip
"""The words that a verb cannot do without."""
SCRIPTS = {"main_pretrain.py": "pretrain", "main_finetune.py": "finetune"}
HEAVY = {"torch", "torchvision", "timm", "numpy", "yaml", "rich"}
"""Packages that take a tenth of a second each, or more."""
CODE_WITHOUT_TORCH = """
import contextlib, io, sys
from mae_dat.cli import run
from mae_dat.verbs import VERBS
for name in ('', *VERBS, 'visualize', 'tokenizer', 'submit'):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        run([*name.split(), '--help'])
    if heavy := HEAVY & set(sys.modules):
        sys.exit(f'{name} imports {heavy}')
"""
CODE_OF_SCRIPT = """
import runpy, sys
for sys.argv in ([SCRIPT, '--help'], [SCRIPT, '--epochz', '3', 'main_pretrain.py']):
    try:
        runpy.run_path(SCRIPT, run_name='__main__')
    except SystemExit as end:
        print(end.code, 'torch' in sys.modules, file=sys.stderr)
"""


def find(place: str) -> object:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"mae_dat.{module}"), name)


def command_lines() -> list[Command]:
    """Every command line with a help: verbs, scripts and the launcher."""
    return [
        *(verb.command_line(f"mae-dat {name}") for name, verb in VERBS.items()),
        *(VERBS[verb].command_line(script) for script, verb in SCRIPTS.items()),
        *(launcher_command(program) for program in ("submit.py", f"mae-dat {LAUNCHER}")),
    ]


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_a_function_that_takes_its_configuration(name: str) -> None:
    verb = VERBS[name]
    config = verb.load(REQUIRED.get(name, "").split(), name)
    assert dataclasses.is_dataclass(config)
    function = find(verb.run if isinstance(verb.run, str) else verb.run(config))
    assert [*inspect.signature(function).parameters] == ["config"]  # type: ignore[arg-type]
    kind = inspect.signature(function).parameters["config"].annotation  # type: ignore[arg-type]
    assert isinstance(config, kind if isinstance(kind, type) else kind.__args__)
    assert type(config).verb == name


# ---- help ----


def test_the_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert run(arguments) == 0
        text = capsys.readouterr().out
        assert all(f"  {name} " in text and verb.summary in text for name, verb in VERBS.items())
        assert f"  {LAUNCHER} " in text
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"mae-dat {mae_dat.__version__}\n"


@pytest.mark.parametrize("first", FAMILIES)
def test_the_first_word_of_verbs_of_two_words_lists_them(first: str, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [name.split()[1] for name in VERBS if name.startswith(f"{first} ")]
    for arguments in ([first], [first, "--help"]):
        assert run(arguments) == 0
        text = capsys.readouterr().out
        assert re.findall(r"^  (\w+)  ", text, re.MULTILINE) == kinds
    assert {name.split()[0] for name in VERBS if " " in name} == set(FAMILIES)


@pytest.mark.parametrize("command", command_lines(), ids=lambda command: command.program)
def test_every_help_reads_well_in_80_columns(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = command.help()
    check_layout(text)
    assert text.startswith(f"usage: {command.program} ")
    assert "None)" not in text
    for flag in command.flags:
        assert flag.help.endswith("."), f"--{flag.name} has no help"
        assert help_text(flag).count("(default: ") + help_text(flag).count(" Default: ") <= 1, flag.name


def test_the_overviews_read_well_in_80_columns() -> None:
    for text in (overview(), *map(family_overview, FAMILIES)):
        check_layout(text)


def check_layout(text: str) -> None:
    """Check width, paths of this machine, and the two examples at the end."""
    assert max(map(len, text.splitlines())) <= 80
    assert str(ROOT) not in text
    assert not re.search(r"(?<![\w.])/(root|home|work|tmp)/", text)
    *_, title, first, second = text.splitlines()
    assert title == "examples:"
    assert re.match(r"  (mae-dat|python) ", first)
    assert re.match(r"  (mae-dat|python) ", second)


def test_every_example_can_be_parsed() -> None:
    for name, verb in VERBS.items():
        assert len(verb.examples) == 2
        for example in verb.examples:
            words = shlex.split(example.partition(" > ")[0])
            assert words[: 1 + len(name.split())] == ["mae-dat", *name.split()]
            verb.load(words[1 + len(name.split()) :], name)


def test_no_help_imports_torch_or_another_heavy_package() -> None:
    code = CODE_WITHOUT_TORCH.replace("HEAVY", str(HEAVY))
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", [*SCRIPTS, "submit.py"])
def test_scripts_print_help_and_reject_wrong_flags_without_torch(script: str) -> None:
    code = CODE_OF_SCRIPT.replace("SCRIPT", repr(script))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert (lines[0], lines[-1]) == ("0 False", "2 False"), done.stderr
    assert done.stdout.startswith(f"usage: {script} [flags]")


# ---- mistakes ----


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluat --data_path DIR", "there is no verb 'evaluat': did you mean evaluate?"),
        (
            "tokenizer trian",
            "tokenizer has no kind 'trian': did you mean train? `mae-dat tokenizer ",
        ),
        ("tokenzier train", "there is no verb 'tokenzier': did you mean tokenizer train or tokenizer distill?"),
        ("visualise", "there is no verb 'visualise': did you mean visualize "),
        ("visualize word", "visualize has no kind 'word': did you mean words?"),
        (
            "visualize --images DIR",
            "visualize needs a kind: reconstruction, attention, words, adversary. ",
        ),
        ("pretrian", "there is no verb 'pretrian': did you mean pretrain"),
        ("sumbit finetune", "there is no verb 'sumbit': did you mean submit?"),
        ("zzz", "there is no verb 'zzz': known are pretrain, finetune, "),
    ],
)
def test_an_unknown_verb_gets_a_suggestion(words: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        run(words.split())
    assert str(error.value).startswith(message)
    assert "--help` lists " in str(error.value)


@pytest.mark.parametrize("name", [*VERBS, LAUNCHER])
def test_a_wrong_flag_of_any_verb_ends_with_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Misspelled, unknown, and with a value of the wrong type, written in every way."""
    command = launcher_command(name) if name == LAUNCHER else VERBS[name].command_line(name)
    names = [flag.name for flag in command.flags if not flag.positional]
    flag = max(names, key=len, default="")
    wrong = f"{flag[:-1]}q"
    misspelled = [[f"--{wrong}", "1"], [f"--{wrong}=1"], [f"--{wrong.replace('_', '-')}"]] if flag else []
    number = next((flag.name for flag in command.flags if flag.kind in (int, float)), None)
    for attempt in [["--zzzzzz"], *misspelled, *([[f"--{number}=many"]] if number else [])]:
        words = [*name.split(), *attempt]
        with pytest.raises(SystemExit) as ended:
            sys.exit(run_command(lambda words=words: run(words)))  # type: ignore[misc]
        message = capsys.readouterr().err
        assert (ended.value.code, message.count("\n")) == (2, 1), message
        if attempt in misspelled:
            assert f"did you mean --{flag}" in message


def test_a_verb_as_a_process_names_itself_in_its_help() -> None:
    command = [sys.executable, "-m", "mae_dat", "scan"]
    done = subprocess.run([*command, "--help"], env=environment(COLUMNS="80"), capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: mae-dat scan ")
    assert done.stdout.endswith("examples:\n  mae-dat scan DIR\n  mae-dat scan DIR --verify\n")
    done = subprocess.run([*command[:-1], "scna"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no verb 'scna': did you mean scan")
