"""How much two models differ on the same images: 95 % intervals and p-values of paired comparisons.

* `compare_hits`: right or wrong, once per image (McNemar's exact test).
* `compare_images`: a score of each image, such as the mean over all of its corrupted versions (bootstrap over images).
* `compare_seeds`: the same for several pairs of trainings (Student's interval over seeds and images).

An image is the unit of all of them: what is measured on several versions of an image is first added up. Two
pseudo-images are added, on which the models differ by the largest difference seen, at least by that of one prediction,
once in each direction (as Bonett & Price 2012 do for one version). If none was seen, they differ in all versions. So no
interval has zero width: models that agree on ten images may still differ on others.

Shapes: N images, P pairs of models.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv
from scipy.stats import binomtest
from scipy.stats import t as student

from mae_dat.robustness.report.intervals import WeightedCount
from mae_dat.robustness.scores.image_bits import Bits, CellImages, unpack_bits

Scores = NDArray[np.float64]
RESAMPLES = 10_000
DIFFERENCE_LEVELS = 128
"""For speed, differences of images are rounded to this part of the largest one before they are resampled."""
RESAMPLING_SEED = 0
MIN_SEEDS = 3
"""Fewer seeds do not show the scatter between trainings, so that no verdict is given."""


@dataclass(frozen=True)
class ImageScores:
    """The score of one model on each image. Its value is sum(scores) / sum(weights)."""

    scores: Scores
    """float64 (N,)."""
    weights: Scores | None = None
    """float64 (N,); None if all are 1. The shape bias counts only images with a prediction of either cue."""
    step: float = 1.0
    """The largest change of a score by one prediction."""
    most: float | None = None
    """The largest change of a score by all predictions of an image; None if there is one prediction."""

    @property
    def unseen_difference(self) -> float:
        """By how much an image may differ if none has been seen to differ."""
        return self.step if self.most is None else self.most

    @property
    def value(self) -> float:
        """The model's value; NaN if no image counts."""
        total = float(len(self.scores) if self.weights is None else self.weights.sum())
        return float(self.scores.sum()) / total if total else math.nan

    def contributions(self) -> Scores:
        """Return the value as a mean over images, (N,): for a ratio, its linearization at the value."""
        if self.weights is None:
            return self.scores
        return self.value + (self.scores - self.value * self.weights) / self.weights.mean()


def weighted_scores(terms: Sequence[WeightedCount]) -> ImageScores | None:
    """Return the scores of the images whose mean is a weighted sum of accuracies; None where the terms have no
    predictions, or not of the same images."""
    if not terms or len({term.images["order"] if term.images else "" for term in terms}) > 1:
        return None
    scores: Scores = np.zeros(terms[0].count["total"])
    for term in terms:
        bits = term.images and known_bits(term.images["correct"], term.count["correct"], len(scores))
        if bits is None or term.count["total"] != len(scores):
            return None
        scores += term.weight * bits
    weights = [abs(term.weight) for term in terms]
    return ImageScores(scores, step=max(weights), most=sum(weights))


def cue_bits(images: CellImages | None, shape: int, texture: int, total: int) -> tuple[Bits, Bits] | None:
    """Return which images were predicted as their shape's class and as their texture's, (N,) each; None if unknown."""
    if images is None or "texture" not in images:
        return None
    by_shape, by_texture = known_bits(images["correct"], shape, total), known_bits(images["texture"], texture, total)
    return None if by_shape is None or by_texture is None else (by_shape, by_texture)


def known_bits(text: str, count: int, total: int) -> Bits | None:
    """Return the bits (N,) of a text; None if it cannot be read or disagrees with the count of set bits."""
    bits = unpack_bits(text, total)
    return bits if bits is not None and int(bits.sum()) == count else None


class Comparison(NamedTuple):
    """A difference with its 95 % interval and two-sided p-value."""

    gap: float
    ends: tuple[float, float]
    p_value: float


def compare_pair(new: ImageScores, old: ImageScores) -> Comparison:
    """Compare two checkpoints on the same images: `compare_hits` where each image was measured once, else
    `compare_images`."""
    differences = (new.scores - old.scores) / new.step
    once = new.weights is None and bool(np.isin(differences, (-1, 0, 1)).all())
    return compare_hits(new, old) if once else compare_images(new, old)


def compare_hits(new: ImageScores, old: ImageScores) -> Comparison:
    """Compare scores that are equal, or differ by +-step, on every image.

    The p-value is McNemar's exact one. The interval is Bonett & Price's (2012) adjusted Wald interval, with Student's
    quantile for few images, widened to the exact one of the share of discordant images (Clopper & Pearson), so that it
    excludes zero only where the test does.
    """
    differences, images = new.scores - old.scores, len(new.scores)
    more, less = int((differences > 0).sum()), int((differences < 0).sum())
    step = new.step if more or less else new.unseen_difference
    plus, minus, total = (more + 1) / (images + 2), (less + 1) / (images + 2), images + 2
    half = float(student.ppf(0.975, images + 1)) * math.sqrt((plus + minus - (plus - minus) ** 2) / total)
    low, high = plus - minus - half, plus - minus + half
    p_value = 1.0
    if discordant := more + less:
        p_value = float(binomtest(more, discordant).pvalue)
        shares = [
            float(betaincinv(more, less + 1, 0.025)) if more else 0.0,
            float(betaincinv(more + 1, less, 0.975)) if less else 1.0,
        ]
        exact = [(2 * share - 1) * discordant / images for share in shares]
        low, high = min(low, exact[0]), max(high, exact[1])
    gap = (more - less) / images
    return Comparison(step * gap, (step * max(low, -1.0), step * min(high, 1.0)), p_value)


def compare_images(new: ImageScores, old: ImageScores) -> Comparison:
    """Compare any scores by a bootstrap that resamples images, with all versions of an image together.

    The interval is the percentile interval, and the p-value twice the share of resampled differences beyond zero. The
    generator has a fixed seed, so that the same results give the same report.
    """
    gap = new.value - old.value
    if new.weights is None or old.weights is None:
        differences = _differences(new, old)
        level = float(np.abs(differences).max()) / DIFFERENCE_LEVELS
        (drawn,) = _resampled_means(np.round(differences / level)[None] * level)
    else:
        pairs = [(new.scores, 1, 0), (new.weights, 1, 1), (old.scores, 0, 1), (old.weights, 1, 1)]
        hits, weights, old_hits, old_weights = _resampled_means(np.stack([np.append(v, more) for v, *more in pairs]))
        with np.errstate(divide="ignore", invalid="ignore"):
            drawn = hits / weights - old_hits / old_weights
        drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    tail = int(min((drawn <= 0).sum(), (drawn >= 0).sum()))
    return Comparison(gap, (low, high), min(1.0, 2 * (tail + 1) / (len(drawn) + 1)))


def compare_few_images(new: ImageScores, old: ImageScores) -> Comparison:
    """Compare scores over several versions of few images, such as those of one class: Student's interval over images,
    with the two pseudo-images. It is as fast for a thousand classes as the bootstrap for a few."""
    differences = _differences(new, old)
    variance = (float(differences.var(ddof=1)) / len(differences), len(differences) - 1)
    comparison = student_comparison(new.value - old.value, variance)
    assert comparison is not None, "the pseudo-images differ"
    return comparison


def _differences(new: ImageScores, old: ImageScores) -> Scores:
    """Return the difference on every image and on the two pseudo-images, (N + 2,)."""
    differences = new.contributions() - old.contributions()
    seen = float(np.abs(differences).max())
    largest = max(new.step, seen) if seen else new.unseen_difference
    return np.append(differences, (largest, -largest))


def _resampled_means(rows: Scores) -> Scores:
    """Return the means (R, RESAMPLES) over resampled images of each of the rows (R, N).

    Images with equal values are drawn together, by their number.
    """
    values, counts = np.unique(rows, axis=1, return_counts=True)
    images = rows.shape[1]
    drawn = np.random.default_rng(RESAMPLING_SEED).multinomial(images, counts / images, size=RESAMPLES)
    return np.asarray(values @ drawn.T) / images


def compare_seeds(gaps: Sequence[float], pairs: Sequence[tuple[ImageScores, ImageScores]]) -> Comparison | None:
    """Compare two trainings with P >= 2 seeds each, from the differences (P,) at equal seeds and, if every pair has
    them, the scores of the images, which are the same for all seeds.

    The interval is Student's. The variance of the mean difference is that between seeds over P, plus that between
    images of their mean difference over N; the degrees of freedom are Welch's and Satterthwaite's. Without scores of
    images it is an interval over seeds alone, and None where all seeds differ by the same amount.
    """
    count = len(gaps)
    gap = math.fsum(gaps) / count
    between_seeds = float(np.var(gaps, ddof=1)) / count
    between_images, freedom_of_images = 0.0, 1
    if pairs:
        mean = np.mean([_differences(new, old) for new, old in pairs], axis=0)
        freedom_of_images = len(mean) - 1
        between_images = float(mean.var(ddof=1)) / len(mean)
    return student_comparison(gap, (between_seeds, count - 1), (between_images, freedom_of_images))


def student_comparison(gap: float, *variances: tuple[float, int]) -> Comparison | None:
    """Return Student's interval and p-value of a difference with these components of its variance, each with its
    degrees of freedom; None if all of them are zero."""
    variance = sum(part for part, _ in variances)
    if variance <= 0:
        return None
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in variances)
    error = math.sqrt(variance)
    half = float(student.ppf(0.975, freedom)) * error
    return Comparison(gap, (gap - half, gap + half), 2 * float(student.sf(abs(gap) / error, freedom)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the same order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = highest
    return adjusted
