"""Flags of `mae-dat completion`."""

import dataclasses
from typing import Literal

from mae_dat.config.command_config import CommandConfig


@dataclasses.dataclass(frozen=True)
class CompletionConfig(CommandConfig):
    """Print a script that completes verbs, flags and their values when you press the Tab key.

    bash: add `eval "$(mae-dat completion bash)"` to ~/.bashrc.

    zsh: add `eval "$(mae-dat completion zsh)"` to ~/.zshrc, after `autoload -U compinit; compinit`.

    fish: run `mae-dat completion fish > ~/.config/fish/completions/mae-dat.fish` once, and again after an update.
    """

    verb = "completion"
    shell: Literal["bash", "zsh", "fish"] = dataclasses.field(metadata={"positional": "SHELL"})
    """bash, zsh or fish."""
