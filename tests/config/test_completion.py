"""Completion in real shells: verbs, flags, known values, and files otherwise."""

import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from mae_dat.cli import run
from mae_dat.config.recipes import recipe_names
from mae_dat.verbs import VERBS

DATS = ["none", "released", "paper", "symbolic", "random", "reconstruction"]
# The command line up to the cursor, and all or some of what completes its last word.
COMPLETE = [
    ("mae-dat fine", ["finetune"]),
    ("mae-dat vis", ["visualize"]),
    ("mae-dat visualize w", ["words"]),
    ("mae-dat tokenizer ", ["train", "distill"]),
    ("mae-dat finetune --dat_b", ["--dat_batch_share"]),
    ("mae-dat visualize attention --ro", ["--rollout"]),
    ("mae-dat finetune --dat ", DATS),
    ("mae-dat finetune --dat=sym", ["symbolic"]),
    ("mae-dat finetune --epochs 3 --dat re", ["released", "reconstruction"]),
    ("mae-dat finetune --config small_f", ["small_finetune"]),
    ("mae-dat compare --finetune_config demo_", ["demo_finetune", "demo_pretrain"]),
    ("mae-dat convert OUT x.onnx --to ", ["timm", "mae", "hf", "onnx", "export"]),
    ("mae-dat completion ", ["bash", "zsh", "fish"]),
    ("mae-dat submit --nodes 4 fine", ["finetune"]),
    ("mae-dat submit --cluster lo", ["local"]),
    ("mae-dat submit --nodes 4 finetune --at ", ["none", "pgd", "advprop"]),
    ("mae-dat submit tokenizer train --gan_s", ["--gan_start"]),
]
FILES = ["mae-dat finetune --resume ", "mae-dat scan ", "mae-dat visualize words --images ", "mae-dat convert "]


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The script of the shell that the test names, in a folder with one file and one folder."""
    shell = request.param
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert run(["completion", shell]) == 0
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "image.jpg").touch()
    return path


def in_bash(script: Path, line: str) -> list[str]:
    """What the function of the script proposes, in the way in which bash calls it."""
    words = [word for part in line.split(" ") for word in re.split("(=)", part) if word or part == ""]
    code = f"source {shlex.quote(str(script))}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; "
    code += '_mae_dat; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", code], cwd=script.parent / "here", capture_output=True, text=True)
    assert not done.stderr.replace("bash: line 1: compopt: not currently executing completion function\n", "")
    return done.stdout.split()


@pytest.mark.parametrize("script", ["bash"], indirect=True)
def test_bash_completes_verbs_flags_and_values(script: Path) -> None:
    for line, expected in COMPLETE:
        assert sorted(in_bash(script, line)) == sorted(expected), line
    assert set(in_bash(script, "mae-dat ")) == {name.split()[0] for name in [*VERBS, "submit"]}
    assert in_bash(script, "mae-dat -") == ["--help", "--version"]
    flags = [flag.name for flag in VERBS["scan"].command_line("").flags if not flag.positional]
    assert in_bash(script, "mae-dat scan DIR --") == [*(f"--{name}" for name in flags), "--help"]
    assert "--no_pin_mem" in in_bash(script, "mae-dat pretrain --no")
    assert in_bash(script, "mae-dat features ") == in_bash(script, "mae-dat features --")
    assert in_bash(script, "mae-dat finetune --compile ") == in_bash(script, "mae-dat finetune --epochs 3 --")
    assert in_bash(script, "mae-dat finetune --epochs ") == []
    assert in_bash(script, "mae-dat recipes ") == recipe_names()
    for line in FILES:  # nothing from the script, and so the shell's own names of files
        assert in_bash(script, line) == [], line
    check = subprocess.run(["bash", "-c", f"source {script}; complete -p mae-dat"], capture_output=True, text=True)
    assert check.stdout == "complete -o default -F _mae_dat mae-dat\n"


@pytest.mark.parametrize("script", ["fish"], indirect=True)
def test_fish_completes_verbs_flags_and_values(script: Path) -> None:
    lines = [line for line, _ in COMPLETE] + FILES
    code = "; ".join([f"source {script}", *(f"complete -C {shlex.quote(line)}; echo ----" for line in lines)])
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], cwd=script.parent / "here", capture_output=True, text=True
    )
    assert not done.stderr
    answers = done.stdout.split("----\n")
    for (line, expected), answer in zip(COMPLETE, answers, strict=False):
        found = [entry.partition("\t")[0].rpartition("=")[2] for entry in answer.splitlines()]
        assert sorted(found) == sorted(expected), line
    for line, answer in zip(FILES, answers[len(COMPLETE) :], strict=False):
        assert "image.jpg\n" in answer, line
    assert "finetune\tfine-tune a classifier, with or without DAT" in answers[0]


@pytest.mark.parametrize("script", ["zsh"], indirect=True)
def test_zsh_completes_verbs_flags_and_values(script: Path) -> None:
    with ZshTerminal(script) as terminal:
        for line, expected in COMPLETE:
            shown = terminal.complete(line)
            assert all(re.search(rf"(?<![\w-]){re.escape(word)}(?!\w)", shown) for word in expected), (line, shown)
        for line in FILES:
            assert "image.jpg" in terminal.complete(line), line


PROMPT = "\x1b[?2004h"  # zsh waits for a line


class ZshTerminal:
    """An interactive zsh that shows what completes a line: its completion needs a terminal."""

    def __init__(self, script: Path) -> None:
        self.terminal, inside = pty.openpty()
        self.unread = ""
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200", "LINES": "200"}
        # A terminal of its own: without one, zsh has no line to edit.
        command = ["setsid", "--ctty", "zsh", "-f", "-i"]
        here = script.parent / "here"
        self.process = subprocess.Popen(command, cwd=here, env=environment, stdin=inside, stdout=inside, stderr=inside)
        os.close(inside)
        start = "PS1=READY; zstyle ':completion:*' verbose no; setopt no_beep no_list_beep; LISTMAX=999; "
        self.send(f"{start}autoload -U compinit; compinit -u -D; source {script}; stty -echo; echo LOA''DED\n")
        self.read_until("LOADED\r\n")
        self.read_until(PROMPT)

    def __enter__(self) -> "ZshTerminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.terminal)
        self.process.wait()

    def complete(self, line: str) -> str:
        """What zsh shows after the Tab key: the completed line, or a list of possible words."""
        self.send(f"{line}\t\t")
        self.send("\x15echo DO''NE\n")  # after the line is killed
        shown = self.read_until("DONE\r\n")
        self.read_until(PROMPT)
        return shown

    def send(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def read_until(self, text: str) -> str:
        deadline = time.monotonic() + 60
        while text not in self.unread and time.monotonic() < deadline:
            if select.select([self.terminal], [], [], 1)[0]:
                self.unread += os.read(self.terminal, 65536).decode(errors="replace")
        shown, found, self.unread = self.unread.partition(text)
        assert found, shown
        return shown
