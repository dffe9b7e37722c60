"""Calibration, the match of a model's confidence and accuracy: expected calibration error, RMS calibration error,
negative log-likelihood and Brier score.

Shapes: B batch, C classes, N images. Each image has its own column, so the results depend neither on the batches nor on
the ranks, unless the model's own arithmetic does.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mae_dat.config.errors import DataError, NumericsError
from mae_dat.robustness.scores.reliability import ReliabilityBin

ROWS = TIMES_MEASURED, CONFIDENCE, CORRECT, NLL, BRIER = range(5)


@dataclass
class Confidences:
    """Confidences and scores of N images. Call `add` with batches on every rank, then `reduce` once."""

    images: int
    device: torch.device | str = "cpu"
    """The device of the probabilities; the rows stay there until they are summed over ranks."""
    rows: Tensor = field(init=False)
    """Float64 (5, N): times measured, confidence, correct, negative log-likelihood, Brier score."""

    def __post_init__(self) -> None:
        self.rows = torch.zeros(len(ROWS), self.images, dtype=torch.float64, device=self.device)

    def add(self, index: Tensor, probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch: image numbers int64 (B,), probabilities float64 (B, C), labels int64 (B,).

        The confidence is the highest probability.
        """
        probabilities = probabilities.double()
        confidence, prediction = probabilities.max(1)
        of_label = probabilities.gather(1, labels[:, None])[:, 0]
        brier = probabilities.square().sum(1) - 2 * of_label + 1  # the sum over classes of (p - [c = label])^2
        rows = [torch.ones_like(of_label), confidence, (prediction == labels).double(), -of_label.log(), brier]
        # Added instead of assigned, so that an image that is measured twice has a 2 in the first row.
        self.rows.index_add_(1, index.to(self.device), torch.stack(rows))

    def reduce(self, all_sum: Callable[[Tensor], Tensor]) -> None:
        """Sum the rows over ranks with `all_sum` and move them to the CPU. Every rank has zeros in the columns of the
        other ranks' images, so the sum is exact.

        Raises on every rank DataError unless each image was measured exactly once, and NumericsError for a NaN.
        """
        self.rows = all_sum(self.rows).cpu()
        for image in (self.rows[TIMES_MEASURED] != 1).nonzero().flatten().tolist():
            raise DataError(f"image {image} was measured {int(self.rows[TIMES_MEASURED, image])} times instead of once")
        if bool(self.rows[CONFIDENCE].isnan().any()):
            raise NumericsError("the model's probabilities are NaN: check its weights, or evaluate in float32")

    def scores(self) -> dict[str, float | None]:
        """Compute ece, rms, rms_compat (from 200 images on), nll and brier. `nll` is None if it is infinite, because an
        image's class had probability 0: JSON has no number for that."""
        confidence, correct = self.rows[CONFIDENCE], self.rows[CORRECT]
        scores: dict[str, float | None] = {
            "ece": expected_error(confidence, correct),
            "rms": rms_error(confidence, correct),
        }
        if self.images >= 2 * RMS_BIN:
            scores["rms_compat"] = rms_error(confidence, correct, compat=True)
        nll = _mean(self.rows[NLL])
        return scores | {"nll": nll if math.isfinite(nll) else None, "brier": _mean(self.rows[BRIER])}

    def reliability(self) -> list[ReliabilityBin]:
        """Return the bins of the ECE that have images, in increasing order of confidence."""
        confidence, correct = self.rows[CONFIDENCE], self.rows[CORRECT]
        return [
            {
                "images": int(inside.sum()),
                "correct": int(correct[inside].sum()),
                "confidence": _mean(confidence[inside]),
            }
            for inside in _bin_members(confidence)
            if inside.any()
        ]


ECE_BINS = 15
RMS_BIN = 100  # images


def _mean(values: Tensor) -> float:
    """Return the mean. `fsum` rounds only once, so it is the same in any order of the images."""
    return math.fsum(values.tolist()) / len(values)


def _gap(confidence: Tensor, correct: Tensor) -> float:
    """Return |mean confidence - accuracy| of one bin."""
    return abs(_mean(confidence) - _mean(correct))


def _bin_members(confidence: Tensor, bins: int = ECE_BINS) -> list[Tensor]:
    """Return which images fall into each of the bins of equal width, (lower, upper]: bool (N,) each."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    bin_of = torch.bucketize(confidence, edges)
    return [bin_of == number for number in range(bins)]


def expected_error(confidence: Tensor, correct: Tensor, bins: int = ECE_BINS) -> float:
    """Compute the ECE (Guo et al. 2017, arXiv 1706.04599), 0 to 1: the mean gap between confidence and accuracy over
    bins of equal width, (lower, upper], weighted by their number of images.

    `confidence` in 0..1 and `correct` 0 or 1 are float64 (N,).
    """
    return math.fsum(
        int(inside.sum()) / len(confidence) * _gap(confidence[inside], correct[inside])
        for inside in _bin_members(confidence, bins)
        if inside.any()
    )


def rms_error(confidence: Tensor, correct: Tensor, compat: bool = False) -> float:
    """Compute the RMS calibration error (Hendrycks et al. 2019, arXiv 1812.04606), 0 to 1: the root of the weighted
    mean of squared gaps over bins of 100 images in order of confidence; the last bin also has the remainder.

    `confidence` in 0..1 and `correct` 0 or 1 are float64 (N,). Images of equal confidence stay in their own order.
    `compat` leaves the last bin, the 100 to 199 most confident images, out of the sum but not out of the weights, as
    the authors' released code does. Raises ValueError for `compat` with a single bin.
    """
    order = torch.argsort(confidence, stable=True)
    edges = [*range(0, max(1, len(order) // RMS_BIN) * RMS_BIN, RMS_BIN), len(order)]
    spans = list(itertools.pairwise(edges))
    if compat and len(spans) < 2:
        raise ValueError(f"{len(order)} images make a single bin, which `compat` leaves out: it needs at least 200")
    squares = (
        (stop - start) / len(order) * _gap(confidence[order[start:stop]], correct[order[start:stop]]) ** 2
        for start, stop in (spans[:-1] if compat else spans)
    )
    return math.sqrt(math.fsum(squares))


# ---- temperature ----

TEMPERATURES = (0.01, 100.0)
"""The range in which a temperature is fitted."""


def mean_nll(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Compute the mean negative log-likelihood in nats of labels int64 (N,) under softmax(logits / temperature), from
    logits (N, C), in float64."""
    return float(torch.nn.functional.cross_entropy(logits.double() / temperature, labels))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Fit the temperature that minimizes `mean_nll` (Guo et al. 2017, section 4.2), within `TEMPERATURES`.

    The likelihood is concave in 1 / temperature, so there is one minimum. There is none if every image is classified
    correctly, because the NLL then falls toward temperature 0. Raises DataError for no images.
    """
    from scipy.optimize import minimize_scalar

    if not len(labels):
        raise DataError("no images to fit a temperature to")
    lowest, highest = map(math.log, TEMPERATURES)
    result = minimize_scalar(
        lambda log: mean_nll(logits, labels, math.exp(log)),
        bounds=(lowest, highest),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(float(result.x))
