"""Results of evaluations that never took place, with predictions for each image."""

import numpy as np
from evaluations import evaluation
from numpy.typing import NDArray

from mae_dat.robustness.scores.class_counts import class_counts, class_scores
from mae_dat.robustness.scores.collapse import collapsed_models
from mae_dat.robustness.scores.image_bits import pack_bits
from mae_dat.robustness.scores.predictions import pack_names, pack_numbers, pack_predictions
from mae_dat.robustness.scores.results import Results

CLASSES = ("cat", "dog", "eel", "fox")


def record(results: Results, model: str, suite: str, cell: str, correct: NDArray[np.bool_], order: str = "a") -> None:
    """Replace what a model predicted on one cell."""
    results["cells"][model][suite][cell] = {"correct": int(correct.sum()), "total": len(correct)}
    by_suite = results.setdefault("images", {}).setdefault(model, {})
    by_suite.setdefault(suite, {})[cell] = {"order": order, "correct": pack_bits(correct)}


def predicted(
    results: Results, model: str, suite: str, labels: NDArray[np.int64], prediction: NDArray[np.int64]
) -> None:
    """Replace what a model predicted on a suite of unchanged images of four classes."""
    record(results, model, suite, "", labels == prediction)
    numbers, counts = np.unique(prediction, return_counts=True)
    best = int(numbers[counts.argmax()])
    results["images"][model][suite][""]["most_predicted"] = {
        "name": CLASSES[best],
        "images": int(counts.max()),
        "others": int((labels != best).sum()),
        "of_others": int(((labels != best) & (prediction == best)).sum()),
    }
    scores = class_scores(class_counts(labels, prediction, CLASSES, len(CLASSES)))
    results.setdefault("classes", {}).setdefault(model, {})[suite] = scores
    results["collapsed"] = collapsed_models(results["images"], results["cells"])


def seeds(results: Results, **arms: list[str]) -> Results:
    """Add trainings: arms with a model for each seed."""
    results["training"] = {
        "runs": {
            model: {"arm": arm, "label": arm, "seed": seed, "seconds": 1.0, "curves": {}}
            for arm, models in arms.items()
            for seed, model in enumerate(models)
        },
        "pretraining": {},
        "seconds": 1.0,
        "settings": {},
        "galleries": [],
    }
    return results


def on_one_suite(**correct: NDArray[np.bool_]) -> Results:
    """Models with these correct predictions on one suite."""
    results = evaluation(list(correct), ("imagenet-a",))
    for model, bits in correct.items():
        record(results, model, "imagenet-a", "", bits)
    return results


def known_images(results: Results, suite: str, labels: NDArray[np.int64], order: str = "a") -> None:
    """Add names and labels of the images of a suite."""
    names = [f"{CLASSES[label]}/{index}.png" for index, label in enumerate(labels)]
    results.setdefault("image_sets", {}).setdefault(suite, {})[order] = {
        "classes": list(CLASSES),
        "labels": pack_numbers(labels),
        "names": pack_names(names),
        "root": "val",
    }


def predict_cells(
    results: Results, model: str, suite: str, labels: NDArray[np.int64], wrong: dict[str, list[int]]
) -> None:
    """Replace what a model predicted on cells: the next class for the images with these numbers."""
    for cell, numbers in wrong.items():
        prediction = labels.copy()
        prediction[numbers] = (labels[numbers] + 1) % len(CLASSES)
        record(results, model, suite, cell, labels == prediction)
        results["images"][model][suite][cell]["predicted"] = pack_predictions(prediction, labels == prediction)
