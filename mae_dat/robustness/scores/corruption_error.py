"""The corruption errors of the ImageNet-C paper (Hendrycks & Dietterich 2019, arXiv 1903.12261), in percent, exactly
from counts.

E[s, c] is the error at severity s of corruption c, A[s, c] that of a baseline, by default AlexNet's:
CE_c = sum_s E[s, c] / sum_s A[s, c], and mCE its mean over the 15 corruptions. Relative to the clean error:
sum_s (E[s, c] - E_clean) / sum_s (A[s, c] - A_clean). Sums and ratios are of fractions, rounded once at the end.

AlexNet's errors are those of the stored files, 224 px, centre crop. Nothing else may be divided by them: pictures of
another kind or size have a baseline of their own, a network measured on the same pictures.
"""

import statistics
from collections.abc import Sequence
from fractions import Fraction

from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS
from mae_dat.robustness.scores.accuracy import CorruptionCounts, Count

IMAGES = 50_000  # in each cell of ImageNet-C
# Errors at severities 1 to 5, from an earlier README of hendrycks/robustness. The last four are held out, never part of
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


def _count(error: str) -> Count:
    """The count of right answers that a published error rate stands for."""
    wrong = Fraction(error) * IMAGES
    assert wrong.denominator == 1, error
    return {"correct": IMAGES - int(wrong), "total": IMAGES}


ALEXNET: CorruptionCounts = {
    "clean": {**_count(_ALEXNET_CLEAN)},
    "corruptions": {
        name: {str(severity): _count(error) for severity, error in enumerate(errors, 1)}
        for name, *errors in map(str.split, _ALEXNET.strip().splitlines())
    },
}


def _error(count: Count) -> Fraction:
    """The share of wrong answers, 0 to 1. Raises ValueError if nothing was counted."""
    if count["total"] <= 0:
        raise ValueError("no picture was counted, so there is no error rate")
    return Fraction(count["total"] - count["correct"], count["total"])


def _errors(scores: CorruptionCounts, baseline: CorruptionCounts, name: str) -> list[tuple[Fraction, Fraction]]:
    """(E, A) at each severity of a corruption. Raises ValueError unless both were measured at the same ones."""
    own, other = scores["corruptions"].get(name, {}), baseline["corruptions"].get(name, {})
    if not own or own.keys() != other.keys():
        measured, needed = ", ".join(sorted(own)) or "none", ", ".join(sorted(other)) or "none"
        raise ValueError(f"{name}: measured at severities {measured}, the baseline at {needed}; measure the same ones")
    return [(_error(own[severity]), _error(other[severity])) for severity in sorted(own)]


def _ratio(pairs: Sequence[tuple[Fraction, Fraction]], name: str, less: tuple[Fraction, Fraction]) -> Fraction:
    """sum(E - less_E) / sum(A - less_A) in percent. Raises ValueError unless the divisor is positive."""
    divisor = sum(other - less[1] for _, other in pairs)
    if divisor <= 0:
        against = "than on clean pictures" if less[1] else "than without an error"
        raise ValueError(f"{name}: the baseline is no worse {against}, so nothing can be divided by it; take another")
    return 100 * sum((own - less[0] for own, _ in pairs), Fraction(0)) / divisor


def _mean(values: Sequence[Fraction]) -> float:
    return float(statistics.mean(values))


def _corruption_error(
    scores: CorruptionCounts, baseline: CorruptionCounts, name: str, relative: bool = False
) -> Fraction:
    less = (_error(scores["clean"]), _error(baseline["clean"])) if relative else (Fraction(0), Fraction(0))
    return _ratio(_errors(scores, baseline, name), name, less)


def corruption_errors(
    scores: CorruptionCounts, baseline: CorruptionCounts = ALEXNET, relative: bool = False
) -> dict[str, float]:
    """CE of every corruption that was measured, the held-out ones too; `relative`: less the clean error, which must
    come from the same network and crop.

    Raises ValueError where the baseline lacks a corruption or severity, or is no worse than on clean pictures.
    """
    return {name: float(_corruption_error(scores, baseline, name, relative)) for name in scores["corruptions"]}


def mce(
    scores: CorruptionCounts,
    baseline: CorruptionCounts = ALEXNET,
    relative: bool = False,
    names: Sequence[str] = CORRUPTIONS,
) -> float:
    """Mean CE over `names`, by default the 15; raises ValueError unless all of them were measured at every severity of
    the baseline."""
    return _mean([_corruption_error(scores, baseline, name, relative) for name in names])


def category_mce(scores: CorruptionCounts, baseline: CorruptionCounts = ALEXNET) -> dict[str, float]:
    """Mean CE of noise, blur, weather and digital; raises as `mce`."""
    return {
        category: _mean([_corruption_error(scores, baseline, name) for name in names])
        for category, names in CATEGORIES.items()
    }


def severity_mce(
    scores: CorruptionCounts, baseline: CorruptionCounts = ALEXNET, names: Sequence[str] = CORRUPTIONS
) -> dict[int, float]:
    """Mean over `names` of E / A at one severity alone; their mean is not the mCE, which divides sums. Raises as
    `mce`."""
    ratios: dict[str, list[Fraction]] = {}
    for name in names:
        pairs = _errors(scores, baseline, name)
        for severity, pair in zip(sorted(scores["corruptions"][name]), pairs, strict=True):
            ratios.setdefault(severity, []).append(_ratio([pair], name, (Fraction(0), Fraction(0))))
    return {int(severity): _mean(values) for severity, values in ratios.items()}
