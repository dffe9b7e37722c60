"""The command line of a configuration: its help text, and its flags in the words that were typed."""

import argparse
import dataclasses
import inspect
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from mae_dat.config.errors import UsageError, similar_words, suggest
from mae_dat.config.flags import RENAMED, REQUIRED, Flag, WrongValueError

MAX_WIDTH = 100
_NO_GROUP, _LAST_GROUP = "flags", "other flags"
_METAVARS = {
    "data_path": "DIR", "val_path": "DIR", "output_dir": "DIR", "log_dir": "DIR", "job_dir": "DIR",
    "checkpoint": "MODEL", "resume": "MODEL", "finetune": "MODEL", "teacher": "TOKENIZER", "tokenizer": "TOKENIZER",
    "device": "DEVICE", "model": "NAME", "names": "TITLE", "images": "PATH", "suite": "SUITE", "config": "FILE",
    "manifest": "FILE", "classes": "FILE", "subset": "FILE", "index": "DIR", "arms": "NAME", "cross_arms": "NAME",
    "pretrainings": "NAME", "pretrain_config": "FILE", "finetune_config": "FILE", "allow_change": "FLAG",
    "calibrate": "DIR", "baseline": "TITLE", "views": "VIEW", "partition": "NAME", "account": "NAME", "qos": "NAME",
    "python": "COMMAND", "crop_scale": ("MIN", "MAX"), "cutmix_minmax": ("MIN", "MAX"), "scale_jitter": ("MIN", "MAX"),
}  # fmt: skip
_METAVARS_BY_KIND = {int: "N", float: "X", str: "TEXT"}
_MESSAGES = (  # argparse's, in the words of the others
    ("^argument ", ""),
    (": expected one argument", " needs a value"),
    (r": expected (\d+) arguments", r" needs \1 values"),
    (": ignored explicit argument ", " takes no value, got "),
)
CONFIG_FLAG = Flag(
    "config",
    None,
    str,
    nullable=True,
    help="YAML file of flags, or the name of a recipe (`mae-dat recipes`). Flags on the command line take precedence.",
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command line: how it is called, what it does, its flags, and two examples."""

    program: str
    description: str
    flags: Sequence[Flag]
    examples: Sequence[str] = ()
    usage: str | None = None
    """What follows the program in the usage line (default: `[flags]` and the positional arguments)."""

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """Return the values of the flags that the words set, by name.

        Raises UsageError for an unknown flag or a wrong value. `--help` prints the help and exits with code 0.
        """
        parser = self._parser()
        found, rest = parser.parse_known_intermixed_args([_with_underscores(word) for word in words])
        given = vars(found)
        if rest:
            raise UsageError(self._unknown(rest))
        values = {flag.name: self._convert(flag, given[flag.name]) for flag in self.flags if flag.name in given}
        missing = [
            (flag.positional or f"--{flag.name}") + (f" ({', '.join(map(str, flag.choices))})" if flag.choices else "")
            for flag in self.flags
            if flag.default is REQUIRED and flag.name not in values
        ]
        if missing and CONFIG_FLAG.name not in values:  # otherwise the file may contain them
            raise UsageError(f"{self.program} needs {' and '.join(missing)}. {self._see_help()}")
        return values

    def help(self) -> str:
        """Return the text of `--help`, as wide as the terminal."""
        return self._parser().format_help()

    def _parser(self) -> argparse.ArgumentParser:
        arguments = [_title(flag) for flag in self.flags if flag.positional and flag.default is REQUIRED]
        flags = [] if all(flag.positional for flag in self.flags) else ["[flags]"]
        optional = [_title(flag) for flag in self.flags if flag.positional and flag.default is not REQUIRED]
        arguments += [f"[{' '.join(optional)}]"] if optional else []
        parser = _Parser(
            prog=self.program,
            usage=f"%(prog)s {self.usage or ' '.join([*flags, *arguments])}",
            description=self.description,
            epilog="\n".join(["examples:", *(f"  {example}" for example in self.examples)]) if self.examples else None,
            formatter_class=_Formatter,
            add_help=False,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        parser.see_help = self._see_help()
        groups: dict[str, argparse._ArgumentGroup] = {}
        grouped = False
        for flag in self.flags:
            title, description = _heading(flag)
            grouped = grouped or bool(flag.group)
            if title == _NO_GROUP and grouped:
                title = _LAST_GROUP
            if title not in groups:
                groups[title] = parser.add_argument_group(title, description)
            _add_flag(groups[title], flag)
        title = _LAST_GROUP if grouped else _NO_GROUP
        last = groups.get(title) or parser.add_argument_group(title)
        last.add_argument("-h", "--help", action="help", help="Print this help.")
        return parser

    def _convert(self, flag: Flag, value: Any) -> Any:
        try:
            return flag.convert(value)
        except WrongValueError as error:
            text = " ".join(value) if isinstance(value, list) else value
            raise UsageError(f"{_title(flag)} must be {error}, got {text!r}. {self._see_help()}") from error

    def _unknown(self, words: Sequence[str]) -> str:
        wrong = next((word for word in words if word.startswith("-")), None)
        if wrong is None:
            return f"{self.program}: there is no flag before {' '.join(words)!r}. {self._see_help()}"
        flag = wrong.partition("=")[0]
        if renamed := RENAMED.get(flag.lstrip("-")):
            return f"{self.program} has no flag {flag}: it is --{renamed} now. {self._see_help()}"
        names = [flag.name for flag in self.flags if not flag.positional]
        similar = similar_words(
            flag.lstrip("-"), [*names, *(f"no_{flag.name}" for flag in self.flags if flag.is_switch)]
        )
        hint = f"did you mean {' or '.join(f'--{name}' for name in similar)}? " if similar else ""
        return f"{self.program} has no flag {flag}: {hint}{self._see_help()}"

    def _see_help(self) -> str:
        return f"`{self.program} --help` lists all flags."


def split_verb(words: Sequence[str], verbs: Sequence[str]) -> tuple[str, list[str]]:
    """Return the verb of a command line, of one word or two, and the other words.

    Raises UsageError, with a suggestion, for an unknown verb.
    """
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in verbs:
            return name, list(words[count:])
    first, second = words[0], words[1] if len(words) > 1 else "-"
    kinds = [name.split()[1] for name in verbs if name.startswith(f"{first} ")]
    if kinds and second.startswith("-"):
        raise UsageError(f"{first} needs a kind: {', '.join(kinds)}. `mae-dat {first} --help` lists them.")
    if kinds:
        hint = suggest(second, kinds)
        raise UsageError(f"{first} has no kind {second!r}: {hint} `mae-dat {first} --help` lists them.")
    raise UsageError(f"there is no verb {first!r}: {suggest(first, verbs)} `mae-dat --help` lists all.")


class _Parser(argparse.ArgumentParser):
    """Raises UsageError instead of exiting."""

    see_help = ""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        for pattern, text in _MESSAGES:
            message = re.sub(pattern, text, message)
        raise UsageError(f"{message}. {self.see_help}")


class _Formatter(argparse.HelpFormatter):
    """Wraps each paragraph of a description on its own, and keeps indented lines, such as examples, as they are."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=min(MAX_WIDTH, shutil.get_terminal_size().columns) - 1)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.split("\n\n")
        wrapped = [
            textwrap.indent("\n".join(self._split_lines(part, width - len(indent))), indent) for part in paragraphs
        ]
        return "\n\n".join(part if "\n  " in part else lines for part, lines in zip(paragraphs, wrapped, strict=True))


def _with_underscores(word: str) -> str:
    """Return a flag with underscores for the hyphens in its name; any other word as it is."""
    match = re.fullmatch(r"--([\w-]+)(=.*)?", word, re.DOTALL)
    return f"--{match[1].replace('-', '_')}{match[2] or ''}" if match else word


def _heading(flag: Flag) -> tuple[str, str | None]:
    """Return the title of the section of a flag, and the text below the title, from the docstring of its group."""
    if flag.positional:
        return "arguments", None
    if not flag.group:
        return _NO_GROUP, None
    title, colon, text = " ".join(flag.group.split()).partition(": ")
    return title.removesuffix("."), f"{text[0].upper()}{text[1:]}" if colon else None


def _title(flag: Flag) -> str:
    """Return how the usage line and messages name a flag."""
    if not flag.positional:
        return f"--{flag.name}"
    return f"{flag.positional}..." if flag.count is None else flag.positional


def _add_flag(group: "argparse._ArgumentGroup", flag: Flag) -> None:
    text = help_text(flag).replace("%", "%%")
    if flag.positional:
        nargs = {1: "?", None: "*"}[flag.count]
        group.add_argument(flag.name, nargs=nargs, metavar=flag.positional, help=text)
    elif flag.is_switch:
        _add_switch(group, flag, text)
    else:
        group.add_argument(
            f"--{flag.name}",
            nargs="?" if flag.bare else {1: None, None: "*"}.get(flag.count, flag.count),
            const=flag.bare,
            metavar=_metavar(flag),
            help=text,
        )


def _add_switch(group: "argparse._ArgumentGroup", flag: Flag, text: str) -> None:
    """Add `--name` and `--no_name`; the help shows the second one only where the default is true."""
    positive = f"--{flag.name}"
    negative = f"--no_{flag.name}"
    if flag.default is True:
        group.add_argument(positive, negative, dest=flag.name, action=_Switch, help=text)
    else:
        group.add_argument(positive, dest=flag.name, action=_Switch, help=text)
        group.add_argument(negative, dest=flag.name, action=_Switch, help=argparse.SUPPRESS)


class _Switch(argparse.Action):
    """Sets true for `--name`, false for `--no_name`."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **settings)

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Set the value."""
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def _metavar(flag: Flag) -> Any:
    if flag.choices:
        return f"{{{','.join(flag.choices)}}}"
    return _METAVARS.get(flag.name, _METAVARS_BY_KIND[flag.kind])


def help_text(flag: Flag) -> str:
    """Return the help of a flag with its default, unless the help names it or there is nothing to tell."""
    default = flag.default
    if "default" in flag.help or default is False or default in (REQUIRED, None, (), ""):
        return flag.help
    if default is True:
        text = f"on; off with --no_{flag.name}"
    else:
        text = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in _as_tuple(default))
    if ". " in flag.help:
        return f"{flag.help} Default: {text}."
    return f"{flag.help.removesuffix('.')} (default: {text})."


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def description_of(kind: type[Any]) -> str:
    """Return the docstring of a configuration without its example in Python: the description in the help."""
    return inspect.cleandoc(kind.__doc__ or "").partition("\n\nExamples:")[0]
