"""Whether a network's confidence is worth what it says: expected calibration error, RMS calibration error, negative
log-likelihood and Brier score.

Shapes: B batch, C classes, N images. All come from one row an image, kept at the image's number: the results depend
neither on batches nor on ranks, except where a network's own arithmetic does.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mae_dat.config.errors import DataError, NumericsError

ROWS = SEEN, CONFIDENCE, CORRECT, NLL, BRIER = range(5)


@dataclass
class Confidences:
    """What calibration needs to know of each of N images. `add` batches on every rank, then `reduce` once."""

    images: int
    device: torch.device | str = "cpu"
    """Where probabilities come from; what is measured stays there until it is summed."""
    rows: Tensor = field(init=False)
    """Float64 (5, N): seen, confidence, correct, negative log-likelihood, Brier score."""

    def __post_init__(self) -> None:
        self.rows = torch.zeros(len(ROWS), self.images, dtype=torch.float64, device=self.device)

    def add(self, index: Tensor, probabilities: Tensor, labels: Tensor) -> None:
        """A batch: image numbers int64 (B,), probabilities float64 (B, C), labels int64 (B,).

        The confidence is the highest probability.
        """
        probabilities = probabilities.double()
        confidence, answer = probabilities.max(1)
        given = probabilities.gather(1, labels[:, None])[:, 0]
        brier = probabilities.square().sum(1) - 2 * given + 1  # the sum over classes of (p - [c = label])^2
        rows = [torch.ones_like(given), confidence, (answer == labels).double(), -given.log(), brier]
        # Added, not set: a second time shows in the first row.
        self.rows.index_add_(1, index.to(self.device), torch.stack(rows))

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """The rows of all ranks, on the CPU. Every rank holds zeros where the others' images are, so that the sum is
        exact.

        Raises on every rank DataError unless each image was seen exactly once, and NumericsError for a NaN.
        """
        self.rows = all_sum(self.rows).cpu()
        for image in (self.rows[SEEN] != 1).nonzero().flatten().tolist():
            raise DataError(f"image {image} was measured {int(self.rows[SEEN, image])} times instead of once")
        if bool(self.rows[CONFIDENCE].isnan().any()):
            raise NumericsError(
                "the network's probabilities are not numbers: check its weights, or evaluate in float32"
            )

    def scores(self) -> dict[str, float | None]:
        """Every number by its name: ece, rms, rms_compat (from 200 images on), nll, brier. None for an infinite nll,
        which JSON has no number for: an image's class had probability 0."""
        confidence, correct = self.rows[CONFIDENCE], self.rows[CORRECT]
        found: dict[str, float | None] = {
            "ece": expected_error(confidence, correct),
            "rms": rms_error(confidence, correct),
        }
        if self.images >= 2 * RMS_BIN:
            found["rms_compat"] = rms_error(confidence, correct, compat=True)
        nll = _mean(self.rows[NLL])
        return found | {"nll": nll if math.isfinite(nll) else None, "brier": _mean(self.rows[BRIER])}


RMS_BIN = 100  # images


def _mean(values: Tensor) -> float:
    """The mean, its sum rounded once: the same in whatever order the images come."""
    return math.fsum(values.tolist()) / len(values)


def _gap(confidence: Tensor, correct: Tensor) -> float:
    """|mean confidence - accuracy| of one bin."""
    return abs(_mean(confidence) - _mean(correct))


def expected_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """ECE (Guo et al. 2017, arXiv 1706.04599), 0 to 1: the mean gap between confidence and accuracy over bins of equal
    width, (lower, upper], weighted by their images.

    `confidence` in 0..1 and `correct` 0 or 1 are float64 (N,).
    """
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    bin_of = torch.bucketize(confidence, edges)
    members = [bin_of == number for number in range(bins)]
    return math.fsum(
        int(own.sum()) / len(confidence) * _gap(confidence[own], correct[own]) for own in members if own.any()
    )


def rms_error(confidence: Tensor, correct: Tensor, compat: bool = False) -> float:
    """RMS calibration error (Hendrycks et al. 2019, arXiv 1812.04606), 0 to 1: the root of the weighted mean of squared
    gaps over bins of 100 images in the order of confidence, the last one with the remainder too.

    `compat` leaves the last bin out of the sum, though not out of the weights, as the authors' released code does: the
    100 to 199 most confident images. Images of equal confidence stay in their own order. Raises ValueError for
    `compat` with a single bin.
    """
    order = torch.argsort(confidence, stable=True)
    cuts = [*range(0, max(1, len(order) // RMS_BIN) * RMS_BIN, RMS_BIN), len(order)]
    spans = list(itertools.pairwise(cuts))
    if compat and len(spans) < 2:
        raise ValueError(f"{len(order)} images make a single bin, and that is the one left out: 200 are needed")
    squares = (
        (stop - start) / len(order) * _gap(confidence[order[start:stop]], correct[order[start:stop]]) ** 2
        for start, stop in (spans[:-1] if compat else spans)
    )
    return math.sqrt(math.fsum(squares))
