"""Flags of `mae-dat list` and `mae-dat get`."""

import dataclasses

from mae_dat.config.command_config import CommandConfig


@dataclasses.dataclass(frozen=True)
class ListConfig(CommandConfig):
    """List the released weights: sizes, licenses, and which of them are on this machine.

    With names, print all that is known about these. A name can stand for a file in --finetune, --resume, --checkpoint
    and --tokenizer; the file is downloaded when it is first used.
    """

    verb = "list"
    names: tuple[str, ...] = dataclasses.field(default=(), metadata={"positional": "NAME"})
    """Names of released weights (default: a table of all)."""


@dataclasses.dataclass(frozen=True)
class GetConfig(CommandConfig):
    """Download released weights into $MAE_DAT_HOME/weights (~/.cache/mae_dat/weights).

    For a machine without internet: run `mae-dat get NAME --output_dir DIR` where there is internet, copy DIR, and set
    MAE_DAT_MIRROR=DIR.
    """

    verb = "get"
    names: tuple[str, ...] = dataclasses.field(metadata={"positional": "NAME"})
    """Names of released weights; `mae-dat list` shows them."""
    output_dir: str | None = None
    """Folder for the files (default: $MAE_DAT_HOME/weights)."""
    trust: bool = False
    """Accept a file from a plain http address although its sha256 is not known."""
