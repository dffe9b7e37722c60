"""The commands that list and download released weights."""

import logging
import shutil
import textwrap
from pathlib import Path

from mae_dat.config.commands.weights import GetConfig, ListConfig
from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.config.terminal import print_text
from mae_dat.storage.released import (
    ReleasedWeights,
    fetch,
    find_local_file,
    find_released,
    released_weights,
    weights_folder,
)

NON_COMMERCIAL = "CC-BY-NC-4.0"
_MAX_WIDTH = 100


def _table(entries: dict[str, ReleasedWeights]) -> str:
    """Return a table of the weights: a line with name, size, license and whether they are here, then a description."""
    lines = [_row("name", "MB", "license", "here")]
    for entry in entries.values():
        path = find_local_file(entry)
        size = path.stat().st_size if path else entry.size
        licence = NON_COMMERCIAL if NON_COMMERCIAL in entry.licence else entry.licence.partition(" (")[0]
        lines.append(_row(entry.name, f"{size / 1e6:,.0f}" if size else "", licence, "yes" if path else ""))
        lines += _wrapped(entry.what, "  ", "  ")
    return "\n".join(lines)


def _row(name: str, size: str, licence: str, here: str) -> str:
    return f"{name:<41}{size:>6}  {licence:<14}{here}".rstrip()


def _wrapped(text: str, first_indent: str, indent: str) -> list[str]:
    """Return text in lines as wide as the terminal; words, such as addresses, are not broken."""
    width = min(shutil.get_terminal_size().columns, _MAX_WIDTH) - 1
    return textwrap.wrap(
        text,
        width,
        initial_indent=first_indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _downloads() -> str:
    """Return where downloads go, or why they cannot go anywhere."""
    try:
        return f"Downloads go to {weights_folder()}."
    except MissingInputError as error:
        return f"Downloads need a folder: {error}"


def _details(entry: ReleasedWeights) -> str:
    """Return what the registry records about one of the weights, as text."""
    facts = {
        "name": entry.name,
        "what it is": entry.what,
        "license": entry.licence,
        "published": entry.origin,
        "addresses": " ".join(entry.urls),
        "file": entry.file,
        "sha256": entry.sha256 or ("on its card" if entry.embedded else "recorded at the first download"),
        "MB": entry.size and f"{entry.size / 1e6:,.0f}",
        "pixels": entry.input_size,
        "expected": ", ".join(f"{key} {value}" for key, value in entry.expected.items()),
    }
    rows = [_wrapped(str(value), f"{key:<12}", 12 * " ") for key, value in facts.items() if value]
    return "\n".join(line for row in rows for line in row)


def list_weights(config: ListConfig) -> None:
    """Run `mae-dat list`: print the table of released weights, or the details of the named ones."""
    for entry in [find_released(name) for name in config.names]:
        print_text(f"{_details(entry)}\n")
    if not config.names:
        print_text(_table(released_weights()))
        print_text(f"\n{NON_COMMERCIAL}: not for commercial use.")
        print_text("--finetune, --resume, --checkpoint and --tokenizer also take these names.")
        print_text(_downloads())


def get_weights(config: GetConfig) -> None:
    """Run `mae-dat get`: download weights and print their paths. Raises ConfigError without a name, DownloadError."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not config.names:
        raise ConfigError("no name of weights given: give one or more names; `mae-dat list` shows them.")
    folder = Path(config.output_dir) if config.output_dir else None
    for entry in [find_released(name) for name in config.names]:
        print_text(f"{entry.name}: {fetch(entry, config.trust, folder)}")
