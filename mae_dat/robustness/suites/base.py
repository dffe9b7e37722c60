"""A suite: its passes over images, its settings, and its facts for a report.

Shapes: B batch, S cells of a pass.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae_dat.config.errors import ConfigError, listing
from mae_dat.config.groups import ClassOrder, ImageSize, check_limits
from mae_dat.config.protocols import ProtocolName
from mae_dat.data.decode import decoding_settings
from mae_dat.data.file_facts import FileState
from mae_dat.models.modes import Network
from mae_dat.robustness.scores.results import SuiteFacts
from mae_dat.robustness.suites.functions import ImageFunction
from mae_dat.robustness.suites.sets import BenchmarkSet

CLEAN, GENERATED, CONFLICT = "clean", "generated", "conflict"

Adversary = Callable[[Network, Tensor, Tensor, Tensor], Tensor]
"""(network, images (B, 3, H, W), labels (B,), indices in the whole folder (B,)) to adversarial images (B, 3, H, W)."""
WordHits = Callable[[Network, Tensor, Tensor, Tensor], Tensor]
"""The same arguments to bool (S, B): whether the prediction is correct at each share of changed words."""


@dataclasses.dataclass(frozen=True)
class ImagePass:
    """One pass over an image set, which gives S cells: each image is read once and evaluated in S versions.

    S is 1, or 5 if a corruption is made at every severity, or the number of word budgets of a word attack.
    """

    images: BenchmarkSet
    cells: tuple[str, ...] = ("",)
    """Names of the cells, in the order of the S axis."""
    corruption: str = ""
    severities: tuple[int, ...] = ()
    """The severities of images that are corrupted here: one cell each."""
    seed: int = 0
    """The seed of the corruption's random draws."""
    function: ImageFunction | None = None
    """A user's function that changes each image, with `seed`. Such a pass is measured by every call."""
    adversary: Adversary | None = None
    word_hits: WordHits | None = None
    calibrated: bool = False
    """Whether confidences are measured too."""
    float32: bool = False
    """Whether it is always measured in float32."""
    fixed_batches: bool = False
    """Whether batches are the same for any number of ranks, because the images of a batch share their random draws."""
    compare_with_float32: bool = False
    """Whether a prediction counts as correct if it equals the one of the same network in float32."""

    @property
    def files(self) -> FileState:
        """The files of the images as they are now."""
        return FileState(self.images.content_files(), whole=True)


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite for one network: passes over images that are all measured in the same way."""

    name: str
    title: str
    passes: tuple[ImagePass, ...]
    official: bool
    """Whether the images are the published files."""
    extra_protocol: dict[str, str] = dataclasses.field(default_factory=dict)
    """What was done to the images; added to the protocol of the image set."""
    packages: tuple[str, ...] = ()
    """Required packages in addition to those of `mae_dat.runtime.environment`."""

    @property
    def protocol(self) -> dict[str, str]:
        """How it is measured: part of a result's key."""
        return {**self.passes[0].images.protocol, **self.extra_protocol, **decoding_settings()}

    @property
    def preprocessing(self) -> str:
        """The preprocessing in words. Networks with the same one see the same pixels, which are read once for all."""
        return self.passes[0].images.protocol["preprocessing"]

    @functools.cached_property
    def fingerprints(self) -> list[str]:
        """The fingerprint of each pass's images."""
        return [image_pass.images.fingerprint() for image_pass in self.passes]

    @property
    def image_count(self) -> int:
        """Images in each cell; in the largest one, if the cells of a partial folder differ."""
        return max(len(image_pass.images) for image_pass in self.passes)

    @property
    def missing(self) -> list[str]:
        """Everything missing in any of its cells, with the names of these cells unless all lack it."""
        cells_of: dict[str, list[str]] = {}
        for image_pass in self.passes:
            for text in image_pass.images.missing:
                cells_of.setdefault(text, []).append(image_pass.cells[0])
        return [
            text if len(cells) == len(self.passes) else f"{listing(cells, 5)}: {text}"
            for text, cells in cells_of.items()
        ]

    @property
    def facts(self) -> SuiteFacts:
        """The facts for a report."""
        joined = hashlib.sha256("".join(self.fingerprints).encode()).hexdigest()
        return {
            "title": self.title,
            "protocol": self.protocol,
            "official": self.official,
            "images": self.image_count,
            "left_out": max(image_pass.images.left_out for image_pass in self.passes),
            "missing": self.missing,
            "fingerprint": joined if len(set(self.fingerprints)) > 1 else self.fingerprints[0],
        }


class NetworkInput(NamedTuple):
    """How images are resized for a network."""

    size_HW: ImageSize
    interpolation: str = "bicubic"
    crop: float | None = None
    """The crop's side over the resized image's; None for the usual one."""
    protocol: ProtocolName = "native"


@dataclasses.dataclass(frozen=True)
class SuiteSettings:
    """Which images below a folder are measured, and how."""

    root: Path
    partial: bool = False
    """Accept incomplete folders; their rows are marked."""
    restrict_classes: bool = False
    """Predict among the classes that have images in a suite's folder, instead of all outputs."""
    classes: tuple[str, ...] | None = None
    """The names of the outputs, in place of those stored with the networks."""
    class_order: ClassOrder = "auto"
    """How class folders without known names become outputs."""
    subset: Path | None = None
    """RobustBench's list of 5,000 images, for ImageNet and ImageNet-C."""
    limit: int | None = None
    """Images of each cell."""
    limit_corrupted: int | None = None
    """Images of each cell of corrupted images and of attacks, where it is below `limit`."""
    seed: int = 0
    extra_corruptions: bool = False
    """Whether to make the `EXTRA` corruptions too, for corruptions that are made here."""
    tokenizer: str = "embedded"
    rescore: int = 100
    """Candidates of each step of `words-symbolic` whose loss is computed exactly; 0 for the first-order choice."""
    batch_size: int = 64
    """Only AutoAttack's result depends on it."""
    device: torch.device | str = "cpu"
    shifts: tuple[Any, ...] = ()
    """The user's own suites (`suites.shifts.Shift`)."""
    data_path: str | None = None
    """What named the root, for the summary of the inputs; None if the environment variable did."""

    def __post_init__(self) -> None:
        check_limits(self.limit, self.limit_corrupted)
        if self.rescore < 0:
            raise ConfigError(f"--rescore {self.rescore}: give a number of candidates, or 0 for none.")
