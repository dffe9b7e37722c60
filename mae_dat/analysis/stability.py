"""Stability of features and of their nearest neighbors under corruptions: a measure without labels.

Shapes: N images, D features.
"""

import csv
import dataclasses
import io
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mae_dat.config.errors import ConfigError, InputSizeError
from mae_dat.config.groups import ImageSize
from mae_dat.data.image_set import Sample
from mae_dat.data.transforms import EvalTransform
from mae_dat.robustness.corruptions import MIN_SIDE, as_stored, corrupt_image, image_seed
from mae_dat.storage.files import atomic_write
from mae_dat.training.class_scores import exact_interval

logger = logging.getLogger(__name__)

_CHUNK = 1024  # images that are compared with all others at once


class CorruptedImages(Dataset[Sample]):
    """The images of a set, resized for a model, corrupted and stored as JPEG of quality 85, as in `evaluate`."""

    def __init__(
        self, load: Callable[[int], object], size_HW: ImageSize, corruption: str, severity: int, seed: int
    ) -> None:
        """`load` returns the PIL image of an index."""
        if min(size_HW) < MIN_SIDE:
            raise InputSizeError(f"corruptions need inputs of {MIN_SIDE} px a side, and the model takes {size_HW}.")
        self.load, self.resize = load, EvalTransform(size_HW).resize_and_crop
        self.corruption, self.severity, self.seed = corruption, severity, seed

    def __getitem__(self, index: int) -> Sample:
        """Return an image as uint8 (3, H, W), without a label. Raises DataError."""
        pixels = np.array(self.resize(self.load(index)))  # type: ignore[arg-type]
        seed = image_seed(self.seed, index, self.corruption, self.severity)
        pixels = as_stored(corrupt_image(pixels, self.corruption, self.severity, seed))
        image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return {"image": image, "label": -1, "index": index, "skipped": 0}


@dataclasses.dataclass(frozen=True)
class Stability:
    """How much of the features is left under one corruption at one severity, each with a 95 % interval over images."""

    corruption: str
    severity: int
    similarity: float
    """Mean cosine similarity of the features of an image and of its corrupted copy."""
    similarity_ends: tuple[float, float]
    neighbors: float
    """Mean share, 0 to 1, of an image's nearest other images that are also nearest to its corrupted copy."""
    neighbors_ends: tuple[float, float]
    found: float
    """Share, 0 to 1, of corrupted copies whose nearest clean image is their own original."""
    found_ends: tuple[float, float]

    def row(self) -> list[str]:
        """Return the values as text, for a table or a CSV file."""
        values = [self.similarity, *self.similarity_ends, self.neighbors, *self.neighbors_ends, self.found]
        return [self.corruption, str(self.severity), *(f"{value:.4f}" for value in (*values, *self.found_ends))]


HEAD = (
    *("corruption", "severity", "similarity", "similarity_low", "similarity_high"),
    *("neighbors_kept", "neighbors_low", "neighbors_high", "original_found", "found_low", "found_high"),
)


def stability(
    clean: NDArray[np.float32], corrupted: NDArray[np.float32], corruption: str, severity: int, neighbors: int = 10
) -> Stability:
    """Compare features (N, D) of images with those of their corrupted copies, in the same order.

    Raises ConfigError for features that are not finite, or fewer than `neighbors` + 2 images.
    """
    if len(clean) < neighbors + 2:
        raise ConfigError(
            f"{len(clean)} images are too few for their {neighbors} nearest neighbors: give at least {neighbors + 2}."
        )
    if not (np.isfinite(clean).all() and np.isfinite(corrupted).all()):
        raise ConfigError(f"the features of {corruption} {severity} are NaN or infinite: check the model.")
    bank, queries = F.normalize(torch.from_numpy(clean), dim=1), F.normalize(torch.from_numpy(corrupted), dim=1)
    similarity = (bank * queries).sum(1).double().numpy()
    kept, found = [], []
    for start in range(0, len(bank), _CHUNK):
        part = slice(start, start + _CHUNK)
        own = torch.arange(start, min(start + _CHUNK, len(bank)))
        near = _nearest_others(bank[part] @ bank.T, own, neighbors)
        to_queries = queries[part] @ bank.T
        found.append(to_queries.argmax(1) == own)
        near_corrupted = _nearest_others(to_queries, own, neighbors)
        kept.append((near[:, :, None] == near_corrupted[:, None, :]).any(2).float().mean(1))
    shares, hits = torch.cat(kept).double().numpy(), int(torch.cat(found).sum())
    return Stability(
        corruption,
        severity,
        similarity=float(similarity.mean()),
        similarity_ends=_mean_interval(similarity),
        neighbors=float(shares.mean()),
        neighbors_ends=_mean_interval(shares),
        found=hits / len(bank),
        found_ends=exact_interval(hits, len(bank)),
    )


def _nearest_others(similarity: Tensor, own: Tensor, neighbors: int) -> Tensor:
    """Return the indices (B, k) of the nearest images other than the image itself."""
    others = similarity.clone()
    others[torch.arange(len(own)), own] = -math.inf
    return others.topk(neighbors, dim=1).indices


def _mean_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of the mean over images: Student's."""
    from scipy.stats import t as student

    half = float(student.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    middle = float(values.mean())
    return middle - half, middle + half


def write_stability(rows: Sequence[Stability], path: Path) -> None:
    """Write the rows as CSV, atomically. Raises StorageError."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(HEAD)
    writer.writerows(row.row() for row in rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def stability_lines(rows: Sequence[Stability], neighbors: int, images: int) -> list[str]:
    """Return the table for the console, and what its columns mean."""
    width = max(len(row.corruption) for row in rows)
    lines = [f"{'corruption':<{width}}  severity  similarity             neighbors kept (%)    original found (%)"]
    for row in rows:
        similarity = f"{row.similarity:.3f} [{row.similarity_ends[0]:.3f}, {row.similarity_ends[1]:.3f}]"
        kept, found = (
            f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            for value, (low, high) in ((row.neighbors, row.neighbors_ends), (row.found, row.found_ends))
        )
        lines.append(f"{row.corruption:<{width}}  {row.severity:>8}  {similarity:<21}  {kept:<20}  {found}")
    chance = 100 * neighbors / (images - 1)
    return [
        *lines,
        f"{images:,} images; 95 % intervals over images.",
        "similarity: cosine of the features of an image and of its corrupted copy",
        f"neighbors kept: of the {neighbors} nearest other images; {chance:.1f} % by chance",
        "original found: the nearest clean image of a corrupted copy is its own",
    ]
