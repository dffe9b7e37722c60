"""The robustness benchmarks of ImageNet: their folders, sizes, labels and protocols, as published."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA
from mae_dat.robustness.suites.imagenet import (
    ALL_CLASSES,
    CLASSES_OF_A,
    CLASSES_OF_R,
    IMAGENET_A,
    IMAGENET_R,
    SIXTEEN,
    SIXTEEN_CLASSES,
    SYNSETS,
    ClassMapping,
    synsets_of,
)

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


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What is known about a benchmark."""

    name: str
    title: str
    folder_names: tuple[str, ...]
    """Usual names of its folder; any spelling is recognized: ImageNet-C, imagenet_c."""
    images: int
    """Images in each cell, before the protocol leaves any out."""
    labels: Mapping[str, int]
    """Class folders and their labels; empty for ObjectNet, whose own files hold them."""
    per_class: int | None = None
    """Images of each class, if all classes have the same number."""
    class_mapping: ClassMapping = ALL_CLASSES
    label_source: Literal["folder", "real", "conflict", "objnet-113", "objnet-1000"] = "folder"
    """Where labels come from: the class folder, ReaL's file, the images' names, ObjectNet's mapping files."""
    side: int | None = None
    """Height and width in pixels of the stored images; never resized for a network of that size."""
    border: int = 0
    """Pixels cut off on each side first."""
    subfolder: str = ""
    """A folder within the benchmark's that may hold its class folders."""
    corruptions: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    """Further corruptions, measured if present."""
    by_strength: bool = False
    """Whether folders of severities may be named by their strength, as its authors' generator does."""


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


_WNIDS = _numbered(SYNSETS)
_A_LABELS = dict(zip(synsets_of(IMAGENET_A), IMAGENET_A, strict=True))
_R_LABELS = dict(zip(synsets_of(IMAGENET_R), IMAGENET_R, strict=True))
# ImageNet-V2's folders are class numbers. Sorted as text, folder "100" would become class 2.
_V2_LABELS = {str(number): number for number in range(len(SYNSETS))}
_CATEGORY_LABELS = _numbered(list(SIXTEEN))
_IMAGENET_FOLDERS = ("imagenet", "imagenet-1k", "imagenet-val", "ILSVRC2012", "val")

_IMAGENET = Benchmark("imagenet", "ImageNet", _IMAGENET_FOLDERS, 50_000, _WNIDS, per_class=50, subfolder="val")
_OBJECTNET = Benchmark(
    "objnet-113",
    "ObjectNet",
    ("objectnet-1.0", "objectnet"),
    50_273,
    labels={},
    label_source="objnet-113",
    border=2,
    subfolder="images",
)
_IMAGENET_C = Benchmark(
    "imagenet-c",
    "ImageNet-C",
    ("imagenet-c",),
    50_000,
    _WNIDS,
    per_class=50,
    side=224,
    corruptions=CORRUPTIONS,
    held_out=EXTRA,
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        _IMAGENET,
        dataclasses.replace(_IMAGENET, name="imagenet-real", title="ImageNet-ReaL", label_source="real"),
        Benchmark(
            "imagenet-v2",
            "ImageNet-V2",
            ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "imagenet-v2"),
            10_000,
            _V2_LABELS,
            per_class=10,
        ),
        Benchmark("imagenet-a", "ImageNet-A", ("imagenet-a",), 7500, _A_LABELS, class_mapping=CLASSES_OF_A),
        Benchmark("imagenet-r", "ImageNet-R", ("imagenet-r",), 30_000, _R_LABELS, class_mapping=CLASSES_OF_R),
        Benchmark(
            "imagenet-sketch", "ImageNet-Sketch", ("imagenet-sketch", "sketch"), 50_889, _WNIDS, subfolder="sketch"
        ),
        Benchmark(
            "stylized",
            "Stylized-ImageNet",
            ("stylized-imagenet", "imagenet-stylized", "imagenet-style"),
            50_000,
            _WNIDS,
            per_class=50,
            side=224,
            subfolder="val",
        ),
        _OBJECTNET,
        dataclasses.replace(_OBJECTNET, name="objnet-1000", label_source="objnet-1000"),
        _IMAGENET_C,
        dataclasses.replace(
            _IMAGENET_C,
            name="imagenet-c-bar",
            title="ImageNet-C-bar",
            folder_names=("imagenet-c-bar",),
            corruptions=C_BAR,
            held_out=(),
            by_strength=True,
        ),
        Benchmark(
            "cue-conflict",
            "cue conflict",
            ("cue-conflict", "style-transfer-preprocessed-512"),
            1280,
            _CATEGORY_LABELS,
            per_class=80,
            class_mapping=SIXTEEN_CLASSES,
            label_source="conflict",
            side=224,
        ),
    )
}
