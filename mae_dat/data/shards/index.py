"""The index of tar shards in WebDataset's format: where each image lies, so that any image is one read.

A shard holds `key.jpg` and `key.cls` (a number) or `key.json` (`label`) for each image. `index.safetensors` is stored
with the shards. Archives are parsed only to write it, and nothing is ever unpacked to disk.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from mae_dat.config.errors import CheckpointError, DataError
from mae_dat.data.decode import MAX_BYTES
from mae_dat.data.folders import IMAGE_EXTENSIONS, IgnoredFiles
from mae_dat.runtime.inputs import count_of
from mae_dat.storage.files import sha256_of
from mae_dat.storage.json_files import check_shape
from mae_dat.storage.weight_files import read_weights, write_weights

logger = logging.getLogger(__name__)

INDEX_FILE = "index.safetensors"
BLOCK = tarfile.BLOCKSIZE
MAX_MEMBERS = 1_000_000
_TEXT_BYTES = 1 << 20  # of a .cls or .json, and of tar's own entries, such as long names
_NAME = re.compile(r"[\w. ()+=@,-]+\.tar", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar file: its name, length in bytes, sha256, and number of images."""

    name: str
    bytes: int
    sha256: str
    images: int


class _ShardFacts(TypedDict):
    name: str
    bytes: int
    sha256: str
    images: int


class _IndexFacts(TypedDict):
    """The description in an index file."""

    classes: list[str] | None
    shards: list[_ShardFacts]
    shrunk: NotRequired[int | None]
    sha256: str


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Where the images of a folder of shards lie, shard after shard.

    `offset` and `size` in bytes and `label` (-1 if unlabeled) are int64 (N,). `classes` are the labels' names.
    """

    shards: list[Shard]
    classes: list[str] | None
    offset: Tensor
    size: Tensor
    label: Tensor
    packed_size: int | None = None
    """Shorter side in pixels to which larger images were shrunk, and encoded again, when they were packed."""

    def write(self, folder: Path) -> None:
        """Write the index to the folder of the shards, atomically. Raises StorageError."""
        facts = {
            "kind": "shards",
            "classes": self.classes,
            "shards": [dataclasses.asdict(shard) for shard in self.shards],
            "shrunk": self.packed_size,
            "sha256": self.sha256(),
        }
        tensors = {"offset": self.offset, "size": self.size, "label": self.label}
        write_weights(folder / INDEX_FILE, tensors, {"mae_dat": json.dumps(facts)})

    def sha256(self) -> str:
        """Return a hash of the whole content: a label damaged on disk would otherwise be learned unnoticed."""
        facts: list[Any] = [self.classes, [dataclasses.astuple(shard) for shard in self.shards]]
        if self.packed_size is not None:
            facts.append(self.packed_size)
        digest = hashlib.sha256(json.dumps(facts).encode())
        for tensor in (self.offset, self.size, self.label):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def read_index(folder: Path, name: str = INDEX_FILE) -> ShardIndex:
    """Read the index of a folder of shards. Raises DataError for one that is damaged or inconsistent."""
    path, advice = folder / name, f"write it again: mae-dat pack --index {folder}"
    try:
        file = read_weights(path)
        facts, tensors = file.facts, file.tensors
        check_shape(facts, _IndexFacts)
        shards = [Shard(**shard) for shard in facts["shards"]]
        index = ShardIndex(shards, facts["classes"], **tensors, packed_size=facts.get("shrunk"))
        consistent = _is_consistent(index, tensors) and facts["sha256"] == index.sha256() and _is_in_range(index)
    except (CheckpointError, KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        cause = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{path} is damaged ({cause}); {advice}") from error
    if not consistent:
        raise DataError(f"{path} is inconsistent; {advice}")
    return index


def _is_consistent(index: ShardIndex, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether names, types and lengths are those of an index; may raise on damaged values."""
    return (
        all(_NAME.fullmatch(shard.name) for shard in index.shards)
        and all(min(shard.images, shard.bytes) >= 0 for shard in index.shards)
        and all(tensor.dtype == torch.int64 and tensor.ndim == 1 for tensor in tensors.values())
        and {sum(shard.images for shard in index.shards)} == {len(tensor) for tensor in tensors.values()}
        and (index.packed_size is None or (type(index.packed_size) is int and index.packed_size > 0))
    )


def _is_in_range(index: ShardIndex) -> bool:
    """Return whether every image lies inside its shard and every label has a name."""
    if not len(index.offset):
        return True
    images = torch.tensor([shard.images for shard in index.shards])
    shard_bytes = torch.tensor([shard.bytes for shard in index.shards]).repeat_interleave(images)
    return bool(
        (index.offset >= BLOCK).all()
        and (index.offset <= shard_bytes).all()  # so that the sum below cannot overflow
        and 0 < index.size.min() <= index.size.max() <= MAX_BYTES
        and (index.offset + index.size <= shard_bytes).all()
        and -1 <= index.label.min() <= index.label.max() < len(index.classes or [])
    )


# ---- building the index, also of shards from untrusted sources ----


class _Headers(io.FileIO):
    """An archive of which only headers are read: a header that claims a terabyte raises an error."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _TEXT_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size) or b""


def build_index(folder: Path, classes: Sequence[str] | None = None) -> ShardIndex:
    """Build the index of the *.tar files in a folder from their headers.

    Classes are named by their numbers, unless `classes` gives names. Raises DataError, naming shard and member, for
    damaged archives and for those that only an attacker would write: see `archive_members`.
    """
    paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise DataError(f"{folder} contains no *.tar files (compressed ones must be unpacked first: gunzip)")
    shards, tables, unused = [], [], _UnusedMembers()
    for path in paths:
        if not _NAME.fullmatch(path.name):
            raise DataError(f"{path}: rename it to letters, digits, spaces and . ( ) + = @ , - _ only")
        table = torch.tensor(list(_samples(path, unused)), dtype=torch.int64).view(-1, 3)
        shards.append(Shard(path.name, path.stat().st_size, sha256_of(path), len(table)))
        tables.append(table)
        logger.info("%s: %s", path, count_of(len(table), "image"))
    offset, size, label = (column.clone() for column in torch.cat(tables).unbind(1))
    _check_unused(folder, label, unused)
    highest = int(label.max())
    if classes is not None and highest >= len(classes):
        raise DataError(f"{folder} has the label {highest}, but there are {len(classes)} classes (counted from 0)")
    names = list(classes) if classes is not None else [str(number) for number in range(highest + 1)] or None
    return ShardIndex(shards, names, offset=offset, size=size, label=label)


def archive_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the files in an archive, with their offsets; only headers are read.

    Folders and WebDataset's own `__*__` entries are ignored. Names that differ only in case are two files. Raises
    DataError for links, devices and sparse files; for names that are absolute, contain `..` or control, direction or
    undecodable characters, or occur twice; for images above 256 MiB; and for archives that are damaged or point
    backwards.
    """
    names: set[str] = set()
    position = 0
    try:
        with _Headers(path) as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined] # or the archive keeps them all in memory
                name = member.name
                if fault := _fault(member, position):
                    raise _refused(path, f"the member {name!r} {fault}")
                position = member.offset_data
                if not member.isreg() or name.startswith("__") or Path(name).name.startswith("."):
                    continue
                if len(names) == MAX_MEMBERS:
                    raise _refused(path, f"it has more members than the {MAX_MEMBERS:,} allowed")
                if name in names:
                    raise _refused(path, f"the member {name!r} occurs twice")
                names.add(name)
                yield member
            # At a damaged header tarfile stops as if it were the end.
            if os.pread(file.fileno(), BLOCK, archive.offset) != bytes(BLOCK):
                raise _refused(path, f"the archive is damaged or incomplete at byte {archive.offset:,}")
    except (tarfile.TarError, ValueError, RecursionError, OverflowError, MemoryError, UnicodeError) as error:
        raise _refused(path, f"not a readable tar archive ({error or type(error).__name__})") from error
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror})") from error


def _refused(path: Path, cause: str) -> DataError:
    return DataError(f"{path}: {cause}; the shard was not used: fetch it again, or pack the images again")


def _fault(member: tarfile.TarInfo, previous: int) -> str:
    """Return what is wrong with a member that comes after the one at byte `previous`; empty if nothing is."""
    if member.offset_data <= previous or member.size < 0:
        return f"points back to byte {member.offset_data}"
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        return "has a path that leads out of the archive"
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs") for letter in member.name):
        return "has control, direction or undecodable characters in its name"
    if member.issparse() or "size" in member.pax_headers:
        return "is a sparse file"
    if not (member.isreg() or member.isdir()):
        return "is not a file: links and devices are not allowed in a shard"
    return f"has more than the allowed {MAX_BYTES >> 20} MiB" if member.size > MAX_BYTES else ""


@dataclasses.dataclass
class _Member:
    """One member of a sample: its name up to the last dot, offset and size in bytes of an image, or its label."""

    name: str
    stem: str
    offset: int = 0
    size: int = 0
    label: int | None = None


class _UnusedMembers:
    """The members of the shards that are not used, by reason."""

    def __init__(self) -> None:
        self.ignored = IgnoredFiles()
        self.labels: set[int] = set()
        """The labels of samples without an image."""

    def add(self, reason: str, name: str) -> None:
        """Count a member."""
        self.ignored.add(reason, name)


def _samples(path: Path, unused: _UnusedMembers) -> Iterator[tuple[int, int, int]]:
    """Yield offset, size and label (-1 if unlabeled) of each image; count other members in `unused`.

    As in WebDataset, the members of a sample follow each other and have one name up to the first dot. If such a group
    has several images, each needs a name of its own up to the last dot (a.1.jpg, a.1.cls, a.2.jpg, a.2.cls).
    """
    group: list[_Member] = []
    key = None
    for member in archive_members(path):
        folder, slash, name = member.name.removeprefix("./").rpartition("/")
        member_key = folder + slash + name.partition(".")[0]
        if member_key != key:
            yield from _samples_of_group(path, group, unused)
            key, group = member_key, []
        stem, extension = os.path.splitext(name)
        if extension.lower() in IMAGE_EXTENSIONS:
            if not member.size:
                raise DataError(f"{path}: the member {member.name!r} is empty; pack the images again")
            group.append(_Member(member.name, stem, member.offset_data, member.size))
        elif extension.lower() in (".cls", ".json"):
            group.append(_Member(member.name, stem, label=_read_label(path, member)))
        else:
            unused.add(extension.lower() or "no suffix", member.name)
    yield from _samples_of_group(path, group, unused)


def _samples_of_group(path: Path, group: Sequence[_Member], unused: _UnusedMembers) -> Iterator[tuple[int, int, int]]:
    """Yield the images of members with one key, each with its label. Raises DataError if that is not clear."""
    images = [member for member in group if member.label is None]
    labels = [member for member in group if member.label is not None]
    if not images:
        for member in labels:
            unused.add("labels without an image", member.name)
            unused.labels.add(member.label if member.label is not None else -1)
        return
    if len(images) == 1:
        label = labels[-1].label if labels else -1
        yield (images[0].offset, images[0].size, -1 if label is None else label)
        return
    by_stem = {member.stem: member.label for member in labels}
    stems = [member.stem for member in images]
    if len(set(stems)) < len(stems) or (labels and set(by_stem) != set(stems)):
        raise DataError(
            f"{path}: the sample of {images[0].name!r} has two images, the second {images[1].name!r}; keep one "
            "image in each sample, or give each a name and a label of its own"
        )
    for member in images:
        label = by_stem.get(member.stem, -1)
        yield (member.offset, member.size, -1 if label is None else label)


def _check_unused(folder: Path, label: Tensor, unused: _UnusedMembers) -> None:
    """Log which members are not used, and which class numbers have no image.

    Raises DataError if there is no image at all, or a class has labels but no image.
    """
    others = unused.ignored.describe()
    if not len(label):
        raise DataError(f"{folder}: the shards contain no images{f', only other members: {others}' * bool(others)}")
    used = set(label.unique().tolist())
    if lost := sorted(unused.labels - used - {-1}):
        raise DataError(
            f"{folder}: the class {lost[0]} has labels but no image ({others}): an image and its label need one "
            f"name up to the first dot, and a suffix among {', '.join(IMAGE_EXTENSIONS)}"
        )
    if others:
        logger.warning("%s: members that are not used: %s", folder, others)
    if absent := sorted(set(range(max(used) + 1)) - used):
        numbers = ", ".join(map(str, absent[:5])) + (", ..." if len(absent) > 5 else "")
        logger.warning(
            "%s: no image has the class number %s, and the highest is %d; class numbers count from 0.",
            folder,
            numbers,
            max(used),
        )


def _read_label(path: Path, member: tarfile.TarInfo) -> int:
    """Return the number in a .cls, or `label` (or `cls`) in a .json; -1 if the latter has none. Raises DataError."""
    message = f"{path}: the member {member.name!r} contains no class number of 0 or more"
    if member.size > _TEXT_BYTES:
        raise DataError(f"{message}, but {member.size:,} bytes")
    with path.open("rb") as file:
        text = os.pread(file.fileno(), member.size, member.offset_data)
    try:
        content = json.loads(text)
        value = content.get("label", content.get("cls")) if isinstance(content, dict) else content
    except (ValueError, RecursionError) as error:
        raise DataError(f"{message} ({error})") from error
    if value is None and isinstance(content, dict):
        return -1
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise DataError(f"{message}, but {str(value)[:40]}")
    return value
