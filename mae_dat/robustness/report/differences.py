"""How much two groups of models differ on a metric, and whether the difference is beyond chance."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import t as student

from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.intervals import interval
from mae_dat.robustness.report.metrics import Metric
from mae_dat.robustness.scores.accuracy import SeedStatistics


class Difference(NamedTuple):
    """The difference of a group to another one on a metric."""

    gap: float
    """Mean difference of runs with the same seed."""
    ends: tuple[float, float] | None
    """Ends of its 95 % interval; None if there is none."""
    spread: float | None
    """Standard deviation over pairs of the same seed; None for a single pair."""
    verdict: int | None
    """+1 if the group is better beyond chance, -1 if it is worse, 0 if undecided; None if there is no interval, neither
    more nor less is better, or a check of the attack failed."""


def compare_groups(metric: Metric, new: Group, old: Group) -> Difference | None:
    """Compute the difference of two groups; None if no seed has a value in both.

    Runs with the same seed share the initialization and the order of images, so that their difference varies less than
    either. The interval is Student's over the pairs; for a single pair, that of the number of images.
    """
    pairs = [
        (metric.values[model], metric.values[old.members[seed]])
        for seed, model in new.members.items()
        if seed in old.members and model in metric.values and old.members[seed] in metric.values
    ]
    gaps = SeedStatistics.of(new_value.value - old_value.value for new_value, old_value in pairs)
    if gaps is None:
        return None
    if gaps.std is None:
        ((new_value, old_value),) = pairs
        ends = interval(new_value.terms, old_value.terms)
    else:
        half = _student_quantile(gaps.n - 1) * gaps.std / math.sqrt(gaps.n)
        ends = gaps.mean - half, gaps.mean + half
    believable = not (is_doubtful(metric, new) or is_doubtful(metric, old))
    verdict = _verdict(metric.better, ends) if believable else None
    return Difference(gaps.mean, ends, gaps.std, verdict)


def _verdict(better: int, ends: tuple[float, float] | None) -> int | None:
    if not better or ends is None:
        return None
    low, high = ends
    return better if low > 0 else -better if high < 0 else 0


@functools.cache
def _student_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution with these degrees of freedom."""
    return float(student.ppf(0.975, freedom))


def is_doubtful(metric: Metric, group: Group) -> bool:
    """Return whether a check of the attack failed for any model of the group."""
    return any(metric.values[model].doubtful for model in group.members.values() if model in metric.values)


def best_group(metric: Metric, groups: Sequence[Group]) -> Group | None:
    """Return the group that is better than every other beyond chance, if there is one."""
    measured = [group for group in groups if any(model in metric.values for model in group.members.values())]
    if len(measured) < 2:
        return None
    for group in measured:
        others = (compare_groups(metric, group, other) for other in measured if other is not group)
        if all(difference is not None and difference.verdict == 1 for difference in others):
            return group
    return None
