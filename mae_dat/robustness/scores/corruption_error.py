"""The mCE and relative mCE of ImageNet-C in percent (Hendrycks & Dietterich 2019, arXiv 1903.12261).

The equations of the paper's "Metric and Setup" (they have no numbers), with E[s, c] the top-1 error at severity s of
corruption c, and A[s, c] that of a baseline, by default AlexNet:

    CE_c          = sum_s E[s, c] / sum_s A[s, c]
    relative CE_c = sum_s (E[s, c] - E_clean) / sum_s (A[s, c] - A_clean)
    mCE           = mean of CE_c over the 15 corruptions

`mce` computes it, `corruption_errors` its terms. Sums and ratios are exact fractions, rounded once at the end.

AlexNet's errors are those on the published files at 224 px with a center crop. They apply only to models measured on
these files; for other images or sizes, pass a baseline measured on the same images.
"""

import statistics
from collections.abc import Sequence
from fractions import Fraction

from mae_dat.robustness.corruptions import CORRUPTIONS
from mae_dat.robustness.scores.accuracy import CorruptionCounts, Count

IMAGES_PER_SEVERITY = 50_000  # of each corruption of ImageNet-C
# Errors at severities 1 to 5, from an earlier README of hendrycks/robustness. The last four are extra, never part of
# mCE. Clean: torchvision's weights, 56.522 % top-1 as measured by imagenet-testbed.
_ALEXNET = """
gaussian_noise    0.69528 0.82542 0.93554 0.98138 0.99452
shot_noise        0.71224 0.85108 0.93574 0.98182 0.99146
impulse_noise     0.78374 0.89808 0.94870 0.98720 0.99548
defocus_blur      0.65624 0.73202 0.85036 0.91364 0.94714
glass_blur        0.64308 0.75054 0.88806 0.91622 0.93344
motion_blur       0.58430 0.70048 0.82108 0.89750 0.92638
zoom_blur         0.70008 0.76992 0.80784 0.84198 0.87198
snow              0.71726 0.88392 0.86468 0.91870 0.94952
frost             0.61390 0.79734 0.88790 0.89942 0.93430
fog               0.67474 0.76050 0.84378 0.87260 0.94500
brightness        0.45140 0.48502 0.54048 0.62166 0.72440
contrast          0.64548 0.76150 0.88874 0.97760 0.99270
elastic_transform 0.52596 0.70116 0.55686 0.64076 0.80554
pixelate          0.52218 0.54620 0.73728 0.87092 0.91262
jpeg_compression  0.51002 0.54718 0.57294 0.65458 0.74778
speckle_noise     0.66192 0.74440 0.90246 0.94548 0.97268
gaussian_blur     0.54732 0.70444 0.82574 0.89864 0.95940
spatter           0.47196 0.62194 0.75052 0.84132 0.90182
saturate          0.59342 0.65514 0.51174 0.70834 0.82260
"""
_ALEXNET_CLEAN = "0.43478"


def _published_count(error: str) -> Count:
    """Return the count of correct predictions that a published error rate stands for."""
    wrong = Fraction(error) * IMAGES_PER_SEVERITY
    assert wrong.denominator == 1, error
    return {"correct": IMAGES_PER_SEVERITY - int(wrong), "total": IMAGES_PER_SEVERITY}


ALEXNET: CorruptionCounts = {
    "clean": _published_count(_ALEXNET_CLEAN),
    "corruptions": {
        name: {str(severity): _published_count(error) for severity, error in enumerate(errors, 1)}
        for name, *errors in map(str.split, _ALEXNET.strip().splitlines())
    },
}


def mce(
    counts: CorruptionCounts,
    baseline: CorruptionCounts = ALEXNET,
    relative: bool = False,
    names: Sequence[str] = CORRUPTIONS,
) -> float:
    """Compute the mCE: the mean CE in percent over `names`, by default the 15 corruptions; `relative` as in
    `corruption_errors`.

    Raises ValueError unless all of `names` were measured at every severity of the baseline.
    """
    return _mean([_corruption_error(counts, baseline, name, relative) for name in names])


def corruption_errors(
    counts: CorruptionCounts, baseline: CorruptionCounts = ALEXNET, relative: bool = False
) -> dict[str, float]:
    """Compute the CE in percent of every corruption that was measured, the extra ones included.

    `relative` subtracts the clean error, which must come from the same model and crop. Raises ValueError if the
    baseline lacks a corruption or severity, or has no higher error than on clean images.
    """
    return {name: float(_corruption_error(counts, baseline, name, relative)) for name in counts["corruptions"]}


def severity_mce(
    counts: CorruptionCounts, baseline: CorruptionCounts = ALEXNET, names: Sequence[str] = CORRUPTIONS
) -> dict[int, float]:
    """Compute the mean over `names` of E / A in percent at each severity alone. Raises ValueError as `mce`.

    The mean of these is not the mCE, which divides sums over severities.
    """
    ratios: dict[str, list[Fraction]] = {}
    for name in names:
        pairs = _error_pairs(counts, baseline, name)
        for severity, pair in zip(sorted(counts["corruptions"][name]), pairs, strict=True):
            ratios.setdefault(severity, []).append(_ratio([pair], name, clean=(Fraction(0), Fraction(0))))
    return {int(severity): _mean(values) for severity, values in ratios.items()}


def _corruption_error(counts: CorruptionCounts, baseline: CorruptionCounts, name: str, relative: bool) -> Fraction:
    """Compute CE_c or relative CE_c in percent. Raises ValueError as `corruption_errors`."""
    clean = (Fraction(0), Fraction(0))
    if relative:
        clean = (_error(counts["clean"]), _error(baseline["clean"]))
    return _ratio(_error_pairs(counts, baseline, name), name, clean)


def _error_pairs(counts: CorruptionCounts, baseline: CorruptionCounts, name: str) -> list[tuple[Fraction, Fraction]]:
    """Return (E, A) at each severity of a corruption. Raises ValueError unless both have the same severities."""
    model_counts, baseline_counts = counts["corruptions"].get(name, {}), baseline["corruptions"].get(name, {})
    if not model_counts or model_counts.keys() != baseline_counts.keys():
        measured = ", ".join(sorted(model_counts)) or "none"
        needed = ", ".join(sorted(baseline_counts)) or "none"
        raise ValueError(f"{name}: measured at severities {measured}, the baseline at {needed}; measure the same ones")
    return [(_error(model_counts[s]), _error(baseline_counts[s])) for s in sorted(model_counts)]


def _ratio(pairs: Sequence[tuple[Fraction, Fraction]], name: str, clean: tuple[Fraction, Fraction]) -> Fraction:
    """Compute sum(E - E_clean) / sum(A - A_clean) in percent. Raises ValueError unless the divisor is positive."""
    model_clean, baseline_clean = clean
    divisor = sum(baseline_error - baseline_clean for _, baseline_error in pairs)
    if divisor <= 0:
        against = "than on clean images" if baseline_clean else "than without an error"
        raise ValueError(f"{name}: the baseline is no worse {against}, so nothing can be divided by it; use another")
    return 100 * sum((error - model_clean for error, _ in pairs), Fraction(0)) / divisor


def _error(count: Count) -> Fraction:
    """Return the share of wrong predictions, 0 to 1. Raises ValueError if nothing was counted."""
    if count["total"] <= 0:
        raise ValueError("no image was counted, so there is no error rate")
    return Fraction(count["total"] - count["correct"], count["total"])


def _mean(values: Sequence[Fraction]) -> float:
    """Return the exact mean, rounded once."""
    return float(statistics.mean(values))
