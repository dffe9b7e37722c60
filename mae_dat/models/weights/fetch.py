"""List released weights, or download those named into $MAE_DAT_HOME/weights (~/.cache/mae_dat/weights).

For a machine without internet: run --mirror DIR where there is internet, copy DIR, and set MAE_DAT_MIRROR=DIR.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Column, Table

from mae_dat.config.parse import load_config
from mae_dat.storage.released import (
    ReleasedWeights,
    fetch,
    find_local_file,
    find_released,
    released_weights,
    weights_folder,
)

NON_COMMERCIAL = "CC-BY-NC-4.0"


@dataclasses.dataclass(frozen=True)
class FetchConfig:
    """Released weights."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which to download; none for the list."""
    list: bool = False
    """Show the list, or with names what is known of these; download nothing."""
    trust: bool = False
    """Take files over plain http of which no sha256 is known."""
    mirror: str | None = None
    """Folder to download into."""


def _table(entries: dict[str, ReleasedWeights]) -> Table:
    """Return a table with a row for each of the weights; names are not wrapped, so that they can be copied."""
    name = Column("name", no_wrap=True, min_width=max(map(len, entries)))
    headings = ("what it is", "MB", "licence", "sha256", "here")
    rows = Table(name, *headings, box=None, pad_edge=False)
    for entry in entries.values():
        path = find_local_file(entry)
        size = path.stat().st_size if path else entry.size
        licence = NON_COMMERCIAL if NON_COMMERCIAL in entry.licence else entry.licence.partition(" (")[0]
        sha256 = "shipped" if entry.embedded else "known" if entry.sha256 else "first use"
        rows.add_row(
            entry.name, entry.what, f"{size / 1e6:,.0f}" if size else "", licence, sha256, "" if path is None else "yes"
        )
    return rows


def _details(entry: ReleasedWeights) -> str:
    """Return what the registry records about one of the weights, as text."""
    facts = {
        "name": entry.name,
        "what it is": entry.what,
        "licence": entry.licence,
        "published": entry.origin,
        "addresses": "\n            ".join(entry.urls),
        "file": entry.file,
        "sha256": entry.sha256 or ("on its card" if entry.embedded else "not published: that of the first use counts"),
        "MB": entry.size and f"{entry.size / 1e6:,.0f}",
        "pixels": entry.input_size,
        "expected": ", ".join(f"{key} {value}" for key, value in entry.expected.items()),
    }
    return "\n".join(f"{key:<11} {value}" for key, value in facts.items() if value)


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    screen = Console()
    config = load_config(FetchConfig, arguments, __doc__ or "")
    entries = {name: find_released(name) for name in config.names}
    if not entries:
        screen.print(_table(released_weights()))
        screen.print(
            f"\n{NON_COMMERCIAL}: not for commercial use. Names stand for paths: --finetune, --resume, "
            f"--tokenizer. Downloads go to {weights_folder()}.",
            highlight=False,
        )
    for name, entry in entries.items():
        if config.list:
            screen.print(_details(entry), end="\n\n", soft_wrap=True, highlight=False)
        else:
            path = fetch(entry, config.trust, Path(config.mirror) if config.mirror else None)
            screen.print(f"{name}: {path}", soft_wrap=True, highlight=False)
