"""Where the pictures lie in tar shards as WebDataset writes them: `key.jpg`, with `key.cls` (a number) or `key.json`
(`label`) beside it.

`index.safetensors` beside the shards holds it, so that any picture is one read. Archives are read only to make it, and
nothing is ever unpacked to disk.
"""

import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from mae_dat.config.errors import CheckpointError, DataError
from mae_dat.data.decode import MAX_BYTES
from mae_dat.storage.files import sha256_of
from mae_dat.storage.weight_files import read_weights, write_weights

logger = logging.getLogger(__name__)

INDEX_FILE = "index.safetensors"
BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 1_000_000
_TEXT_BYTES = 1 << 20  # of a .cls or .json, and of what tar needs besides the files: long names and the like
_NAME = re.compile(r"[\w. ()+=@,-]+\.tar", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar file: its name, length in bytes, sha256, and number of pictures."""

    name: str
    bytes: int
    sha256: str
    images: int


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Where the pictures of a folder of shards lie: `offset` and `size` in bytes and `label`, each int64 (N,), the
    pictures of one shard after those of another."""

    shards: list[Shard]
    classes: list[str] | None
    offset: Tensor
    size: Tensor
    label: Tensor
    packed_size: int | None = None
    """Shorter side in pixels that larger pictures were shrunk to, and stored anew, when they were packed."""

    def write(self, folder: Path) -> None:
        """Writes it beside the shards, atomically. Raises StorageError."""
        shards = [dataclasses.asdict(one) for one in self.shards]
        facts = {"kind": "shards", "classes": self.classes, "shards": shards, "shrunk": self.packed_size}
        tensors = {"offset": self.offset, "size": self.size, "label": self.label}
        write_weights(folder / INDEX_FILE, tensors, {"mae_dat": json.dumps({**facts, "sha256": self.sha256()})})

    def sha256(self) -> str:
        """Of all that it says: a label that rots on disk would be learned in silence."""
        facts: list[Any] = [self.classes, [dataclasses.astuple(one) for one in self.shards]]
        if self.packed_size is not None:
            facts.append(self.packed_size)
        told = hashlib.sha256(json.dumps(facts).encode())
        for part in (self.offset, self.size, self.label):
            told.update(part.numpy().tobytes())
        return told.hexdigest()


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder of shards. Raises DataError for one that is damaged or says what cannot be."""
    path, advice = folder / INDEX_FILE, f"write it anew: python -m mae_dat pack --index {folder}"
    try:
        found = read_weights(path)
        facts, tensors = found.facts, found.tensors
        shards = [Shard(**one) for one in facts["shards"]]
        index = ShardIndex(shards, facts["classes"], **tensors, packed_size=facts.get("shrunk"))
        sound = (
            all(_NAME.fullmatch(one.name) for one in index.shards)
            and all(part.dtype == torch.int64 for part in tensors.values())
            and {sum(one.images for one in index.shards)} == {len(part) for part in tensors.values()}
            and (index.packed_size is None or (type(index.packed_size) is int and index.packed_size > 0))
            and facts["sha256"] == index.sha256()
        )
        if sound and len(index.offset):
            images = torch.tensor([one.images for one in index.shards])
            length = torch.tensor([one.bytes for one in index.shards]).repeat_interleave(images)
            sound = bool(
                (index.offset >= BLOCK).all()
                and (index.offset + index.size <= length).all()
                and 0 < index.size.min() <= index.size.max() <= MAX_BYTES
                and -1 <= index.label.min() <= index.label.max() < len(index.classes or [])
            )
    except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        cause = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path} is damaged ({cause}); {advice}") from error
    if not sound:
        raise DataError(f"{path} contradicts itself; {advice}")
    return index


# ---- finding the pictures in shards that others wrote ----


class _Headers(io.FileIO):
    """An archive of which only headers are read: a header that claims a terabyte gets an error instead of it."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _TEXT_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def build_index(folder: Path, classes: Sequence[str] | None = None) -> ShardIndex:
    """The index of the *.tar files in a folder, from their headers.

    Classes are called by their numbers, unless `classes` names them. Raises DataError, naming shard and member, for
    what is torn and for archives that no one writes in good faith: see `archive_members`.
    """
    paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise DataError(f"{folder} holds no *.tar files (compressed ones must be unpacked first: gunzip)")
    shards, parts = [], []
    for path in paths:
        if not _NAME.fullmatch(path.name):
            raise DataError(f"{path}: rename it to letters, digits, spaces and . ( ) + = @ , - _ only")
        found = torch.tensor(list(_samples(path)), dtype=torch.int64).view(-1, 3)
        shards.append(Shard(path.name, path.stat().st_size, sha256_of(path), len(found)))
        parts.append(found)
        logger.info("%s: %d images", path, len(found))
    offset, size, label = (column.clone() for column in torch.cat(parts).unbind(1))
    highest = int(label.max()) if len(label) else -1
    if classes is not None and highest >= len(classes):
        raise DataError(f"{folder} has the label {highest}, but there are {len(classes)} classes (counted from 0)")
    names = list(classes) if classes is not None else [str(number) for number in range(highest + 1)] or None
    return ShardIndex(shards, names, offset, size, label)


def archive_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files in an archive, with their offsets; only headers are read.

    Folders and WebDataset's own `__*__` entries are passed over. DataError for links, devices and sparse files, for
    names that are absolute, climb by `..`, hold control, direction or undecodable characters or come twice, for
    pictures above 256 MiB, and for archives that are torn or lead nowhere. Names that differ only in case are two
    files.
    """

    def refuse(cause: str) -> DataError:
        return DataError(f"{path}: {cause}; the shard was not used: fetch it again, or pack the images anew")

    seen: set[str] = set()
    position = 0
    try:
        with _Headers(path) as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # or it keeps them all
                name, data = member.name, member.offset_data
                if data <= position or member.size < 0:
                    raise refuse(f"the member {name!r} leads back to byte {data}")
                position = data
                if fault := _fault(member):
                    raise refuse(f"the member {name!r} {fault}")
                if not member.isreg() or name.startswith("__") or Path(name).name.startswith("."):
                    continue
                if len(seen) == MAX_MEMBERS:
                    raise refuse(f"it has more than the {MAX_MEMBERS:,} members allowed")
                if name in seen:
                    raise refuse(f"the member {name!r} comes twice")
                seen.add(name)
                yield member
            # Where a header is damaged, tarfile stops as if it were the end.
            if os.pread(file.fileno(), BLOCK, archive.offset) != bytes(BLOCK):
                raise refuse(f"the archive is torn at byte {archive.offset:,}")
    except (tarfile.TarError, ValueError, RecursionError, OverflowError, MemoryError, UnicodeError) as error:
        raise refuse(f"no tar archive that can be read ({error or type(error).__name__})") from error
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from error


def _fault(member: tarfile.TarInfo) -> str:
    """What is wrong with a member; empty if nothing is."""
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        return "has a path that leads out of the archive"
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs") for letter in member.name):
        return "has control, direction or undecodable characters in its name"
    if member.issparse() or "size" in member.pax_headers:
        return "is a sparse file"
    if not (member.isreg() or member.isdir()):
        return "is no file: links and devices have no place in a shard"
    return f"has more than the {MAX_BYTES >> 20} MiB allowed" if member.size > MAX_BYTES else ""


def _samples(path: Path) -> Iterator[tuple[int, int, int]]:
    """Offset, size and label (-1 without) of each picture. A key is all up to the first dot of the file's name."""
    key, picture, label = "", (0, 0), -1
    for member in archive_members(path):
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        stem, _, extension = name.partition(".")
        if folder + slash + stem != key:
            if picture[1]:
                yield (*picture, label)
            key, picture, label = folder + slash + stem, (0, 0), -1
        if f".{extension.lower()}" in IMG_EXTENSIONS:
            if picture[1]:
                raise DataError(f"{path}: {key!r} has two pictures, the second {member.name!r}; pack the images anew")
            if not member.size:
                raise DataError(f"{path}: the member {member.name!r} is empty; pack the images anew")
            picture = (member.offset_data, member.size)
        elif extension.lower() in ("cls", "json"):
            label = _label(path, member)
    if picture[1]:
        yield (*picture, label)


def _label(path: Path, member: tarfile.TarInfo) -> int:
    """The number in a .cls, or `label` (or `cls`) in a .json; -1 if the latter has none. Raises DataError."""
    wrong = f"{path}: the member {member.name!r} holds no class number of 0 or more"
    if member.size > _TEXT_BYTES:
        raise DataError(f"{wrong}, but {member.size:,} bytes")
    with path.open("rb") as file:
        text = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        found = json.loads(text)
        value = found.get("label", found.get("cls")) if isinstance(found, dict) else found
    except (ValueError, RecursionError) as error:
        raise DataError(f"{wrong} ({error})") from error
    if value is None and isinstance(found, dict):
        return -1
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise DataError(f"{wrong}, but {str(value)[:40]}")
    return value
