"""95 % intervals of single values, such as the error of a model on a corruption, over images and seeds."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from mae_dat.robustness.report.intervals import wilson
from mae_dat.robustness.report.metrics import MetricValue
from mae_dat.robustness.report.paired import student_comparison


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


def estimate_of(values: Sequence[MetricValue]) -> Estimate | None:
    """Return the mean of a group's values, one for each seed, with its interval; None without a value.

    For one seed it is over the images: Wilson's for one prediction per image, Student's over images for a mean over
    versions of each image. Without predictions for each image it is the widest interval that the counts allow. For
    several seeds it is Student's over seeds and images. Values without an interval have one of no width.
    """
    if not values:
        return None
    mean = statistics.fmean(value.value for value in values)
    if len(values) == 1:
        low, high = _interval_over_images(values[0])
        return Estimate(mean, low, high)
    components = [(statistics.variance(value.value for value in values) / len(values), len(values) - 1)]
    if all(value.scores for value in values):
        rows = np.mean([value.scores.contributions() for value in values if value.scores], axis=0)
        components.append((float(rows.var(ddof=1)) / len(rows), len(rows) - 1))
    comparison = student_comparison(mean, *components)
    return Estimate(mean, *(comparison.ends if comparison else (mean, mean)))


def _interval_over_images(value: MetricValue) -> tuple[float, float]:
    if value.scores is not None and value.scores.unseen_difference > value.scores.step:  # several versions of an image
        scores = value.scores.contributions()
        error = math.sqrt(float(scores.var(ddof=1)) / len(scores)) if len(scores) > 1 else 0.0
        if error > 0:
            half = float(student.ppf(0.975, len(scores) - 1)) * error
            return value.value - half, value.value + half
    low = high = value.value
    for term in value.terms:
        if term.count["total"]:
            share = term.count["correct"] / term.count["total"]
            ends = [term.weight * (end - share) for end in wilson(term.count)]
            low, high = low + min(ends), high + max(ends)
    return low, high
