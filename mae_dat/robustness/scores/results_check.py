"""A check that the numbers of results.json do not contradict each other, as they do in a file edited by hand."""

from collections.abc import Mapping
from typing import Any

from mae_dat.config.errors import CheckpointError
from mae_dat.robustness.scores.class_counts import hits_and_totals
from mae_dat.robustness.scores.image_bits import unpack_bits
from mae_dat.robustness.scores.results import Results


def check_results(results: Results, source: str) -> None:
    """Raise CheckpointError, which names the cell, where counts are impossible, or differ from the predictions for each
    image or for each class. Cells of older releases, which have only counts, are checked alone."""
    try:
        if list(results["models"].keys()) != list(results["cells"].keys()):
            raise CheckpointError(f"{source} has other models than counts: evaluate again.")
        for model, suites in results["cells"].items():
            for suite, counts in suites.items():
                if suite not in results["suites"][model]:
                    raise CheckpointError(f"{source}: {model} has counts of {suite}, but no facts about it.")
                for cell, count in counts.items():
                    place = f"{model}, {suite} {cell}".strip()
                    _check_count(count, f"{source}: {place}")
                    images = results.get("images", {}).get(model, {}).get(suite, {}).get(cell)
                    bits = None if images is None else unpack_bits(images["correct"], count["total"])
                    if images is not None and (bits is None or int(bits.sum()) != count["correct"]):
                        raise _edited(f"{source}: {place}", count, "the predictions for each image")
                classes = results.get("classes", {}).get(model, {}).get(suite)
                if classes is not None and "" in counts:
                    hits, totals = hits_and_totals(classes)
                    if sum(hits) != counts[""]["correct"] or sum(totals) != counts[""]["total"]:
                        raise _edited(f"{source}: {model}, {suite}", counts[""], "the confusion matrix")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source} is not a complete results.json ({fault}): evaluate again.") from error


def _check_count(count: Mapping[str, Any], place: str) -> None:
    numbers = (count["correct"], count["total"])
    if not all(type(number) is int for number in numbers) or not 0 <= count["correct"] <= count["total"]:
        raise CheckpointError(
            f"{place} has {count['correct']} of {count['total']} images correct, which is impossible."
        )


def _edited(place: str, count: Mapping[str, Any], other: str) -> CheckpointError:
    return CheckpointError(
        f"{place} has {count['correct']} of {count['total']} images correct, which contradicts {other}: the file was "
        "edited or is damaged; evaluate again."
    )
