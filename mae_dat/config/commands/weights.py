"""Flags of `mae-dat list` and `mae-dat get`."""

import dataclasses
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class ListConfig:
    """List the released weights: sizes, licenses, and which of them are on this machine.

    With names: everything that is known about these. A name can be used wherever a weights file is expected
    (--finetune, --resume, --checkpoint, --tokenizer); it is downloaded at the first use.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Released names (default: a table of all)."""


@dataclasses.dataclass(frozen=True)
class GetConfig:
    """Download released weights into $MAE_DAT_HOME/weights (~/.cache/mae_dat/weights).

    For a machine without internet: run `mae-dat get NAME --output_dir DIR` where there is internet, copy DIR, and set
    MAE_DAT_MIRROR=DIR.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """Which to download."""
    output_dir: str | None = None
    """Folder to download into (default: the cache)."""
    trust: bool = False
    """Accept a file from a plain http address although no sha256 is known for it."""
