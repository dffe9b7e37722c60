"""Decodes every image of a folder once, names the bad ones, and writes a manifest by which later changes are found.

`python -m mae_dat scan DIR` writes DIR/manifest.jsonl (size, sha256, width and height of each image);
`python -m mae_dat scan DIR --verify` compares the files with it: most flipped bits give a picture that decodes, to
other pixels. Shards are compared with their index in both cases. The exit code is 65 if anything is wrong.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.config.parse import load_config
from mae_dat.data.decode import decode_bytes, read_bytes
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.loader import map_in_workers
from mae_dat.data.shards.index import INDEX_FILE
from mae_dat.data.shards.reader import Shards
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.storage.files import atomic_write, prepare_output_folder, sha256_of

MANIFEST = "manifest.jsonl"


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """A look at all images."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = tyro.MISSING
    """Folder of images, or of shards."""
    verify: bool = False
    """Compare with the manifest of an earlier scan, and decode nothing."""
    manifest: str | None = None
    """File of the manifest (default: manifest.jsonl in the folder)."""
    num_workers: int = 4
    """Processes that read and decode."""


def _with_progress(results: Iterator[Any], count: int, console: Console) -> Iterator[Any]:
    """The results, with a bar."""
    with console.task("scan", count) as task:
        for result in results:
            task.advance("")
            yield result


def manifest_entry(root: Path, name: str) -> dict[str, Any]:
    """A line of the manifest. Raises DataError, StorageError."""
    content = read_bytes(root / name)
    width, height = decode_bytes(content, str(root / name)).size
    told = {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {**told, "width": width, "height": height}


def scan(config: ScanConfig, console: Console) -> tuple[int, list[str]]:
    """Decodes all images and writes the manifest of the good ones; returns how many there are and what is wrong.

    Raises DataError for a folder without images, MissingInputError, OutputError, StorageError.
    """
    root = Path(config.folder)
    names = _names(root)
    prepare_output_folder(_manifest(config).parent, "another place with --manifest FILE")
    found = list(
        _with_progress(
            map_in_workers(names, lambda name: manifest_entry(root, name), config.num_workers), len(names), console
        )
    )
    faults = [str(one) for one in found if isinstance(one, DataError)]
    with atomic_write(_manifest(config)) as file:
        for one in found:
            if not isinstance(one, DataError):
                file.write(json.dumps(one).encode() + b"\n")
    return len(names), faults


def verify_manifest(config: ScanConfig, console: Console) -> tuple[int, list[str]]:
    """Compares all files with the manifest; returns how many it lists and what is wrong. Raises DataError for a damaged
    manifest, MissingInputError, StorageError."""
    root, path = Path(config.folder), _manifest(config)
    expected: dict[str, str] = {}
    if not path.is_file():
        raise MissingInputError(f"{path}: no such manifest; python -m mae_dat scan {root} writes it.")
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            facts = json.loads(line)
            expected[facts["path"]] = facts["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}, is damaged ({error}); scan the folder again.") from error

    def look(name: str) -> str:
        found = hashlib.sha256(read_bytes(root / name)).hexdigest()
        return "" if found == expected[name] else f"{root / name}: not the file that was scanned: its sha256 is {found}"

    there = set(_names(root))
    results = _with_progress(map_in_workers(sorted(expected), look, config.num_workers), len(expected), console)
    faults = [str(one) for one in results if one]
    return len(expected), faults + [f"{root / name}: not in {path}" for name in sorted(there - set(expected))]


def scan_shards(config: ScanConfig, console: Console) -> tuple[int, list[str]]:
    """Compares the shards with their index and, without `--verify`, decodes all images; returns how many images there
    are and what is wrong."""
    images = Shards(config.folder, lambda image: torch.zeros(0), labelled=False)

    def look(number: int) -> list[str]:
        shard = images.index.shards[number]
        path = Path(images.root) / shard.name
        try:
            found = sha256_of(path)
        except OSError as error:
            return [f"{path}: cannot be read ({error.strerror})"]
        if found != shard.sha256:
            return [f"{path}: not the file of the index: its sha256 is {found}, not {shard.sha256}"]
        return [] if config.verify else _bad_pictures(images, number)

    count = len(images.index.shards)
    results = _with_progress(map_in_workers(range(count), look, config.num_workers), count, console)
    return len(images), [fault for faults in results for fault in faults]


def _bad_pictures(images: Shards, number: int) -> list[str]:
    faults = []
    for index in range(int(images.starts[number]), int(images.starts[number + 1])):
        try:
            images.load_image(index)
        except DataError as error:
            faults.append(str(error))
    return faults


def _names(root: Path) -> list[str]:
    """Paths of all images below the folder, relative to it."""
    folder = ImageFolder(root, lambda image: torch.zeros(0), labelled=False)
    return [str(Path(path).relative_to(root)) for path, _ in folder.samples]


def _manifest(config: ScanConfig) -> Path:
    return Path(config.manifest) if config.manifest else Path(config.folder) / MANIFEST


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console = console_for_command()
    config = load_config(ScanConfig, arguments, __doc__ or "")
    folder = Path(config.folder)
    packed = [path.parent for path in sorted([*folder.glob(INDEX_FILE), *folder.glob(f"*/{INDEX_FILE}")])]
    look = scan_shards if packed else verify_manifest if config.verify else scan
    bad = 0
    for one in packed or [folder]:
        count, faults = look(dataclasses.replace(config, folder=str(one)), console)
        for fault in faults:
            print(fault)
        print(f"{one}: {count:,} images, {len(faults)} faults")
        bad += len(faults)
    if bad:
        raise DataError(f"{config.folder} has {bad} faults, listed above: delete or replace these files.")
