"""How much two groups of models differ on a metric, and whether the difference is beyond chance."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.intervals import interval, p_value_of_interval
from mae_dat.robustness.report.metrics import Metric, MetricValue
from mae_dat.robustness.report.paired import (
    MIN_SEEDS,
    Comparison,
    compare_pair,
    compare_seeds,
    holm,
    student_comparison,
)

ALPHA = 0.05
"""A difference is called better or worse if its p-value, adjusted for the number of suites, is below."""


class Difference(NamedTuple):
    """The difference of a group to another one on a metric."""

    gap: float
    """Mean difference of runs with the same seed."""
    ends: tuple[float, float] | None = None
    """Ends of its 95 % interval, which is never empty; None if there is none."""
    believable: bool = True
    """Whether more or less is better, and no check of an attack failed."""
    paired: bool = True
    """Whether it is computed from the predictions for each image; otherwise from counts alone."""
    p_value: float | None = None
    """Two-sided and not adjusted; None where no verdict is given: there is no interval, it is not believable, or there
    are fewer than `MIN_SEEDS` seeds of a training."""
    verdict: int | None = None
    """+1 if the group is better beyond chance, -1 if it is worse, 0 if undecided; None without a p-value."""

    def reversed(self) -> "Difference":
        """Return the difference with the groups exchanged, without a verdict."""
        ends = None if self.ends is None else (-self.ends[1], -self.ends[0])
        return self._replace(gap=-self.gap, ends=ends, verdict=None)


Differences = dict[tuple[Metric, Group, Group], Difference]
"""By metric, new group and old group."""


def compare_groups(metric: Metric, new: Group, old: Group) -> Difference | None:
    """Compute the difference of two groups, without a verdict; None if no seed has a value in both.

    Runs with the same seed share the initialization and the order of images, so that their difference varies less than
    either.
    """
    pairs = [
        (metric.values[model], metric.values[old.members[seed]])
        for seed, model in new.members.items()
        if seed in old.members and model in metric.values and old.members[seed] in metric.values
    ]
    if not pairs:
        return None
    comparison = _compare_one(*pairs[0]) if len(pairs) == 1 else _compare_several(pairs)
    believable = metric.better != 0 and not (is_doubtful(metric, new) or is_doubtful(metric, old))
    enough_seeds = len(pairs) >= MIN_SEEDS or not (new.trained or old.trained)
    return Difference(
        gap=statistics.fmean(new_value.value - old_value.value for new_value, old_value in pairs),
        ends=comparison and comparison.ends,
        believable=believable,
        paired=all(new_value.scores and old_value.scores for new_value, old_value in pairs),
        p_value=comparison.p_value if comparison and believable and enough_seeds else None,
    )


def _compare_one(new: MetricValue, old: MetricValue) -> Comparison | None:
    """Compare two checkpoints on the same images; without predictions for each image, from their counts."""
    if new.scores and old.scores:
        return compare_pair(new.scores, old.scores)
    ends, p_value = interval(new.terms, old.terms), p_value_of_interval(new.terms, old.terms)
    return None if ends is None or p_value is None else Comparison(new.value - old.value, ends, p_value)


def _compare_several(pairs: Sequence[tuple[MetricValue, MetricValue]]) -> Comparison | None:
    """Compare pairs of equal seeds; without predictions for each image, with the least variance between images that
    the differences allow, and without counts not at all."""
    gaps = [new.value - old.value for new, old in pairs]
    scores = [(new.scores, old.scores) for new, old in pairs if new.scores and old.scores]
    if len(scores) == len(pairs):
        return compare_seeds(gaps, scores)
    between_seeds = (statistics.variance(gaps) / len(gaps), len(gaps) - 1)
    first = pairs[0][0]
    if not first.images:  # calibration errors and mCEs of the first group: the scatter between images is unknown
        return None
    most = sum(abs(term.weight) for term in first.terms)
    share = min(1.0, abs(statistics.fmean(gaps)) / most)
    # All seeds differ on the same images, by all of their versions; and two pseudo-images as in `paired`.
    least = most**2 * (share * (1 - share) / first.images + 2 / first.images**2)
    return student_comparison(statistics.fmean(gaps), between_seeds, (least, first.images))


def decide(differences: Differences) -> Differences:
    """Return the differences with verdicts, for each pair of groups by Holm's correction over suites.

    Each suite counts once: with its first metric, or with the metric that the verdict is about. A collapsed group is
    never called better, nor another one worse than it.
    """
    by_pair: dict[tuple[Group, Group], dict[Metric, float]] = {}
    for (metric, new, old), difference in differences.items():
        if difference.p_value is not None:
            by_pair.setdefault((new, old), {})[metric] = difference.p_value
    decided = dict(differences)
    for (new, old), p_values in by_pair.items():
        for metric, adjusted in adjusted_p_values(p_values).items():
            difference = differences[metric, new, old]
            sign = int(math.copysign(metric.better, difference.gap * metric.better)) if adjusted < ALPHA else 0
            marked_better = new if sign > 0 else old
            verdict = 0 if marked_better.collapsed else sign
            decided[metric, new, old] = difference._replace(verdict=verdict)
    return decided


def adjusted_p_values(p_values: Mapping[Metric, float]) -> dict[Metric, float]:
    """Return p-values adjusted for the number of suites: Holm's over the first metric of each suite, and for another
    metric the same with its own p-value in place of the first."""
    firsts = {measurement_of(metric): metric for metric in reversed(list(p_values))}
    adjusted = {}
    for metric, p_value in p_values.items():
        others = [p_values[first] for suite, first in firsts.items() if suite != measurement_of(metric)]
        adjusted[metric] = holm([p_value, *others])[0]
    return adjusted


def measurement_of(metric: Metric) -> tuple[str, tuple[str, ...]]:
    """Return what identifies the measurement that a metric belongs to: its suite and models."""
    return metric.suite, tuple(metric.values)


def is_doubtful(metric: Metric, group: Group) -> bool:
    """Return whether a check of the attack failed for any model of the group."""
    return any(metric.values[model].doubtful for model in group.members.values() if model in metric.values)


def best_group(metric: Metric, groups: Iterable[Group], differences: Differences) -> Group | None:
    """Return the group that is better than every other beyond chance, if there is one."""
    measured = [group for group in groups if any(model in metric.values for model in group.members.values())]
    if len(measured) < 2:
        return None
    for group in measured:
        others = (differences.get((metric, group, other)) for other in measured if other is not group)
        if all(difference is not None and difference.verdict == 1 for difference in others):
            return group
    return None
