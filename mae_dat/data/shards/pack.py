"""Packs a folder of images into tar shards, for data beyond one disk or on a network file system.

`python -m mae_dat pack DIR OUT` writes OUT/train and OUT/val from DIR/train/CLASS/* and DIR/val/CLASS/*, or OUT from
any folder of unlabelled images, in random order and with every image decoded once. `--index DIR` only writes the index
of shards that are there already.
"""

import dataclasses
import io
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image

from mae_dat.config.errors import ConfigError, DataError, OutputError
from mae_dat.config.parse import load_config
from mae_dat.data.decode import decode_bytes, read_bytes
from mae_dat.data.image_set import SPLIT_NAMES, ImageFolder, epoch_order
from mae_dat.data.loader import map_in_workers
from mae_dat.data.shards.index import ShardIndex, build_index
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.storage.files import atomic_write, prepare_output_folder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Packing of images into shards."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = ""
    """Folder of images: train/CLASS/* and val/CLASS/*, or any images at all."""
    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = ""
    """New folder for the shards."""
    index: str | None = None
    """Instead: folder of *.tar shards that are there already, or of train and val with some; write their index."""
    classes: str | None = None
    """With --index: text file with the name of class 0 in its first line, of 1 in the second, and so on."""
    shard_mb: float = 256.0
    """Size of a shard, in MB (10^6 bytes)."""
    size: int | None = None
    """Shrink larger images to this shorter side in pixels and store them as JPEG (default: the files as they are).
    Training reads them several times as fast; 256 is usual for --input_size 224."""
    quality: int = 90
    """Of the JPEGs, with --size."""
    labelled: bool = True
    """--no_labelled takes train and val as they are, without classes."""
    on_bad: Literal["fail", "skip"] = "fail"
    """An image that cannot be decoded: stop and name it, or leave it out."""
    num_workers: int = 4
    """Processes that decode."""

    def __post_init__(self) -> None:
        if not self.shard_mb > 0 or (self.size is not None and self.size < 1) or not 1 <= self.quality <= 100:
            raise ConfigError("--shard_mb and --size must be above 0, --quality from 1 to 100.")


def _file_to_pack(path: str, size: int | None, quality: int) -> tuple[bytes, str]:
    """A picture's file and suffix, after decoding it; if it is larger than `size`, a smaller JPEG. Raises DataError,
    StorageError."""
    content = read_bytes(path)
    picture = decode_bytes(content, path)
    if size is None or min(picture.size) <= size:
        return content, Path(path).suffix[1:].lower()
    return _shrink_to_jpeg(picture, size, quality), "jpg"


def _shrink_to_jpeg(picture: Image.Image, size: int, quality: int) -> bytes:
    """The picture as a JPEG with a shorter side of `size` pixels."""
    factor = size / min(picture.size)
    width, height = (max(size, round(side * factor)) for side in picture.size)
    content = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BICUBIC).save(content, "JPEG", quality=quality)
    return content.getvalue()


def pack(config: PackConfig, console: Console) -> dict[str, ShardIndex]:
    """Writes the shards of every split, with their index last; returns the indices by split ("" for a folder without
    splits). Raises DataError, MissingInputError, OutputError, StorageError."""
    source, out = Path(config.source), Path(config.out)
    names = [name for split in SPLIT_NAMES.values() for name in split if (source / name).is_dir()] or [""]
    for name in names:
        if any((out / name).glob("*.tar")):
            raise OutputError(f"{out / name} holds shards already: name a new folder, or delete them.")
    done = {}
    for name in names:
        images = ImageFolder(source / name, lambda image: torch.zeros(0), labelled=config.labelled and name != "")
        folder = prepare_output_folder(out / name)
        _write_shards(images, folder, name or "images", config, console)
        done[name] = dataclasses.replace(build_index(folder, images.classes or None), packed_size=config.size)
        done[name].write(folder)
    return done


def _write_shards(images: ImageFolder, folder: Path, name: str, config: PackConfig, console: Console) -> None:
    try:
        from webdataset import TarWriter
    except ImportError as error:
        raise ConfigError("packing needs the package webdataset: pip install 'mae_dat[shards]'.") from error
    order = epoch_order(len(images), seed=0, epoch=0).tolist()  # neighbours in a folder are of one class
    paths = [images.name_of(index) for index in order]
    found = map_in_workers(paths, lambda path: _file_to_pack(path, config.size, config.quality), config.num_workers)
    with console.task(f"pack {name}", len(order)) as task:
        samples = _samples(images, order, found, config.on_bad)
        sample = next(samples, None)
        shard = 0
        while sample:
            path, written = folder / f"{name}-{shard:05d}.tar", 0
            with atomic_write(path) as file, TarWriter(file, encoder=False, mtime=0) as tar:
                while sample and written < config.shard_mb * 1e6:
                    written += tar.write(sample)
                    task.advance(path.name)
                    sample = next(samples, None)
            shard += 1


def _samples(
    images: ImageFolder, order: Sequence[int], results: Iterator[Any], on_bad: str
) -> Iterator[dict[str, Any]]:
    """What WebDataset stores of each image: key, file and class number."""
    for index, found in zip(order, results, strict=True):
        if isinstance(found, DataError):
            if on_bad == "fail":
                raise found
            logger.warning("left out: %s", found)
            continue
        content, suffix = found
        stem = re.sub(r"[^\w-]+", "_", Path(images.name_of(index)).stem, flags=re.ASCII)[:60]
        label = images.label(index)
        number = {"cls": str(label).encode()} if label >= 0 else {}
        yield {"__key__": f"{index:08d}-{stem}", suffix: content, **number}


def index_existing(config: PackConfig) -> dict[str, ShardIndex]:
    """Writes the index of the shards in `--index`, or in each of its splits; returns them as `pack` does. Raises
    DataError, StorageError."""
    assert config.index
    folder, classes = Path(config.index), None
    if not folder.is_dir():
        raise ConfigError(f"--index {folder}: there is no such folder.")
    if config.classes:
        try:
            classes = Path(config.classes).read_text().splitlines()
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"--classes {config.classes}: cannot be read ({error}).") from error
    names = [name for split in SPLIT_NAMES.values() for name in split if any((folder / name).glob("*.tar"))] or [""]
    found = {name: build_index(folder / name, classes) for name in names}
    for name, index in found.items():
        index.write(folder / name)
    return found


def print_summary(found: dict[str, ShardIndex], out: str) -> None:
    """What was written, and what to type next."""
    for split, index in found.items():
        size = sum(shard.bytes for shard in index.shards)
        count = f"{len(index.offset):,} images" + (f" of {len(index.classes)} classes" if index.classes else "")
        print(f"{Path(out) / split}: {count} in {len(index.shards)} shards, {size / 1e6:,.1f} MB")
    if any(index.classes for index in found.values()):
        print(f"next: python main_finetune.py --data_path {out}")
    else:
        print(f"next: python main_pretrain.py --data_path {out}")


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console = console_for_command()
    config = load_config(PackConfig, arguments, __doc__ or "")
    if bool(config.index) == bool(config.source and config.out):
        raise ConfigError("give a folder of images and a folder for the shards, or --index DIR alone; see --help.")
    if config.index:
        print_summary(index_existing(config), config.index)
    else:
        print_summary(pack(config, console), config.out)
