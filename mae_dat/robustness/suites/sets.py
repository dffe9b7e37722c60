"""The robustness benchmarks of ImageNet as image sets, from the folders that they are published in.

Each cell (a benchmark, or its corruption at a severity) is a `BenchmarkSet`: pictures, labels, the `Reading` that says
which logits count, and the protocol that is part of a result's key. `open_benchmark` refuses what is not whole before
anything is computed. Sizes are those of the published sets; N images of a cell.
"""

import contextlib
import dataclasses
import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.groups import ImageSize
from mae_dat.data.decode import ADVICE, decode_file, read_bytes
from mae_dat.data.folders import require_folder
from mae_dat.data.image_set import ImageFolder, ImageSet
from mae_dat.data.transforms import EvalTransform
from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA, SEVERITIES
from mae_dat.robustness.suites.folders import (
    Expected,
    Listing,
    check_size,
    check_some_sizes,
    corruption_folders,
    difference,
    evenly_spread,
    list_pictures,
    severity_folders,
    shortfall,
)
from mae_dat.robustness.suites.imagenet import (
    ALL_CLASSES,
    CLASSES_OF_A,
    CLASSES_OF_R,
    IMAGENET_A,
    IMAGENET_R,
    NO_CLASS,
    SIXTEEN,
    SIXTEEN_CLASSES,
    SYNSETS,
    Reading,
    synsets_of,
)
from mae_dat.robustness.suites.labels import (
    beside,
    conflict_targets,
    only_these,
    read_objectnet,
    real_targets,
)

logger = logging.getLogger(__name__)

C_BAR = (  # as its authors spell them
    "blue_noise_sample",
    "brownish_noise",
    "caustic_refraction",
    "checkerboard_cutout",
    "cocentric_sine_waves",
    "inverse_sparkles",
    "perlin_noise",
    "plasma_noise",
    "single_frequency_greyscale",
    "sparkles",
)
PARTIAL = "complete it, or measure what is there as a row of its own with --partial"


class Cell(NamedTuple):
    """One measurement: a benchmark, or one corruption of it at one severity (otherwise "" and 0)."""

    benchmark: str
    corruption: str = ""
    severity: int = 0


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark."""

    name: str
    title: str
    usual: tuple[str, ...]
    """What its folder is called, in any spelling: ImageNet-C, imagenet_c."""
    images: int
    """Pictures in each cell, before any are left out by the protocol."""
    labels: Mapping[str, int]
    """Class folders and their labels; for ObjectNet its own files say it."""
    per_class: int | None = None
    """Pictures of each class, where they are equally many."""
    reading: Reading = ALL_CLASSES
    source: Literal["folder", "real", "conflict", "objnet-113", "objnet-1000"] = "folder"
    """Where labels come from: the class folder, ReaL's file, the pictures' names, ObjectNet's mapping files."""
    side: int | None = None
    """Stored at this size in pixels, and never resized for a network of that size."""
    border: int = 0
    """Pixels cut off on each side first."""
    inside: str = ""
    """A folder within the benchmark's that may hold its class folders."""
    corruptions: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    """Further corruptions, measured where they are there."""
    by_strength: bool = False
    """Whether folders of severities may be named by their strength, as its authors' generator does."""


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


_WNIDS = _numbered(SYNSETS)
_A, _R = (dict(zip(synsets_of(part), part, strict=True)) for part in (IMAGENET_A, IMAGENET_R))
# Labels are the folders' numbers: sorted as text, folder "100" would come third.
_V2 = {str(number): number for number in range(len(SYNSETS))}
_VAL = ("imagenet", "imagenet-1k", "imagenet-val", "ILSVRC2012", "val")
_V2_NAMES = ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "imagenet-v2")
_SIN = ("stylized-imagenet", "imagenet-stylized", "imagenet-style")
_SKETCH = ("imagenet-sketch", "sketch")
_NET = ("objectnet-1.0", "objectnet")
_CUE = ("cue-conflict", "style-transfer-preprocessed-512")
_SHAPES = _numbered(list(SIXTEEN))
_C = Benchmark("", "", ("imagenet-c",), 50_000, _WNIDS, 50, side=224, corruptions=C_BAR)

BENCHMARKS: dict[str, Benchmark] = {
    found.name: found
    for found in (
        Benchmark("imagenet", "ImageNet", _VAL, 50_000, _WNIDS, 50, inside="val"),
        Benchmark("imagenet-real", "ImageNet-ReaL", _VAL, 50_000, _WNIDS, 50, source="real", inside="val"),
        Benchmark("imagenet-v2", "ImageNet-V2", _V2_NAMES, 10_000, _V2, 10),
        Benchmark("imagenet-a", "ImageNet-A", ("imagenet-a",), 7500, _A, reading=CLASSES_OF_A),
        Benchmark("imagenet-r", "ImageNet-R", ("imagenet-r",), 30_000, _R, reading=CLASSES_OF_R),
        Benchmark("imagenet-sketch", "ImageNet-Sketch", _SKETCH, 50_889, _WNIDS, inside="sketch"),
        Benchmark("stylized", "Stylized-ImageNet", _SIN, 50_000, _WNIDS, 50, side=224, inside="val"),
        Benchmark("objnet-113", "ObjectNet", _NET, 50_273, {}, source="objnet-113", border=2, inside="images"),
        Benchmark("objnet-1000", "ObjectNet", _NET, 50_273, {}, source="objnet-1000", border=2, inside="images"),
        dataclasses.replace(_C, name="imagenet-c", title="ImageNet-C", corruptions=CORRUPTIONS, held_out=EXTRA),
        dataclasses.replace(
            _C, name="imagenet-c-bar", title="ImageNet-C-bar", usual=("imagenet-c-bar",), by_strength=True
        ),
        Benchmark("cue-conflict", "cue conflict", _CUE, 1280, _SHAPES, 80, SIXTEEN_CLASSES, "conflict", 224),
    )
}


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """From a decoded picture to the network's input; as text it is part of a result's key."""

    size_HW: ImageSize
    interpolation: str = "bicubic"
    side: int | None = None
    border: int = 0
    crop: float | None = None
    """The crop's side over the resized picture's, of a network that has one of its own; not for sets of one size."""
    keep: bool = False
    """Whether a picture that has the network's size by chance passes unchanged: not in the benchmarks."""

    def __call__(self, image: Image.Image) -> Tensor:
        return to_tensor(self.picture(image))

    def picture(self, image: Image.Image) -> Image.Image:
        """The picture that becomes the input, 8 bits a channel."""
        width, height = image.size
        if self.border:
            image = image.crop((self.border, self.border, width - self.border, height - self.border))
        # What is stored at one size is never cropped.
        stored = self.side is not None
        crop_pct, keep_size = 1.0 if stored else self.crop, stored or self.keep
        return EvalTransform(self.size_HW, self.interpolation, crop_pct, keep_size).resize_and_crop(image)

    def __str__(self) -> str:
        size, side = f"{self.size_HW[0]} x {self.size_HW[1]}", self.side
        if side is None:
            height, width = EvalTransform(self.size_HW, crop_pct=self.crop).cover_HW
            cut = f"border of {self.border} px cut, " if self.border else ""
            cut += f"if not {size}: " if self.keep else ""
            own = f", the network's own share of {self.crop:g}" if self.crop else ""
            return f"{cut}resized to cover {height} x {width} ({self.interpolation}), centre crop {size}{own}"
        as_stored = f"{side} x {side} as stored"
        return as_stored if self.size_HW == (side, side) else f"{as_stored}, resized to {size} ({self.interpolation})"


class BenchmarkSet(ImageSet):
    """The pictures of one cell. A bad one is an error, never a skip.

    `targets` int64 (N, L): the labels that are right, filled up with a number that no answer has; for cue conflict
    (N, 2), shape and texture.
    """

    def __init__(
        self, cell: Cell, root: str, listing: Listing, targets: Tensor, reading: Reading, prepare: Preprocessing
    ) -> None:
        super().__init__(root, prepare)
        self.cell, self.listing, self.targets, self.reading, self.side = cell, listing, targets, reading, prepare.side
        self.classes = list(reading.classes)
        self.numbers: list[int] = []
        """The pictures' places in the whole folder, of which only some were chosen; empty for their places here."""
        self.left_out = 0
        """Pictures that the protocol leaves out: unlabelled (ReaL), of equal cues, of classes that ImageNet lacks."""
        self.missing: list[str] = []
        """What the folder lacks, in words; empty unless it was opened as partial."""
        self.protocol: dict[str, str] = {
            "reading": reading.name,
            "preprocessing": str(prepare),
            "folder": "",
            "subset": "",
        }

    def __len__(self) -> int:
        return len(self.listing)

    def name_of(self, index: int) -> str:
        """The path."""
        return f"{self.root}/{self.listing[index][0]}"

    def load_image(self, index: int) -> Image.Image:
        """As the base class; DataError also for a picture of another size than the set is stored at."""
        path = self.name_of(index)
        with _nothing_skipped():
            picture = decode_file(path)
        if self.side is not None:
            check_size(path, picture.size, self.side)
        return picture

    def number(self, index: int) -> int:
        """A picture's place in the whole folder, which its chance depends on: the same whichever others are taken."""
        return self.numbers[index] if self.numbers else index

    def label(self, index: int) -> int:
        """The first of the right labels; the shape's for cue conflict."""
        return int(self.targets[index, 0])

    def fingerprint(self) -> str:
        """Of the paths below the root, all labels, and the bytes of up to 16 of the pictures: a set that was made anew
        under the same names is another. Raises DataError for one that cannot be read."""
        names = "".join(f"{path}\0" for path, _ in self.listing).encode(errors="surrogateescape")
        return hashlib.sha256(names + self.targets.numpy().tobytes() + self._looks()).hexdigest()

    def _looks(self) -> bytes:
        """Hashes of some pictures' files."""
        return b"".join(hashlib.sha256(read_bytes(self.name_of(at))).digest() for at in evenly_spread(len(self)))

    def right(self, answers: Tensor, index: Tensor) -> Tensor:
        """Bool (B,), where `answers` are: whether the first of `answers`, int64 (B, best), is a right one of images
        int64 (B,), which stay on the CPU as they come from a loader."""
        right = self.targets[index].to(answers.device, non_blocking=True)
        if self.reading.pooled:
            right = right[:, :1]
        return (answers[:, :1] == right).any(1)

    def texture(self, answers: Tensor, index: Tensor) -> Tensor:
        """Bool (B,): whether the answer is the texture's class of a cue-conflict picture."""
        return answers[:, 0] == self.targets[index, 1].to(answers.device, non_blocking=True)


class CustomSet(BenchmarkSet):
    """The pictures of `images`, in a folder or in shards, with classes of their own, as one cell."""

    def __init__(self, cell: Cell, images: ImageSet, reading: Reading, prepare: Preprocessing) -> None:
        listing = [(str(index), images.label(index)) for index in range(len(images))]
        targets = torch.tensor([label for _, label in listing])[:, None]
        super().__init__(cell, images.root, listing, targets, reading, prepare)
        self.images = images
        if images.packed_size is not None:
            self.protocol["folder"] = f"shards, shrunk to {images.packed_size} px"

    def name_of(self, index: int) -> str:
        """As the image set names it."""
        return self.images.name_of(int(self.listing[index][0]))

    def load_image(self, index: int) -> Image.Image:
        """As the base class."""
        with _nothing_skipped():
            return self.images.load_image(int(self.listing[index][0]))

    def fingerprint(self) -> str:
        """Of the image set, of which of its pictures are taken, and of some of their bytes."""
        chosen = "".join(f"{number}\0" for number, _ in self.listing)
        # The index of shards tells the bytes of all of them.
        looks = self._looks() if isinstance(self.images, ImageFolder) else b""
        return hashlib.sha256((self.images.fingerprint() + chosen).encode() + looks).hexdigest()


@contextlib.contextmanager
def _nothing_skipped() -> Iterator[None]:
    """Takes the advice to delete or skip out of the errors of pictures: an evaluation does neither."""
    try:
        yield
    except DataError as error:
        raise DataError(str(error).replace(ADVICE, "unpack it again")) from error


def open_benchmark(
    benchmark: str | Benchmark,
    folder: str | Path,
    size_HW: ImageSize,
    interpolation: str = "bicubic",
    partial: bool = False,
    subset: Collection[str] | None = None,
    corruptions: Sequence[str] | None = None,
) -> list[BenchmarkSet]:
    """The cells of a benchmark in `folder`, for a network of input `size_HW`: one, or one a corruption and severity.

    `partial`: what is missing is noted in the sets instead of refused; what is there must still be right. `subset`:
    only these "wnid/file", all of them (`read_subset`). `corruptions`: these alone; by default all, and held-out ones
    that are there. Raises MissingInputError and DataError, with the reason, before any picture is decoded; ConfigError
    for a name.
    """
    known = BENCHMARKS.get(benchmark) if isinstance(benchmark, str) else benchmark
    if known is None:
        raise ConfigError(f"unknown benchmark {benchmark!r}: choose from {', '.join(BENCHMARKS)}")
    require_folder(folder)
    root, reading = Path(folder), known.reading
    if known.source in ("objnet-113", "objnet-1000"):
        own = read_objectnet(root)
        known = dataclasses.replace(known, labels=own.labels)
        reading = own.reading(restricted=known.source == "objnet-113")
    expected = Expected(known.title, known.labels, known.images, known.per_class)
    places, missing = _places(known, str(root), corruptions)
    _refuse(root, known, missing, partial)
    prepare = Preprocessing(size_HW, interpolation, known.side, known.border)
    logger.info("looking through %d folder(s) of %s", len(places), known.title)
    first: Listing = []
    sets: list[BenchmarkSet] = []
    for cell, place in places.items():
        every = list_pictures(place, expected)
        listing, short = every, shortfall(place, every, expected)
        if subset is not None:  # which are either all there or an error
            listing, short = only_these(every, set(subset), place), []
        _refuse(place, known, short, partial)
        if first and listing != first and not partial:
            raise DataError(f"{place}: {difference(listing, first)}, unlike {places[sets[0].cell]}; unpack it again")
        first = first or listing
        listing = first if listing == first else listing  # kept once for all cells
        if known.side is not None:
            check_some_sizes(place, listing, known.side)
        sets.append(_set_of(known, cell, place, listing, reading, prepare))
        sets[-1].missing = missing + short
        if subset is not None:
            places_of = {path: number for number, (path, _) in enumerate(every)}
            sets[-1].numbers = [places_of[path] for path, _ in sets[-1].listing]
        sets[-1].protocol["folder"] = root.resolve().name  # tells V2's two releases apart
        sets[-1].protocol["subset"] = f"{len(listing):,} pictures of a list" if subset is not None else ""
    return sets


def _refuse(root: str | Path, benchmark: Benchmark, missing: list[str], partial: bool) -> None:
    """Raises DataError for what is missing, unless that is wanted."""
    if missing and not partial:
        raise DataError(f"{root}: {benchmark.title} is not complete: {'; '.join(missing)}. {PARTIAL.capitalize()}.")


def _places(benchmark: Benchmark, root: str, only: Sequence[str] | None) -> tuple[dict[Cell, str], list[str]]:
    """The folder of each cell, and what is missing. Raises DataError, ConfigError."""
    if not benchmark.corruptions:
        return {Cell(benchmark.name): root}, []
    every = benchmark.corruptions + benchmark.held_out
    if only is not None and (unknown := [name for name in only if name not in every]):
        raise ConfigError(f"{benchmark.title} has no corruption {unknown[0]!r}: choose from {', '.join(every)}")
    found = corruption_folders(root, only or every, benchmark.title)
    wanted = only or (*benchmark.corruptions, *(name for name in benchmark.held_out if name in found))
    places: dict[Cell, str] = {}
    missing = []
    for name in wanted:
        severities = severity_folders(found[name], benchmark.title, benchmark.by_strength) if name in found else {}
        places |= {Cell(benchmark.name, name, severity): path for severity, path in severities.items()}
        if absent := [str(severity) for severity in SEVERITIES if severity not in severities]:
            missing.append(f"{name} has no severity {', '.join(absent)}" if severities else f"{name} is missing")
    return places, missing


def _set_of(
    benchmark: Benchmark, cell: Cell, place: str, listing: Listing, reading: Reading, prepare: Preprocessing
) -> BenchmarkSet:
    """One cell: the pictures that the protocol takes, and their labels."""
    if benchmark.source == "real":
        kept, targets = real_targets(beside(Path(place), "real.json"), listing)
    elif benchmark.source == "conflict":
        kept, targets = conflict_targets(place, listing)
    else:
        own = [(path, label) for path, label in listing if label != NO_CLASS]
        kept = listing if len(own) == len(listing) else own
        targets = torch.tensor([label for _, label in kept])[:, None]
    if not kept:
        raise DataError(f"{place}: {benchmark.title} leaves no picture to measure; check its labels")
    found = BenchmarkSet(cell, place, kept, targets, reading, prepare)
    found.left_out = len(listing) - len(kept)
    return found
