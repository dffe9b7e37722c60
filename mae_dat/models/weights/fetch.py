"""The commands that list and download released weights."""

import logging
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from mae_dat.config.commands.weights import GetConfig, ListConfig
from mae_dat.config.errors import ConfigError
from mae_dat.storage.released import (
    ReleasedWeights,
    fetch,
    find_local_file,
    find_released,
    released_weights,
    weights_folder,
)

NON_COMMERCIAL = "CC-BY-NC-4.0"


def _table(entries: dict[str, ReleasedWeights]) -> Table:
    """Return a table with a row for each of the weights; names are not wrapped, so that they can be copied."""
    name = Column("name", no_wrap=True, min_width=max(map(len, entries)))
    headings = ("what it is", "MB", "license", "sha256", "here")
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


def list_weights(config: ListConfig) -> None:
    """Run `mae-dat list`: print the table of released weights, or what is known about those named."""
    screen = Console()
    entries = [find_released(name) for name in config.names]
    for entry in entries:
        screen.print(_details(entry), end="\n\n", soft_wrap=True, highlight=False)
    if not entries:
        screen.print(_table(released_weights()))
        screen.print(
            f"\n{NON_COMMERCIAL}: not for commercial use. A name can stand for a file in --finetune, --resume, "
            f"--checkpoint and --tokenizer. Downloads go to {weights_folder()}.",
            highlight=False,
        )


def get_weights(config: GetConfig) -> None:
    """Run `mae-dat get`: download weights and print their paths. Raises ConfigError without a name, DownloadError."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not config.names:
        raise ConfigError("which weights? Give one or more names; `mae-dat list` shows them.")
    folder = Path(config.output_dir) if config.output_dir else None
    for entry in [find_released(name) for name in config.names]:
        print(f"{entry.name}: {fetch(entry, config.trust, folder)}")
