"""The worst of several classes or groups, with an interval that allows for choosing the worst one."""

from collections.abc import Mapping
from typing import NamedTuple

from mae_dat.robustness.scores.accuracy import Count


class WorstShare(NamedTuple):
    """The lowest share of correct predictions among several sets of images, 0 to 1."""

    name: str
    share: float
    low: float
    """Ends of the 95 % interval of the lowest true share."""
    high: float


def worst_share(counts: Mapping[str, Count]) -> WorstShare | None:
    """Return the lowest share of correct predictions; None if nothing was counted.

    The interval is simultaneous: exact intervals (Clopper & Pearson 1934) of all G shares at the level 1 - 0.05 / G
    (Bonferroni). The lowest true share lies between the least lower end and the least upper end.
    """
    from scipy.special import betaincinv

    present = {name: count for name, count in counts.items() if count["total"]}
    if not present:
        return None
    tail = 0.05 / 2 / len(present)
    lows, highs = [], []
    for count in present.values():
        hits, total = count["correct"], count["total"]
        lows.append(float(betaincinv(hits, total - hits + 1, tail)) if hits else 0.0)
        highs.append(float(betaincinv(hits + 1, total - hits, 1 - tail)) if hits < total else 1.0)
    name = min(present, key=lambda one: present[one]["correct"] / present[one]["total"])
    return WorstShare(name, present[name]["correct"] / present[name]["total"], min(lows), min(highs))
