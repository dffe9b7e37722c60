"""95 % confidence intervals of accuracies and of their differences, from counts alone, as if two models had seen
different images. They serve results of older releases, which have no predictions for each image."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mae_dat.robustness.scores.accuracy import Count
from mae_dat.robustness.scores.image_bits import CellImages

Z = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class WeightedCount:
    """One term of a metric that is a sum of accuracies: the weight, times correct / total of a count."""

    weight: float
    count: Count
    images: CellImages | None = None
    """The predictions behind the count; None for a count of an older release."""


def wilson(count: Count, z: float = Z) -> tuple[float, float]:
    """Return the interval of the share of correct predictions (Wilson 1927), 0 to 1, of `z` standard deviations."""
    n, share = count["total"], count["correct"] / count["total"]
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return middle - half, middle + half


def share_difference(new: Count, old: Count, z: float = Z) -> tuple[float, float]:
    """Return the interval of new share - old share of correct predictions, as if measured on different images
    (Newcombe 1998, method 10)."""
    (low, high), (old_low, old_high) = wilson(new, z), wilson(old, z)
    share, old_share = new["correct"] / new["total"], old["correct"] / old["total"]
    gap = share - old_share
    return gap - math.hypot(share - low, old_high - old_share), gap + math.hypot(high - share, old_share - old_low)


def interval(new: Sequence[WeightedCount], old: Sequence[WeightedCount], z: float = Z) -> tuple[float, float] | None:
    """Return the interval of the difference of two weighted sums with the same weights; None without terms or
    where nothing was counted.

    The intervals of the terms are added up. This is the widest possible interval, as if every image were as hard under
    each corruption; and both models saw the same images, which narrows a difference further.
    """
    if not new or len(new) != len(old):
        return None
    low = high = 0.0
    for term, old_term in zip(new, old, strict=True):
        assert term.weight == old_term.weight
        if term.count["total"] == 0 or old_term.count["total"] == 0:
            return None
        ends = [term.weight * end for end in share_difference(term.count, old_term.count, z)]
        low, high = low + min(ends), high + max(ends)
    return low, high


def p_value_of_interval(new: Sequence[WeightedCount], old: Sequence[WeightedCount]) -> float | None:
    """Return the two-sided p-value that belongs to `interval`: its level where one of its ends is zero; None where
    there is no interval."""
    if interval(new, old) is None:
        return None
    inside, outside = 40.0, 0.0
    for _ in range(60):  # bisection over the number of standard deviations
        z = (inside + outside) / 2
        low, high = interval(new, old, z) or (0.0, 0.0)
        if low <= 0 <= high:
            inside = z
        else:
            outside = z
    return math.erfc(inside / math.sqrt(2))
