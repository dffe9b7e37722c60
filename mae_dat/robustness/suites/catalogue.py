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
    LAION_C,
    LAION_C_CLASSES,
    SIXTEEN,
    SIXTEEN_CLASSES,
    SYNSETS,
    ClassMapping,
    synsets_of,
)

C_BAR = (  # spelled as by its authors
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


THREE_D = (  # Kar et al. 2022
    "near_focus",
    "far_focus",
    "bit_error",
    "color_quant",
    "flash",
    "fog_3d",
    "h265_abr",
    "h265_crf",
    "iso_noise",
    "low_light",
    "xy_motion_blur",
    "z_motion_blur",
)
LAION_DISTORTIONS = (  # Li et al. 2025
    "glitched",
    "mosaic",
    "stickers",
    "vertical_lines",
    "geometric_shapes",
    "luminance_checkerboard",
)


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Facts about a benchmark."""

    name: str
    title: str
    folder_names: tuple[str, ...]
    """Usual names of its folder; any spelling is recognized: ImageNet-C, imagenet_c."""
    images: int | None
    """Images in each cell, before the protocol excludes any; None if its authors do not state it."""
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
    """A subfolder that may contain the class folders."""
    corruptions: tuple[str, ...] = ()
    extra_corruptions: tuple[str, ...] = ()
    """Corruptions that are measured if present, and never part of a mean."""
    by_strength: bool = False
    """Whether folders of severities may be named by their strength, as its authors' generator does."""
    severity_prefix: str = ""
    """What the names of the folders of severities begin with."""
    same_names: bool = True
    """Whether all cells have images of the same names."""
    outputs: int = len(SYNSETS)
    """Outputs of the models that it is for: ImageNet's, or the number of its own classes."""
    arrays: bool = False
    """Whether the images are in CORRUPTION.npy, all severities one after the other, with labels.npy for all."""
    whole: bool = False
    """Whether the whole image is resized to the input, without a crop."""


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


_WNIDS = _numbered(SYNSETS)
_A_LABELS = dict(zip(synsets_of(IMAGENET_A), IMAGENET_A, strict=True))
_R_LABELS = dict(zip(synsets_of(IMAGENET_R), IMAGENET_R, strict=True))
# ImageNet-V2's folders are class numbers. Sorted as text, folder "100" would become class 2.
_V2_LABELS = {str(number): number for number in range(len(SYNSETS))}
_CATEGORY_LABELS = _numbered(list(SIXTEEN))
_IMAGENET = Benchmark(
    "imagenet",
    "ImageNet",
    folder_names=("imagenet", "imagenet-1k", "imagenet-val", "ILSVRC2012", "val"),
    images=50_000,
    labels=_WNIDS,
    per_class=50,
    subfolder="val",
)
_OBJECTNET = Benchmark(
    "objnet-113",
    "ObjectNet",
    folder_names=("objectnet-1.0", "objectnet"),
    images=50_273,
    labels={},
    label_source="objnet-113",
    border=2,
    subfolder="images",
)
_IMAGENET_C = Benchmark(
    "imagenet-c",
    "ImageNet-C",
    folder_names=("imagenet-c",),
    images=50_000,
    labels=_WNIDS,
    per_class=50,
    side=224,
    corruptions=CORRUPTIONS,
    extra_corruptions=EXTRA,
)
_3DCC = dataclasses.replace(
    _IMAGENET_C,
    name="imagenet-3dcc",
    title="ImageNet-3DCC",
    folder_names=("imagenet-3dcc", "imagenet3dcc", "3dcc"),
    corruptions=THREE_D,
    extra_corruptions=(),
)
_LAION_C = Benchmark(
    "laion-c",
    "LAION-C",
    folder_names=("laion-c", "laionc"),
    images=None,
    labels=_numbered(list(LAION_C)),
    class_mapping=LAION_C_CLASSES,
    corruptions=LAION_DISTORTIONS,
    severity_prefix="intensity_level_",
    same_names=False,
    whole=True,
)
_TINY = Benchmark(
    "tiny-imagenet-c",
    "Tiny-ImageNet-C",
    folder_names=("tiny-imagenet-c",),
    images=10_000,
    labels={},
    per_class=50,
    side=64,
    corruptions=CORRUPTIONS,
    extra_corruptions=EXTRA,
    outputs=200,
)
_CIFAR_10_C = dataclasses.replace(
    _TINY,
    name="cifar-10-c",
    title="CIFAR-10-C",
    folder_names=("cifar-10-c",),
    per_class=1000,
    side=32,
    outputs=10,
    arrays=True,
)
_CIFAR_100_C = dataclasses.replace(
    _CIFAR_10_C, name="cifar-100-c", title="CIFAR-100-C", folder_names=("cifar-100-c",), per_class=100, outputs=100
)
_C_BAR = dataclasses.replace(
    _IMAGENET_C,
    name="imagenet-c-bar",
    title="ImageNet-C-bar",
    folder_names=("imagenet-c-bar",),
    corruptions=C_BAR,
    extra_corruptions=(),
    by_strength=True,
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        _IMAGENET,
        dataclasses.replace(_IMAGENET, name="imagenet-real", title="ImageNet-ReaL", label_source="real"),
        Benchmark(
            "imagenet-v2",
            "ImageNet-V2",
            folder_names=(
                "imagenetv2-matched-frequency-format-val",
                "imagenetv2-matched-frequency",
                "imagenet-v2",
            ),
            images=10_000,
            labels=_V2_LABELS,
            per_class=10,
        ),
        Benchmark(
            "imagenet-a",
            "ImageNet-A",
            folder_names=("imagenet-a",),
            images=7500,
            labels=_A_LABELS,
            class_mapping=CLASSES_OF_A,
        ),
        Benchmark(
            "imagenet-r",
            "ImageNet-R",
            folder_names=("imagenet-r",),
            images=30_000,
            labels=_R_LABELS,
            class_mapping=CLASSES_OF_R,
        ),
        Benchmark(
            "imagenet-sketch",
            "ImageNet-Sketch",
            folder_names=("imagenet-sketch", "sketch"),
            images=50_889,
            labels=_WNIDS,
            subfolder="sketch",
        ),
        Benchmark(
            "stylized",
            "Stylized-ImageNet",
            folder_names=("stylized-imagenet", "imagenet-stylized", "imagenet-style"),
            images=50_000,
            labels=_WNIDS,
            per_class=50,
            side=224,
            subfolder="val",
        ),
        _OBJECTNET,
        dataclasses.replace(_OBJECTNET, name="objnet-1000", label_source="objnet-1000"),
        _IMAGENET_C,
        _C_BAR,
        _3DCC,
        _LAION_C,
        _TINY,
        _CIFAR_10_C,
        _CIFAR_100_C,
        Benchmark(
            "cue-conflict",
            "cue conflict",
            folder_names=("cue-conflict", "style-transfer-preprocessed-512"),
            images=1280,
            labels=_CATEGORY_LABELS,
            per_class=80,
            class_mapping=SIXTEEN_CLASSES,
            label_source="conflict",
            side=224,
        ),
    )
}
