"""Counts of correct predictions, and accuracies and errors in percent computed from them.

`results.json` contains only integer counts, so that a report recomputed from it agrees to the last digit. The
"unnormalized mCE" here is the mean over corruptions of the mean over severities of the top-1 error. The
AlexNet-normalized mCE of the ImageNet-C paper is in `corruption_error.py`.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS


class Count(TypedDict):
    """Predictions of one model on one set of images, such as one corruption at one severity."""

    correct: int
    """Images whose top-1 class was correct."""
    total: int
    """All images, summed over ranks."""
    top5: NotRequired[int]
    """Images whose class was among the five highest; absent with fewer than five classes."""
    shape: NotRequired[int]
    """Cue conflict: images classified by their shape."""
    texture: NotRequired[int]
    """Cue conflict: images classified by their texture."""


CountsByCorruption = dict[str, dict[str, Count]]
"""Corruption -> severity as text (JSON keys are text) -> count."""


class CorruptionCounts(TypedDict):
    """Counts of one model on a suite of corruptions, and on as many clean images."""

    clean: Count
    """`total` is 0 if no comparable clean images were measured."""
    corruptions: CountsByCorruption


def top1_error(count: Count) -> float:
    """Return the top-1 error in percent. Raises ValueError if nothing was counted."""
    if count["total"] <= 0:
        raise ValueError("no image was counted, so there is no error rate")
    return 100.0 * (count["total"] - count["correct"]) / count["total"]


def top1_accuracy(count: Count) -> float:
    """Return the top-1 accuracy in percent. Raises ValueError if nothing was counted."""
    return 100.0 - top1_error(count)


def unnormalized_ce(by_severity: Mapping[str, Count]) -> float:
    """Return the mean over the measured severities of one corruption of the error in percent."""
    return statistics.fmean(top1_error(count) for count in by_severity.values())


def _mean_ce(counts: CountsByCorruption, names: Iterable[str]) -> float | None:
    """Return the unweighted mean error in percent over those of `names` that were measured, None if none was."""
    errors = [unnormalized_ce(counts[name]) for name in names if counts.get(name)]
    return statistics.fmean(errors) if errors else None


def unnormalized_mce(counts: CorruptionCounts) -> float:
    """Return the mean error in percent over those of the 15 corruptions that were measured; extra ones never count.

    It is not divided by AlexNet's errors. Raises ValueError if none of the 15 was measured.
    """
    mean = _mean_ce(counts["corruptions"], CORRUPTIONS)
    if mean is None:
        raise ValueError("none of the 15 common corruptions was measured")
    return mean


def averaged_corruptions(counts: CorruptionCounts) -> list[str]:
    """Return the corruptions that a suite's mean is over: those of the 15 that were measured, else all of the suite."""
    measured = counts["corruptions"]
    return [name for name in CORRUPTIONS if name in measured] or list(measured)


def suite_mean_error(counts: CorruptionCounts) -> float:
    """Return the unnormalized mCE in percent; for a suite without any of the 15, the same over all its corruptions."""
    if any(name in CORRUPTIONS for name in counts["corruptions"]):
        return unnormalized_mce(counts)
    return statistics.fmean(map(unnormalized_ce, counts["corruptions"].values()))


def category_errors(counts: CorruptionCounts) -> dict[str, float]:
    """Return the mean error in percent for noise, blur, weather and digital; categories not measured are absent."""
    means = {category: _mean_ce(counts["corruptions"], names) for category, names in CATEGORIES.items()}
    return {category: mean for category, mean in means.items() if mean is not None}


def severity_errors(counts: CorruptionCounts, names: Sequence[str] = CORRUPTIONS) -> dict[int, float]:
    """Return the error in percent at each severity, averaged over those of `names` measured at that severity."""
    errors: dict[int, list[float]] = {}
    for name in names:
        for severity, count in counts["corruptions"].get(name, {}).items():
            errors.setdefault(int(severity), []).append(top1_error(count))
    return {severity: statistics.fmean(errors[severity]) for severity in sorted(errors)}


def shape_bias(count: Count) -> float | None:
    """Return n_shape / (n_shape + n_texture) (Geirhos et al. 2019), in 0..1; None if neither class was predicted."""
    with_either = count["shape"] + count["texture"]
    return count["shape"] / with_either if with_either else None


def cue_coverage(count: Count) -> float:
    """Return the share (0..1) of cue-conflict images classified by either cue, which the shape bias is computed on."""
    return (count["shape"] + count["texture"]) / count["total"] if count["total"] else 0.0


@dataclass(frozen=True)
class SeedStatistics:
    """Mean of one number over seeds; `std` is the sample standard deviation, None with a single seed."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "SeedStatistics | None":
        """Compute the statistics of the values that are not None; None if there are none."""
        present = [value for value in values if value is not None]
        if not present:
            return None
        return cls(statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None, len(present))

    @property
    def spread(self) -> float:
        """Standard deviation for error bars: 0 with a single seed, which leaves it unknown."""
        return self.std or 0.0

    def text(self, digits: int = 1) -> str:
        """Format as '41.2', or '41.2 ± 0.3' with several seeds."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.std is None else f"{mean} ± {self.std:.{digits}f}"
