"""Decode every image of a folder once, name the bad ones, and write a manifest that reveals later changes.

`mae-dat scan DIR` writes DIR/manifest.jsonl (size, sha256, width and height of each image);
`mae-dat scan DIR --verify` compares the files with it: most flipped bits leave an image that decodes, with
other pixels. Shards are compared with their index in both cases. The exit code is 65 if anything is wrong.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_dat.config.commands.scan import ScanConfig
from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.config.terminal import print_text
from mae_dat.data.decode import decode_bytes, image_error, read_bytes
from mae_dat.data.describe import add_images
from mae_dat.data.image_set import ImageFolder, ImageSet
from mae_dat.data.loader import map_in_workers, worker_count
from mae_dat.data.shards.index import INDEX_FILE
from mae_dat.data.shards.reader import Shards
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import describe_workers
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary, count_of
from mae_dat.storage.files import atomic_write, prepare_output_folder, sha256_of

MANIFEST = "manifest.jsonl"


def main(config: ScanConfig) -> None:
    """Run the command."""
    console = console_for_command()
    folder = Path(config.folder)
    shard_folders = [path.parent for path in sorted([*folder.glob(INDEX_FILE), *folder.glob(f"*/{INDEX_FILE}")])]
    check = scan_shards if shard_folders else verify_manifest if config.verify else scan
    total = 0
    for path in shard_folders or [folder]:
        count, faults = check(dataclasses.replace(config, folder=str(path)), console)
        for fault in faults:
            print_text(fault)
        print_text(f"{path}: {count_of(count, 'image')}, {count_of(len(faults), 'fault')}")
        total += len(faults)
    if total:
        raise DataError(f"{config.folder} has {count_of(total, 'fault')}, listed above: delete or replace these files.")


def scan(config: ScanConfig, console: Console) -> tuple[int, list[str]]:
    """Decode all images and write the manifest of the good ones; return the number of images and a list of faults.

    Raises DataError for a folder without images, MissingInputError, OutputError, StorageError.
    """
    root, manifest = Path(config.folder), _manifest_path(config)
    images = _open_folder(root)
    names = _image_names(images)
    prepare_output_folder(manifest.parent, "another place with --manifest FILE")
    console.report_inputs(scan_inputs(config, images), manifest.with_name(f"{manifest.name}.{INPUTS_FILE}"))
    entries = list(_map_with_progress(lambda name: manifest_entry(root, name), names, config.num_workers, console))
    with atomic_write(manifest) as file:
        for entry in entries:
            if not isinstance(entry, DataError):
                file.write(json.dumps(entry).encode() + b"\n")
    return len(names), _dangling_links(images) + [str(entry) for entry in entries if isinstance(entry, DataError)]


def manifest_entry(root: Path, name: str) -> dict[str, Any]:
    """Decode the image root/name and return its line of the manifest. Raises DataError, StorageError."""
    content = read_bytes(root / name)
    width, height = decode_bytes(content, str(root / name)).size
    if warning := jpeg_warning(content):
        raise image_error(str(root / name), f"the JPEG decodes, but a part of it is damaged ({warning})")
    digest = hashlib.sha256(content).hexdigest()
    return {"path": name, "bytes": len(content), "sha256": digest, "width": width, "height": height}


def jpeg_warning(content: bytes) -> str:
    """Return what libjpeg reports about a damaged JPEG that it decodes nevertheless; empty if it reports nothing.

    About nine in ten damages in the middle of a file are noticed, because later pixels depend on earlier ones.
    """
    if not content.startswith(b"\xff\xd8"):
        return ""
    import cv2  # its decoder writes libjpeg's warnings to the standard error, Pillow's drops them

    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_REDUCED_GRAYSCALE_8)
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        file.seek(0)
        text = file.read().decode(errors="replace")
    return next((line for line in text.splitlines() if line.startswith("Corrupt JPEG")), "")


def verify_manifest(config: ScanConfig, console: Console) -> tuple[int, list[str]]:
    """Compare all files with the manifest; return the number of images it lists and a list of faults.

    Raises DataError for a damaged manifest, MissingInputError, StorageError.
    """
    root, path = Path(config.folder), _manifest_path(config)
    expected = _read_manifest(root, path)

    def fault_of(name: str) -> str:
        digest = hashlib.sha256(read_bytes(root / name)).hexdigest()
        if digest == expected[name]:
            return ""
        return f"{root / name}: not the file that was scanned: its sha256 is {digest}"

    images = _open_folder(root)
    console.report_inputs(scan_inputs(config, images))
    names = set(_image_names(images))
    results = _map_with_progress(fault_of, sorted(expected), config.num_workers, console)
    faults = [str(fault) for fault in results if fault]
    return len(expected), _dangling_links(images) + faults + [
        f"{root / name}: not in {path}" for name in sorted(names - set(expected))
    ]


def _read_manifest(root: Path, path: Path) -> dict[str, str]:
    """Return the sha256 of every image, by its path below `root`."""
    if not path.is_file():
        raise MissingInputError(f"{path}: no such manifest; mae-dat scan {root} writes it.")
    hashes: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            hashes[entry["path"]] = entry["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number}, is damaged ({error}); scan the folder again.") from error
    return hashes


def scan_shards(config: ScanConfig, console: Console) -> tuple[int, list[str]]:
    """Compare the shards with their index and, without `--verify`, decode all images.

    Returns the number of images and a list of faults.
    """
    images = Shards(config.folder, lambda image: torch.zeros(0), labeled=False)
    console.report_inputs(scan_inputs(config, images))

    def faults_of(number: int) -> list[str]:
        shard = images.index.shards[number]
        path = Path(images.root) / shard.name
        try:
            digest = sha256_of(path)
        except OSError as error:
            return [f"{path}: cannot be read ({error.strerror})"]
        if digest != shard.sha256:
            return [f"{path}: not the file of the index: its sha256 is {digest}, not {shard.sha256}"]
        return [] if config.verify else _undecodable_images(images, number)

    numbers = range(len(images.index.shards))
    results = _map_with_progress(faults_of, numbers, config.num_workers, console)
    return len(images), [fault for faults in results for fault in faults]


def _undecodable_images(images: Shards, shard: int) -> list[str]:
    faults = []
    for index in range(int(images.starts[shard]), int(images.starts[shard + 1])):
        try:
            content, name = images.read_file(index)
            decode_bytes(content, name)
            if warning := jpeg_warning(content):
                raise image_error(name, f"the JPEG decodes, but a part of it is damaged ({warning})")
        except DataError as error:
            faults.append(str(error))
    return faults


def _map_with_progress(
    function: Callable[[Any], Any], items: Sequence[Any], num_workers: int, console: Console
) -> Iterator[Any]:
    """Yield function(item) for each item from worker processes, with a progress bar."""
    with console.task("scan", len(items)) as task:
        for result in map_in_workers(function, items, num_workers):
            task.advance("")
            yield result


def scan_inputs(config: ScanConfig, images: ImageSet) -> InputSummary:
    """Return the summary of what a scan reads."""
    inputs = InputSummary(f"{config.verb}{' --verify' * config.verify}")
    root = Path(config.folder)
    add_images(inputs, config.folder, root, {"images": images})
    steps = "compare sizes and sha256" if isinstance(images, Shards) or config.verify else "decode every image"
    inputs.add("checks", steps)
    inputs.add("workers", describe_workers(worker_count(config.num_workers)))
    manifest = _manifest_path(config).absolute()
    if not isinstance(images, Shards):
        inputs.add("manifest", f"{manifest} ({'read' if config.verify else 'written'})")
    return inputs


def _open_folder(root: Path) -> ImageFolder:
    return ImageFolder(root, lambda image: torch.zeros(0), labeled=False)


def _dangling_links(images: ImageFolder) -> list[str]:
    return [f"{path}: a link to a file that does not exist" for path in images.ignored_files.dangling]


def _image_names(images: ImageFolder) -> list[str]:
    """Return the paths of all images below the folder, relative to it."""
    return [str(Path(path).relative_to(images.root)) for path, _ in images.samples]


def _manifest_path(config: ScanConfig) -> Path:
    return Path(config.manifest) if config.manifest else Path(config.folder) / MANIFEST
