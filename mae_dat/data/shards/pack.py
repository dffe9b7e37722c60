"""Pack a folder of images into tar shards, for data beyond one disk or on a network file system.

`mae-dat pack DIR OUT` writes OUT/train and OUT/val from DIR/train/CLASS/* and DIR/val/CLASS/*, or OUT from
any folder of unlabeled images, in random order and with every image decoded once. `--index DIR` only writes the index
of existing shards.
"""

import dataclasses
import io
import logging
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mae_dat.config.commands.pack import PackConfig
from mae_dat.config.errors import ConfigError, DataError, OutputError
from mae_dat.config.extras import require_extra
from mae_dat.config.paths import require_folder
from mae_dat.config.terminal import print_text
from mae_dat.data.decode import decode_bytes, read_bytes
from mae_dat.data.describe import add_images, describe_classes, describe_root
from mae_dat.data.folders import SPLIT_NAMES, split_folders
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.loader import map_in_workers, worker_count
from mae_dat.data.sampler import epoch_order
from mae_dat.data.shards.index import INDEX_FILE, ShardIndex, build_index
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import describe_workers
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary, count_of, describe_bytes
from mae_dat.storage.files import atomic_write, prepare_output_folder

logger = logging.getLogger(__name__)


def main(config: PackConfig) -> None:
    """Run the command."""
    console = console_for_command()
    if bool(config.index) == bool(config.source and config.out):
        raise ConfigError("give a folder of images and a folder for the shards, or --index DIR alone; see --help.")
    if config.index:
        print_summary(index_existing(config, console), config.index)
    else:
        print_summary(pack(config, console), config.out)


def pack(config: PackConfig, console: Console) -> dict[str, ShardIndex]:
    """Write the shards of every split, with their index last.

    Returns the indices by split ("" for a folder without splits). Raises DataError, MissingInputError, OutputError,
    StorageError.
    """
    require_extra("shards", "packing")
    source, out = Path(config.source), Path(config.out)
    require_folder(source)
    names = [name for split in SPLIT_NAMES.values() for name in split_folders(source, split)] or [""]
    for name in names:
        if any((out / name).glob("*.tar")):
            raise OutputError(f"{out / name} contains shards already: choose a new folder, or delete them.")
    splits = {
        name: ImageFolder(source / name, lambda image: torch.zeros(0), labeled=config.labeled and name != "")
        for name in names
    }
    console.report_inputs(pack_inputs(config, splits), prepare_output_folder(out) / INPUTS_FILE)
    indices = {}
    for name, images in splits.items():
        folder = prepare_output_folder(out / name)
        _write_shards(images, folder, name or "images", config, console=console)
        indices[name] = dataclasses.replace(build_index(folder, images.classes or None), packed_size=config.size)
        indices[name].write(folder)
    return indices


def pack_inputs(config: PackConfig, splits: Mapping[str, ImageFolder]) -> InputSummary:
    """Return the summary of what is packed."""
    inputs = InputSummary(config.verb)
    add_images(inputs, config.source, Path(config.source), {name or "images": split for name, split in splits.items()})
    if config.on_bad == "skip":
        inputs.add("left out", "unreadable images are skipped and logged (--on_bad skip)")
    smaller = (
        f"shorter side at most {config.size} px, JPEG quality {config.quality}" if config.size else "files as they are"
    )
    inputs.add("shards", f"{config.shard_mb:g} MB each, {smaller}")
    inputs.add("workers", describe_workers(worker_count(config.num_workers)))
    inputs.add("output", str(Path(config.out).absolute()))
    return inputs


def _write_shards(images: ImageFolder, folder: Path, name: str, config: PackConfig, *, console: Console) -> None:
    from webdataset import TarWriter

    order = epoch_order(len(images), seed=0, epoch=0).tolist()  # random, because neighbors in a folder share a class
    paths = [images.name_of(index) for index in order]
    files = map_in_workers(lambda path: _file_to_pack(path, config.size, config.quality), paths, config.num_workers)
    with console.task(f"pack {name}", len(order)) as task:
        samples = _samples(images, order, files, config.on_bad)
        sample = next(samples, None)
        shard = 0
        while sample:
            path, size = folder / f"{name}-{shard:05d}.tar", 0
            with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
                while sample and size < config.shard_mb * 1e6:
                    size += tar.write(sample)
                    task.advance(path.name)
                    sample = next(samples, None)
            shard += 1


def _file_to_pack(path: str, size: int | None, quality: int) -> tuple[bytes, str]:
    """Decode an image and return its file and suffix; if it is larger than `size`, a smaller JPEG.

    Raises DataError, StorageError.
    """
    content = read_bytes(path)
    image = decode_bytes(content, path)
    if size is None or min(image.size) <= size:
        return content, Path(path).suffix[1:].lower()
    return _shrink_to_jpeg(image, size, quality), "jpg"


def _shrink_to_jpeg(image: Image.Image, size: int, quality: int) -> bytes:
    """Return the image as a JPEG with a shorter side of `size` pixels."""
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    content = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(content, "JPEG", quality=quality)
    return content.getvalue()


def _samples(images: ImageFolder, order: Sequence[int], files: Iterable[Any], on_bad: str) -> Iterator[dict[str, Any]]:
    """Yield what WebDataset stores of each image: key, file and class number."""
    for index, file in zip(order, files, strict=True):
        if isinstance(file, DataError):
            if on_bad == "fail":
                raise file
            logger.warning("skipped: %s", file)
            continue
        content, suffix = file
        stem = re.sub(r"[^\w-]+", "_", Path(images.name_of(index)).stem, flags=re.ASCII)[:60]
        label = images.label(index)
        class_number = {"cls": str(label).encode()} if label >= 0 else {}
        yield {"__key__": f"{index:08d}-{stem}", suffix: content, **class_number}


def index_existing(config: PackConfig, console: Console) -> dict[str, ShardIndex]:
    """Write the index of the shards in the folder of `--index`, or in each of its splits; return them as `pack` does.

    Raises ConfigError, DataError, StorageError.
    """
    folder, names = Path(config.index or ""), None
    if not folder.is_dir():
        raise ConfigError(f"--index {folder}: there is no such folder.")
    if config.classes:
        try:
            names = Path(config.classes).read_text().splitlines()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--classes {config.classes}: cannot be read ({error}).") from error
    folders = [name for split in SPLIT_NAMES.values() for name in split_folders(folder, split)]
    splits = [name for name in folders if any((folder / name).glob("*.tar"))] or [""]
    console.report_inputs(index_inputs(config, splits, names), folder / INPUTS_FILE)
    indices = {split: build_index(folder / split, names) for split in splits}
    for split, index in indices.items():
        index.write(folder / split)
    return indices


def index_inputs(config: PackConfig, splits: Sequence[str], classes: Sequence[str] | None) -> InputSummary:
    """Return the summary of the shards that are indexed."""
    folder = Path(config.index or "")
    inputs = InputSummary(f"{config.verb} --index")
    inputs.add("data", describe_root(str(folder), folder))
    for split in splits:
        shards = [*(folder / split).glob("*.tar")]
        size = sum(shard.stat().st_size for shard in shards)
        inputs.add(split or "images", f"{count_of(len(shards), 'shard')}, {describe_bytes(size)}")
    inputs.add("classes", f"{describe_classes(classes)} (--classes)" if classes else "numbers (no --classes)")
    inputs.add("output", f"{INDEX_FILE} in {' and '.join(str((folder / split).absolute()) for split in splits)}")
    return inputs


def print_summary(indices: dict[str, ShardIndex], out: str) -> None:
    """Print what was written, and which command to run next."""
    for split, index in indices.items():
        size = sum(shard.bytes for shard in index.shards)
        count = count_of(len(index.offset), "image")
        if index.classes:
            count += f" of {count_of(len(index.classes), 'class', 'classes')}"
        print_text(f"{Path(out) / split}: {count} in {count_of(len(index.shards), 'shard')}, {describe_bytes(size)}")
    verb = "finetune" if any(index.classes for index in indices.values()) else "pretrain"
    print_text(f"Next:\n  mae-dat {verb} --data_path {shlex.quote(out)}")
