"""The comparison of a user's own shifted images with the clean images of the same names."""

from collections import Counter

import numpy as np

from mae_dat.robustness.cached_passes import PlanCounts
from mae_dat.robustness.counting import SuiteCounts
from mae_dat.robustness.evaluation_plan import EvaluationPlan, SuiteRun
from mae_dat.robustness.scores.image_bits import Bits, unpack_bits
from mae_dat.robustness.scores.results import CLEAN_SUITES, PairedCounts
from mae_dat.robustness.suites.shifts import clean_pair_names
from mae_dat.robustness.suites.specs import suite_spec


def paired_counts(plan: EvaluationPlan, counts: PlanCounts) -> dict[str, dict[str, dict[str, PairedCounts]]]:
    """Return, by model, suite of the user's own and cell, how often the clean and the shifted image was correct.

    An image is paired with the clean one of the same CLASS/NAME, whatever its suffix. Images without one are left out,
    and cells without any pair; names that occur twice are not paired.
    """
    found: dict[str, dict[str, dict[str, PairedCounts]]] = {}
    runs = {(run.network.name, run.suite.name): run for run in plan.runs}
    for run in plan.runs:
        model, suite = run.network.name, run.suite.name
        clean = next((runs[model, name] for name in CLEAN_SUITES if (model, name) in runs), None)
        if suite_spec(suite).kind != "own" or clean is None:
            continue
        cells = _pair_cells(run, counts[model, suite], clean, counts[model, clean.suite.name])
        if cells:
            found.setdefault(model, {})[suite] = cells
    return found


def _pair_cells(
    run: SuiteRun, counts: SuiteCounts, clean: SuiteRun, clean_counts: SuiteCounts
) -> dict[str, PairedCounts]:
    clean_images = clean.suite.passes[0].images
    correct_of = _unique(clean_pair_names(clean_images), _bits(clean_counts, "", len(clean_images)))
    cells: dict[str, PairedCounts] = {}
    for image_pass in run.suite.passes:
        (cell,) = image_pass.cells
        shifted = _unique(clean_pair_names(image_pass.images), _bits(counts, cell, len(image_pass.images)))
        pairs = Counter((correct_of[name], correct) for name, correct in shifted.items() if name in correct_of)
        if pairs:
            cells[cell] = {
                "both": pairs[True, True],
                "only_clean": pairs[True, False],
                "only_shifted": pairs[False, True],
                "neither": pairs[False, False],
            }
    return cells


def _bits(counts: SuiteCounts, cell: str, images: int) -> Bits:
    bits = unpack_bits(counts.images[cell]["correct"], images) if cell in counts.images else None
    return np.zeros(0, bool) if bits is None else bits


def _unique(names: list[str | None], correct: Bits) -> dict[str, bool]:
    """Return whether each image was predicted correctly, by its name, without names that occur twice."""
    times = Counter(names)
    pairs = zip(names, correct.tolist(), strict=False)
    return {name: hit for name, hit in pairs if name is not None and times[name] == 1}
