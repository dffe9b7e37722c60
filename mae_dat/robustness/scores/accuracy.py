"""What an evaluation measured, as integer counts, and every number derived from them.

Percentages exist only here, computed from counts, so that a report can be made again from its JSON file and agree to
the last digit. "Mean corruption error" is the unweighted mean over corruptions of the mean over severities of the
error in percent. It is not the AlexNet-normalised mCE of the ImageNet-C paper, which needs the official files.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS


class Count(TypedDict):
    """Predictions of one model on one set of images, such as one corruption at one severity."""

    correct: int
    """Images whose top-1 class was right."""
    total: int
    """All images, summed over ranks."""
    top5: NotRequired[int]
    """Images whose class was among the five highest; absent with fewer than five classes."""
    shape: NotRequired[int]
    """Cue conflict: images classified by their shape."""
    texture: NotRequired[int]
    """Cue conflict: images classified by their texture."""


class CorruptionCounts(TypedDict):
    """Counts of one model on a suite of corruptions, and on as many clean images."""

    clean: Count
    """`total` is 0 where no clean images were measured that the corruptions can be compared with."""
    corruptions: dict[str, dict[str, Count]]
    """Corruption -> severity as text (JSON keys are text) -> count."""


def top1_error(count: Count) -> float:
    """Top-1 error in percent. Raises ValueError if nothing was counted."""
    if count["total"] <= 0:
        raise ValueError("no picture was counted, so there is no error rate")
    return 100.0 * (count["total"] - count["correct"]) / count["total"]


def top1_accuracy(count: Count) -> float:
    """Top-1 accuracy in percent."""
    return 100.0 - top1_error(count)


def unnormalized_ce(severities: Mapping[str, Count]) -> float:
    """Mean over the measured severities of one corruption of the error in percent."""
    return statistics.fmean(top1_error(count) for count in severities.values())


def _mean_over(counts: dict[str, dict[str, Count]], names: Iterable[str]) -> float | None:
    """Unweighted mean corruption error over those of `names` that were measured, None if none was."""
    errors = [unnormalized_ce(counts[name]) for name in names if counts.get(name)]
    return statistics.fmean(errors) if errors else None


def unnormalized_mce(scores: CorruptionCounts) -> float:
    """Mean corruption error in percent over those of the 15 corruptions that were measured; hold-out ones never count.

    Not AlexNet-normalised. Raises ValueError if none of the 15 was measured.
    """
    mean = _mean_over(scores["corruptions"], CORRUPTIONS)
    if mean is None:
        raise ValueError("none of the 15 common corruptions was measured")
    return mean


def category_errors(scores: CorruptionCounts) -> dict[str, float]:
    """Mean corruption error in percent for noise, blur, weather and digital; categories without a measurement are
    absent.
    """
    means = {name: _mean_over(scores["corruptions"], members) for name, members in CATEGORIES.items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def severity_errors(scores: CorruptionCounts, names: Sequence[str] = CORRUPTIONS) -> dict[int, float]:
    """Error in percent at each severity, averaged over those of `names` measured at that severity."""
    by_severity: dict[int, list[float]] = {}
    for name in names:
        for severity, count in scores["corruptions"].get(name, {}).items():
            by_severity.setdefault(int(severity), []).append(top1_error(count))
    return {severity: statistics.fmean(by_severity[severity]) for severity in sorted(by_severity)}


def shape_bias(count: Count) -> float | None:
    """n_shape / (n_shape + n_texture) (Geirhos et al. 2019), in 0..1; None if neither class was ever answered."""
    answered = count["shape"] + count["texture"]
    return count["shape"] / answered if answered else None


def cue_coverage(count: Count) -> float:
    """Share (0..1) of conflict pictures answered with either cue: the part of the set that the shape bias speaks of."""
    return (count["shape"] + count["texture"]) / count["total"] if count["total"] else 0.0


@dataclass(frozen=True)
class SeedStatistics:
    """Mean of one number over seeds; `std` is the sample standard deviation, None with a single seed."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "SeedStatistics | None":
        """Statistics of the values that exist, None if there are none."""
        present = [value for value in values if value is not None]
        if not present:
            return None
        return cls(statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None, len(present))

    @property
    def spread(self) -> float:
        """Standard deviation, 0 where a single seed leaves it unknown: for error bars."""
        return self.std or 0.0

    def text(self, digits: int = 1) -> str:
        """'41.2' or '41.2 ± 0.3'."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.std is None else f"{mean} ± {self.std:.{digits}f}"
