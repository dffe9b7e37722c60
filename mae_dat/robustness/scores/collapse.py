"""Collapsed models: those that predict the same class for almost every image, whatever it shows."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from mae_dat.robustness.scores.accuracy import Count
from mae_dat.robustness.scores.image_bits import CellImages, MostPredicted
from mae_dat.robustness.scores.results import SUITE_ORDER, Collapse

COLLAPSED_SHARE = 0.95
"""A model that predicts one class for more than this share of the images has collapsed."""
_ATTACKS = ("fgsm", "pgd", "autoattack", "words-")
ImagesOfSuites = Mapping[str, Mapping[str, CellImages]]
"""By suite and cell."""


def collapsed_models(
    images: Mapping[str, ImagesOfSuites], cells: Mapping[str, Mapping[str, Mapping[str, Count]]]
) -> dict[str, Collapse]:
    """Return the models that have collapsed, each with what shows it, from results' `images` and `cells`.

    The first suite of `SUITE_ORDER` that has predictions decides, which is usually that of clean images, then the
    user's own suites; attacks do not.
    """
    found = {}
    for model, suites in images.items():
        totals = {suite: sum(count["total"] for count in counts.values()) for suite, counts in cells[model].items()}
        others = [suite for suite in suites if suite not in SUITE_ORDER and not suite.startswith(_ATTACKS)]
        collapse = collapse_of(suites, totals, [*SUITE_ORDER, *others])
        if collapse is not None:
            found[model] = collapse
    return found


def collapse_of(images: ImagesOfSuites, totals: Mapping[str, int], suites: Collection[str]) -> Collapse | None:
    """Return what shows that a model has collapsed, on the first of `suites` that has predictions; None if it has not.

    `totals` are the images of a suite, over all cells. Where one class really holds more than 95 % of the images, a
    model has collapsed only if it also predicts this class for as large a share of the others. Images of a single
    class show nothing.
    """
    for suite in suites:
        predicted = [cell["most_predicted"] for cell in images.get(suite, {}).values() if "most_predicted" in cell]
        if predicted:
            name = max((most["name"] for most in predicted), key=lambda one: _images(predicted, one, "images"))
            share = _images(predicted, name, "images") / totals[suite]
            others, of_others = _images(predicted, name, "others"), _images(predicted, name, "of_others")
            rare_others = others < (1 - COLLAPSED_SHARE) * totals[suite]
            ignores_labels = others and (not rare_others or of_others > COLLAPSED_SHARE * others)
            is_collapsed = share > COLLAPSED_SHARE and ignores_labels
            return {"suite": suite, "name": name, "percent": 100 * share} if is_collapsed else None
    return None


def _images(predicted: Sequence[MostPredicted], name: str, key: Literal["images", "others", "of_others"]) -> int:
    return sum(most[key] for most in predicted if most["name"] == name)
