"""Measurements: which models were measured on the same images in the same way, and may therefore be compared.

Models share a measurement of a suite only if the images and the protocol are equal. The input size belongs to the
model: models of different sizes are compared on the same images, each at its own size. A suite that was measured in two
ways gives two measurements. The title says if images are generated or missing, or which sizes other than 224 px.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.scores.accuracy import CorruptionCounts, Count, CountsByCorruption
from mae_dat.robustness.scores.image_bits import CellImages
from mae_dat.robustness.scores.results import CLEAN_SUITES, GROUP_PREFIX, SUITE_ORDER, Results, SuiteFacts

MEASUREMENT_TITLES = {
    "generated": "IN-C*",
    "cue-conflict": "Cue conflict",
    "objnet-113": "ObjectNet (113 classes)",
    "objnet-1000": "ObjectNet (all 1000)",
}
USUAL_SIZE = [224, 224]
WHOLE_SUITES = {"clean": "Clean", "conflict": "Cue conflict"}
"""Suites of which all images are measured if others have a limit (`SuiteSettings.whole_clean`), and their titles."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """A suite, measured in the same way for several models."""

    suite: str
    title: str
    kind: str
    """plain, shape, groups, corruptions or words."""
    facts: SuiteFacts
    """Those of the first model."""
    models: tuple[str, ...]
    groups: tuple[Group, ...]
    """The groups with members among the models, with these members alone."""
    counts: dict[str, dict[str, Count]]
    """By model, then by cell as in `Results.cells`."""
    corruptions: dict[str, CorruptionCounts]
    """By model, for a suite of corruptions."""
    images: dict[str, dict[str, CellImages]]
    """By model and cell, as in `Results.images`; for a suite of corruptions also "clean", as in `corruptions`."""

    @property
    def complete(self) -> bool:
        """Whether all images of the published benchmark were measured."""
        return self.facts["official"] and not self.facts["missing"]

    @property
    def official_imagenet_c(self) -> bool:
        """Whether the images are ImageNet-C's files, which alone may be divided by AlexNet's errors."""
        return self.suite == "imagenet-c" and self.facts["official"]

    @property
    def changed_word_shares(self) -> list[str]:
        """The cells of a suite that changes words: all shares of changed words in increasing order."""
        return sorted({share for counts in self.counts.values() for share in counts}, key=float)


def suites_of(results: Results) -> list[str]:
    """Return every suite that any model was measured on, in the order of a report."""
    suites = dict.fromkeys(suite for counts in results["cells"].values() for suite in counts)
    return sorted(suites, key=lambda suite: SUITE_ORDER.index(suite) if suite in SUITE_ORDER else len(SUITE_ORDER))


def measurements_of(results: Results, groups: Sequence[Group]) -> list[Measurement]:
    """Return the measurements of all suites, each with the models and groups that share it."""
    return [
        measurement for suite in suites_of(results) for measurement in _measurements_of_suite(results, groups, suite)
    ]


def _measurements_of_suite(results: Results, groups: Sequence[Group], suite: str) -> Iterator[Measurement]:
    comparable = _comparable_models(results, suite)
    titles = [_title(results, models, suite) for models in comparable]
    for models, title in zip(comparable, titles, strict=True):
        if titles.count(title) > 1:  # on other images or with other settings, which are in the table of suites
            title = f"{title}, as of {' and '.join(results['models'][model]['title'] for model in models)}"
        kind = suite_kind(results["cells"][models[0]][suite])
        restricted = (group.restricted_to(models) for group in groups)
        yield Measurement(
            suite=suite,
            title=title,
            kind=kind,
            facts=results["suites"][models[0]][suite],
            models=tuple(models),
            groups=tuple(group for group in restricted if group.members),
            counts={model: results["cells"][model][suite] for model in models},
            corruptions={model: corruption_counts(results, model, suite) for model in models}
            if kind == "corruptions"
            else {},
            images={model: _images(results, model, suite, kind) for model in models},
        )


def _images(results: Results, model: str, suite: str, kind: str) -> dict[str, CellImages]:
    """Return the predictions for each image of a suite's cells, and of the clean images that corruptions are compared
    with; without cells of an older release."""
    by_suite = results.get("images", {}).get(model, {})
    clean = _comparable_clean_suite(results, model, suite) if kind == "corruptions" else None
    images = {**by_suite.get(suite, {})}
    if clean and "" in by_suite.get(clean, {}):
        images["clean"] = by_suite[clean][""]
    return images


def _comparable_models(results: Results, suite: str) -> list[list[str]]:
    """Return the models measured on a suite, those measured in the same way together."""
    comparable: list[list[str]] = []
    for model in results["models"]:
        if not results["cells"].get(model, {}).get(suite):
            continue
        conditions = _conditions(results, model, suite)
        for models in comparable:
            if _conditions(results, models[0], suite) == conditions:
                models.append(model)
                break
        else:
            comparable.append([model])
    return comparable


def _conditions(results: Results, model: str, suite: str) -> tuple[Any, ...]:
    """Return what must be equal for two numbers to be compared. Input size, interpolation and precision belong to the
    model."""
    facts, counts = results["suites"][model][suite], results["cells"][model][suite]
    protocol = {key: value for key, value in facts["protocol"].items() if key != "preprocessing"}
    totals = sorted((cell, count["total"]) for cell, count in counts.items())
    return protocol, facts["fingerprint"], facts["official"], facts["missing"], totals


def _title(results: Results, models: Sequence[str], suite: str) -> str:
    """Return the suite's title, marked with * if it is not official, and with what is particular to these models."""
    facts = results["suites"][models[0]][suite]
    title = MEASUREMENT_TITLES.get(suite, facts["title"])
    if not facts["official"] and suite_kind(results["cells"][models[0]][suite]) != "words":
        title = f"{title.rstrip('*')}*"
    sizes = list(dict.fromkeys(size_text(results["models"][model]["size"]) for model in models))
    is_usual = sizes == [size_text(USUAL_SIZE)] or shared_size(results)
    notes = [] if is_usual else [f"{' and '.join(sizes)} px" + ", each at its own size" * (len(sizes) > 1)]
    subset = facts["protocol"].get("subset", "")
    notes += [subset] if subset and not shared_subset(results) else []
    notes += ["partial†"] if facts["missing"] else []
    return ", ".join([title, *notes])


def suite_kind(counts: dict[str, Count]) -> str:
    """Return the kind of a suite from its cells: plain, shape, groups, corruptions or words."""
    if "" in counts:
        return "shape" if "shape" in counts[""] else "plain"
    if all(cell.startswith(GROUP_PREFIX) for cell in counts):
        return "groups"
    return "corruptions" if all("/" in cell for cell in counts) else "words"


def corruption_counts(results: Results, model: str, suite: str) -> CorruptionCounts:
    """Return the counts of a suite's corruptions, and of the clean images that they can be compared with: as many, of
    the same model. Without such images the clean count is 0 of 0."""
    counts = results["cells"][model]
    corruptions: CountsByCorruption = {}
    for cell, count in counts[suite].items():
        name, _, severity = cell.partition("/")
        corruptions.setdefault(name, {})[severity] = {"correct": count["correct"], "total": count["total"]}
    clean_suite = _comparable_clean_suite(results, model, suite)
    clean: Count = {**counts[clean_suite][""]} if clean_suite else {"correct": 0, "total": 0}
    return {"clean": clean, "corruptions": corruptions}


def _comparable_clean_suite(results: Results, model: str, suite: str) -> str | None:
    """Return the suite of clean images with as many images as every cell of a suite of corruptions, if there is one."""
    counts = results["cells"][model]
    totals = {count["total"] for count in counts[suite].values()}
    for name in CLEAN_SUITES:
        if "" in counts.get(name, {}) and {counts[name][""]["total"]} == totals:
            return name
    return None


# ---- what all measurements share, which the report says once ----


def subset_of_all(results: Results) -> str:
    """Return the choice of images that all suites share, in words; empty if there is none, or several."""
    subsets = {
        facts["protocol"].get("subset", "") for suites in results["suites"].values() for facts in suites.values()
    }
    return subsets.pop() if len(subsets) == 1 else ""


def shared_subset(results: Results) -> str:
    """Return the same, or the choice that all suites share but clean and cue-conflict images of other classes than
    ImageNet's, which are always measured on all images (`SuiteSettings.whole_clean`)."""
    subsets = [
        (name, facts["protocol"].get("subset", ""))
        for suites in results["suites"].values()
        for name, facts in suites.items()
    ]
    chosen = {subset for name, subset in subsets if name not in WHOLE_SUITES}
    others_are_whole = {subset for name, subset in subsets if name in WHOLE_SUITES} <= {""}
    return chosen.pop() if len(chosen) == 1 and others_are_whole else subset_of_all(results)


def shared_size(results: Results) -> str:
    """Return '64 px' if all models have this input size and it is not the usual 224; empty otherwise."""
    sizes = {tuple(facts["size"]) for facts in results["models"].values()}
    if len(sizes) != 1 or sizes == {tuple(USUAL_SIZE)}:
        return ""
    return f"{size_text(sizes.pop())} px"


def size_text(size: Sequence[int]) -> str:
    """Return '224', or '224 × 448' with the height first."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]} × {size[1]}"
