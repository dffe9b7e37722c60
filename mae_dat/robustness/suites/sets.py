"""Image sets of the benchmarks: the images, labels and protocol of each cell, read from the published folders.

A cell is a benchmark, or one of its corruptions at one severity. `open_benchmark` rejects incomplete folders before
anything is computed. Shapes: N images of a cell, L labels of an image, B batch.
"""

import contextlib
import copy
import dataclasses
import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.groups import ImageSize
from mae_dat.config.paths import require_folder
from mae_dat.config.protocols import ProtocolName
from mae_dat.data.decode import ImageError, decode_file, read_bytes
from mae_dat.data.folders import IgnoredFiles
from mae_dat.data.image_set import ImageFolder, ImageSet
from mae_dat.robustness.corruptions import SEVERITIES
from mae_dat.robustness.suites.catalogue import BENCHMARKS, Benchmark
from mae_dat.robustness.suites.folders import (
    ExpectedFolder,
    Listing,
    check_size,
    check_some_sizes,
    corruption_folders,
    describe_listing_difference,
    list_images,
    missing_images,
    sampled_indices,
    severity_folders,
)
from mae_dat.robustness.suites.imagenet import NO_CLASS, ClassMapping
from mae_dat.robustness.suites.labels import (
    conflict_targets,
    find_label_file,
    read_objectnet,
    real_targets,
    select_subset,
)
from mae_dat.robustness.suites.preprocessing import Preprocessing
from mae_dat.runtime.inputs import count_of

logger = logging.getLogger(__name__)

PARTIAL_ADVICE = "complete it, or measure what is there as a row of its own with --partial"


class Cell(NamedTuple):
    """One measurement: a benchmark, or one corruption of it at one severity (otherwise "" and 0)."""

    benchmark: str
    corruption: str = ""
    severity: int = 0


class BenchmarkSet(ImageSet):
    """The images of one cell. An unreadable one raises an error; none is ever skipped.

    `targets` int64 (N, L): the correct labels, padded with a number that no prediction equals; for cue conflict (N, 2),
    shape and texture.
    """

    transform: Preprocessing

    def __init__(
        self,
        cell: Cell,
        root: str,
        listing: Listing,
        targets: Tensor,
        class_mapping: ClassMapping,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__(root, preprocessing)
        self.cell, self.listing, self.targets = cell, listing, targets
        self.class_mapping, self.side = class_mapping, preprocessing.side
        self.classes = list(class_mapping.classes)
        self.folder_indices: list[int] = []
        """The images' positions in the whole folder, if only some were selected; empty if these are 0 to N - 1."""
        self.left_out = 0
        """Number of images that the protocol excludes: without label (ReaL), with equal cues, of classes that ImageNet
        lacks."""
        self.missing: list[str] = []
        """Descriptions of what the folder lacks; empty unless it was opened as partial."""
        self.protocol: dict[str, str] = {
            "reading": class_mapping.name,
            "preprocessing": str(preprocessing),
            "folder": "",
            "subset": "",
        }

    def __len__(self) -> int:
        return len(self.listing)

    def name_of(self, index: int) -> str:
        """Return the path."""
        return f"{self.root}/{self.listing[index][0]}"

    def load_image(self, index: int) -> Image.Image:
        """Return the decoded image as the base class does; raise DataError also for an image whose size is not the
        stored one."""
        path = self.name_of(index)
        with _unpack_advice():
            image = decode_file(path)
        if self.side is not None:
            check_size(path, image.size, self.side)
        return image

    def prepared_image(self, index: int) -> Image.Image:
        """Return the input of the network as an 8-bit RGB image."""
        return self.transform.resize_and_crop(self.load_image(index))

    def folder_index(self, index: int) -> int:
        """Return an image's position in the whole folder. Its random draws depend on this position, and therefore not
        on the selection of other images."""
        return self.folder_indices[index] if self.folder_indices else index

    def label(self, index: int) -> int:
        """Return the first of the correct labels; for cue conflict the shape's."""
        return int(self.targets[index, 0])

    def fingerprint(self) -> str:
        """Return the hash of the paths below the root, all labels, and the bytes of up to 16 of the images, so that
        other images under the same names have another fingerprint.

        Raises DataError for an image that cannot be read.
        """
        names = "".join(f"{path}\0" for path, _ in self.listing).encode(errors="surrogateescape")
        return hashlib.sha256(names + self.targets.numpy().tobytes() + self._sampled_hashes()).hexdigest()

    def _sampled_hashes(self) -> bytes:
        """Return hashes of some image files."""
        return b"".join(hashlib.sha256(read_bytes(self.name_of(i))).digest() for i in sampled_indices(len(self)))

    def is_correct(self, predictions: Tensor, index: Tensor) -> Tensor:
        """Return whether the first of `predictions`, int64 (B, count), is a correct label of images `index`: bool (B,),
        on their device. `index`, int64 (B,), stays on the CPU as it comes from a loader."""
        targets = self.targets[index].to(predictions.device, non_blocking=True)
        if self.class_mapping.has_cues:  # cue conflict: the second column is the texture
            targets = targets[:, :1]
        return (predictions[:, :1] == targets).any(1)

    def is_texture(self, predictions: Tensor, index: Tensor) -> Tensor:
        """Return whether the prediction is the texture's class of a cue-conflict image: bool (B,)."""
        return predictions[:, 0] == self.targets[index, 1].to(predictions.device, non_blocking=True)

    # ---- variants; each is a copy ----

    def for_input(
        self, size_HW: ImageSize, interpolation: str, crop: float | None, protocol: ProtocolName = "native"
    ) -> "BenchmarkSet":
        """Return the same images, preprocessed for a network of another input."""
        preprocessing = dataclasses.replace(
            self.transform, size_HW=size_HW, interpolation=interpolation, crop=crop, protocol=protocol
        )
        other = self.with_transform(preprocessing)
        other.protocol = {**self.protocol, "preprocessing": str(preprocessing)}
        return other

    def with_mapping(self, class_mapping: ClassMapping) -> "BenchmarkSet":
        """Return the same images with another way from logits to predictions."""
        other = copy.copy(self)
        other.class_mapping = class_mapping
        other.protocol = {**self.protocol, "reading": class_mapping.name}
        return other

    def named(self, name: str) -> "BenchmarkSet":
        """Return the same images as a cell of another suite, for messages."""
        other = copy.copy(self)
        other.cell = Cell(name)
        return other

    def limited(self, limit: int, seed: int) -> "BenchmarkSet":
        """Return `limit` images drawn by `seed`, in their original order; they keep their indices in the folder."""
        if limit >= len(self):
            return self
        generator = torch.Generator().manual_seed(seed)
        selected = torch.randperm(len(self), generator=generator)[:limit].sort().values
        other = copy.copy(self)
        other.listing, other.targets = [self.listing[index] for index in selected], self.targets[selected]
        other.folder_indices = [self.folder_index(index) for index in selected.tolist()]
        subset = f"{limit:,} of {len(self):,} pictures (seed {seed})"
        previous = self.protocol["subset"]
        other.protocol = {**self.protocol, "subset": f"{subset}, {previous}" if previous else subset}
        return other


class CustomSet(BenchmarkSet):
    """The images of `images`, in a folder or in shards, with their own classes, as one cell."""

    def __init__(self, cell: Cell, images: ImageSet, class_mapping: ClassMapping, preprocessing: Preprocessing) -> None:
        listing = [(str(index), images.label(index)) for index in range(len(images))]
        targets = torch.tensor([label for _, label in listing])[:, None]
        super().__init__(cell, images.root, listing, targets, class_mapping=class_mapping, preprocessing=preprocessing)
        self.images, self.ignored_files = images, images.ignored_files
        if images.packed_size is not None:
            self.protocol["folder"] = f"shards, shrunk to {images.packed_size} px"

    def name_of(self, index: int) -> str:
        """Return the image set's name of the image."""
        return self.images.name_of(int(self.listing[index][0]))

    def load_image(self, index: int) -> Image.Image:
        """Return the decoded image."""
        with _unpack_advice():
            return self.images.load_image(int(self.listing[index][0]))

    def content_files(self) -> list[str]:
        """Return the paths of the selected images, or of all shards."""
        return super().content_files() if isinstance(self.images, ImageFolder) else self.images.content_files()

    def fingerprint(self) -> str:
        """Return the hash of the image set's fingerprint, the selected images, and the bytes of some of them."""
        selected = "".join(f"{index}\0" for index, _ in self.listing)
        # The fingerprint of shards covers the bytes of all images, but not the labels by names of a model's outputs.
        is_folder = isinstance(self.images, ImageFolder)
        samples = self._sampled_hashes() if is_folder else self.targets.numpy().tobytes()
        return hashlib.sha256((self.images.fingerprint() + selected).encode() + samples).hexdigest()


@contextlib.contextmanager
def _unpack_advice() -> Iterator[None]:
    """Replace the advice of image errors to delete or skip images, because an evaluation needs all of them."""
    try:
        yield
    except ImageError as error:
        raise DataError(f"{error.problem}; unpack it again") from error


def open_benchmark(
    requested: str | Benchmark,
    folder: str | Path,
    size_HW: ImageSize,
    interpolation: str = "bicubic",
    partial: bool = False,
    subset: Collection[str] | None = None,
    corruptions: Sequence[str] | None = None,
) -> list[BenchmarkSet]:
    """Open the cells of a benchmark in `folder`, for a network of input `size_HW`: one, or one for each corruption and
    severity.

    With `partial`, missing images are noted in `BenchmarkSet.missing` instead of raising an error; those that are
    present must still be correct. `subset` selects these "wnid/file", all of which must be present (`read_subset`).
    `corruptions` selects these; the default is all, with the extra ones that are present. Raises MissingInputError
    and DataError, with the reason, before any image is decoded; ConfigError for an unknown name.
    """
    benchmark, root = _look_up(requested, folder), Path(folder)
    folders, missing = _cell_folders(benchmark, str(root), corruptions)
    _require_complete(root, benchmark, missing, partial)
    preprocessing = Preprocessing(size_HW, interpolation, benchmark.side, benchmark.border, whole=benchmark.whole)
    logger.info("listing %s of %s", count_of(len(folders), "folder"), benchmark.title)
    first: Listing = []
    sets: list[BenchmarkSet] = []
    for cell, path in folders.items():
        every_image, listing, missing_of_cell = _list_cell(benchmark, path, subset, ignored_files := IgnoredFiles())
        _require_complete(path, benchmark, missing_of_cell, partial)
        if first and benchmark.same_names and not partial:
            _require_same_images(path, listing, folders[sets[0].cell], first)
        first = first or listing
        listing = first if listing == first else listing  # one list for all cells: 95 of 50,000 paths fill the memory
        if benchmark.side is not None:
            check_some_sizes(path, listing, benchmark.side)
        cell_set = _build_set(benchmark, cell, path, listing, preprocessing=preprocessing)
        cell_set.missing, cell_set.ignored_files = missing + missing_of_cell, ignored_files
        cell_set.protocol["folder"] = root.resolve().name  # distinguishes V2's two releases
        if subset is not None:
            _record_subset(cell_set, every_image, len(listing))
        sets.append(cell_set)
    return sets


def _require_same_images(path: str, listing: Listing, first_path: str, first: Listing) -> None:
    """Raise DataError unless a cell has the images of the first cell."""
    if listing != first:
        raise DataError(f"{path}: {describe_listing_difference(listing, first)}, unlike {first_path}; unpack it again")


def _look_up(requested: str | Benchmark, folder: str | Path) -> Benchmark:
    """Return a benchmark by its name, with ObjectNet's labels read from `folder`. Raises UserError."""
    benchmark = BENCHMARKS.get(requested) if isinstance(requested, str) else requested
    if benchmark is None:
        raise ConfigError(f"unknown benchmark {requested!r}: choose from {', '.join(BENCHMARKS)}")
    require_folder(folder)
    if benchmark.label_source not in ("objnet-113", "objnet-1000"):
        return benchmark
    objectnet = read_objectnet(Path(folder))
    mapping = objectnet.class_mapping(restricted=benchmark.label_source == "objnet-113")
    return dataclasses.replace(benchmark, labels=objectnet.labels, class_mapping=mapping)


def _record_subset(cell_set: BenchmarkSet, every_image: Listing, count: int) -> None:
    """Record the indices of the selected images in the whole folder, and the selection of `count` images."""
    index_of = {image: index for index, (image, _) in enumerate(every_image)}
    cell_set.folder_indices = [index_of[image] for image, _ in cell_set.listing]
    cell_set.protocol["subset"] = f"{count:,} pictures of a list"


def _list_cell(
    benchmark: Benchmark, path: str, subset: Collection[str] | None, ignored_files: IgnoredFiles
) -> tuple[Listing, Listing, list[str]]:
    """Return all images of a cell's folder, the selected ones, and what is missing. Raises DataError."""
    expected = ExpectedFolder(benchmark.title, benchmark.labels, benchmark.images, benchmark.per_class)
    every_image = list_images(path, expected, ignored_files)
    missing = missing_images(path, every_image, expected)
    if subset is None:
        return every_image, every_image, missing
    return every_image, select_subset(every_image, set(subset), path), []  # images outside of the subset may be missing


def _require_complete(root: str | Path, benchmark: Benchmark, missing: list[str], partial: bool) -> None:
    """Raise DataError if something is missing, unless `partial` allows it."""
    if missing and not partial:
        advice = PARTIAL_ADVICE.capitalize()
        raise DataError(f"{root}: {benchmark.title} is not complete: {'; '.join(missing)}. {advice}.")


def _cell_folders(
    benchmark: Benchmark, root: str, corruptions: Sequence[str] | None
) -> tuple[dict[Cell, str], list[str]]:
    """Return the folder of each cell, and what is missing. Raises DataError, ConfigError."""
    if not benchmark.corruptions:
        return {Cell(benchmark.name): root}, []
    names = benchmark.corruptions + benchmark.extra_corruptions
    if corruptions is not None and (unknown := [name for name in corruptions if name not in names]):
        raise ConfigError(f"{benchmark.title} has no corruption {unknown[0]!r}: choose from {', '.join(names)}")
    present = corruption_folders(root, corruptions or names, benchmark.title)
    extra = [name for name in benchmark.extra_corruptions if name in present]
    expected = corruptions or (*benchmark.corruptions, *extra)
    folders: dict[Cell, str] = {}
    missing = []
    for name in expected:
        paths = _severities(benchmark, present[name]) if name in present else {}
        folders |= {Cell(benchmark.name, name, severity): path for severity, path in paths.items()}
        if absent := [str(severity) for severity in SEVERITIES if severity not in paths]:
            missing.append(f"{name} has no severity {', '.join(absent)}" if paths else f"{name} is missing")
    return folders, missing


def _severities(benchmark: Benchmark, path: str) -> dict[int, str]:
    return severity_folders(path, benchmark.title, benchmark.by_strength, benchmark.severity_prefix)


def _build_set(
    benchmark: Benchmark, cell: Cell, path: str, listing: Listing, *, preprocessing: Preprocessing
) -> BenchmarkSet:
    """Return one cell: the images that the protocol measures, and their labels. Raises DataError if none is left."""
    if benchmark.label_source == "real":
        labeled, targets = real_targets(find_label_file(Path(path), "real.json"), listing)
    elif benchmark.label_source == "conflict":
        labeled, targets = conflict_targets(path, listing)
    else:
        with_class = [(image, label) for image, label in listing if label != NO_CLASS]
        labeled = listing if len(with_class) == len(listing) else with_class
        targets = torch.tensor([label for _, label in labeled])[:, None]
    if not labeled:
        raise DataError(f"{path}: {benchmark.title} has no image to measure: check its labels")
    cell_set = BenchmarkSet(
        cell,
        path,
        listing=labeled,
        targets=targets,
        class_mapping=benchmark.class_mapping,
        preprocessing=preprocessing,
    )
    cell_set.left_out = len(listing) - len(labeled)
    return cell_set
