"""The commands of the README and of the documentation can be given: their verbs, flags and values exist."""

import re
import shlex
from collections.abc import Iterator

import pytest
from paths import ROOT

from mae_dat.config.arguments import split_verb
from mae_dat.config.commands.submit import JobConfig, launcher_command
from mae_dat.config.errors import UsageError
from mae_dat.config.flags import build_config
from mae_dat.launch.submit import split_command
from mae_dat.verbs import LAUNCHER, VERBS

DOCUMENTS = {path.name: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
SHELL_BLOCK = re.compile(r"^( *)```(?:bash|sh)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|\$ )(?:mae-dat|python -m mae_dat) ([a-z].*)")


def commands(document: str) -> Iterator[list[str]]:
    """The arguments of every `mae-dat VERB ...` in a shell block, without comments, dots, and brackets of options."""
    for _, block in SHELL_BLOCK.findall(document):
        for line in block.replace("\\\n", " ").splitlines():
            if match := COMMAND.search(line.strip()):
                text = re.sub(r"\.\.\.|\[(?=-)|(?<=[\w/])\](?=\s|$)|[;>].*", " ", match[1])
                yield shlex.split(text.replace("%a", "0"), comments=True)  # %a: the index of an array


def check_command(words: list[str]) -> None:
    """Raise UsageError for a verb, flag or value that does not exist."""
    if words[0] == LAUNCHER:
        flags, words = split_command(words[1:])
        build_config(JobConfig, launcher_command(LAUNCHER).parse(flags))
        if not words or words[0].endswith(".py"):
            return
    name, arguments = split_verb(words, list(VERBS))
    VERBS[name].command_line(name).parse(arguments)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_documented_commands_can_be_given(name: str) -> None:
    for words in commands(DOCUMENTS[name]):
        if words[-1] == "--help" or "KIND" in words:
            continue
        try:
            check_command(words)
        except UsageError as error:
            pytest.fail(f"{name}: mae-dat {shlex.join(words)}: {error}")


def test_the_check_sees_faults() -> None:
    block = "```bash\nmae-dat finetune --data_path DIR [--dat]  # plain\nmae-dat submit --nodes 2 finetune ...\n```\n"
    assert list(commands(block)) == [
        ["finetune", "--data_path", "DIR", "--dat"],
        ["submit", "--nodes", "2", "finetune"],
    ]
    assert sum(len(list(commands(document))) for document in DOCUMENTS.values()) > 60
    for wrong in ("finetune --data DIR", "robustness", "finetune --epochs many", "submit --node 2 finetune"):
        with pytest.raises(UsageError):
            check_command(shlex.split(wrong))
