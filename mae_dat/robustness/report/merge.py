"""Two evaluations side by side: a model of each on the same images, for `mae-dat report --compare A B`.

They are merged only if every number can be compared: equal images, protocol, labels and versions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_dat.config.errors import CheckpointError, ConfigError, listing
from mae_dat.robustness.report.paired import known_bits
from mae_dat.robustness.scores.results import Results, VersionedCells, all_versions, read_results
from mae_dat.runtime.environment import COMMIT_KEY

BEFORE, AFTER = "A", "B"
"""Names of the two models in the merged results."""


@dataclass(frozen=True)
class ComparedModel:
    """A model of an evaluation."""

    source: str
    """The file of the evaluation, for messages."""
    results: Results
    name: str

    @property
    def title(self) -> str:
        """The model's title."""
        return self.results["models"][self.name]["title"]


def read_compared(sources: tuple[str, ...], names: tuple[str, ...]) -> list[ComparedModel]:
    """Read two evaluations, folders or results.json, and choose the model of each.

    Raises ConfigError, MissingInputError, CheckpointError.
    """
    if len(sources) != 2:
        raise ConfigError(f"--compare takes two evaluations, A and B; {len(sources)} given.")
    if len(names) not in (0, 2):
        raise ConfigError(f"--names takes two models, one of A and one of B; {len(names)} given.")
    files = [Path(source) / "results.json" if Path(source).is_dir() else Path(source) for source in sources]
    return choose_models({str(file): read_results(file) for file in files}, names)


def choose_models(evaluations: Mapping[str, Results], names: tuple[str, ...] = ()) -> list[ComparedModel]:
    """Choose the model of each of two evaluations, by their sources: the named one, or the only one.

    Raises ConfigError.
    """
    if len(evaluations) != 2:
        raise ConfigError(f"{next(iter(evaluations))} is compared with itself: give another evaluation.")
    a, b = evaluations.values()
    compared = []
    for (source, results), name in zip(
        evaluations.items(), names or _default_names(a, b, list(evaluations)), strict=True
    ):
        if name not in results["models"]:
            raise ConfigError(f"--names {name}: {source} has the models {listing(list(results['models']), 10)}.")
        compared.append(ComparedModel(source, results, name))
    return compared


def _default_names(a: Results, b: Results, sources: list[str]) -> tuple[str, str]:
    """Return the only model of each evaluation, or the only name that both have. Raises ConfigError."""
    if len(a["models"]) == len(b["models"]) == 1:
        return next(iter(a["models"])), next(iter(b["models"]))
    shared = [name for name in a["models"] if name in b["models"]]
    if len(shared) == 1:
        return shared[0], shared[0]
    have = "; ".join(
        f"{source}: {listing(list(one['models']), 10)}" for source, one in zip(sources, (a, b), strict=True)
    )
    raise ConfigError(f"several models could be compared ({have}): name one of each with --names MODEL_A MODEL_B.")


def merge_evaluations(a: ComparedModel, b: ComparedModel) -> Results:
    """Return the results of both models on the suites that both have.

    Raises CheckpointError if the evaluations have no suite in common, or are of different images, labels, protocols or
    versions, or if predictions and counts disagree.
    """
    suites = [suite for suite in a.results["cells"][a.name] if suite in b.results["cells"][b.name]]
    if not suites:
        raise CheckpointError(
            f"{a.source} and {b.source} have no suite in common: "
            f"{listing(list(a.results['cells'][a.name]), 5)} and {listing(list(b.results['cells'][b.name]), 5)}."
        )
    differences = [text for suite in suites for text in _differences(a, b, suite)] + _other_versions(a, b, suites)
    if differences:
        raise CheckpointError(
            f"{a.source} and {b.source} cannot be compared: {'; '.join(differences)}. Evaluate both models again with "
            "the same images, flags and versions."
        )
    for one in (a, b):
        _check_predictions(one, suites)
    return _merged(a, b, suites)


def _differences(a: ComparedModel, b: ComparedModel, suite: str) -> list[str]:
    """Return in words what differs between the measurements of a suite."""
    facts, others = (one.results["suites"][one.name][suite] for one in (a, b))
    found = [
        f"{suite}: no predictions for each image in {key}, of an older release"
        for key, one in ((BEFORE, a), (AFTER, b))
        if not _images(one, suite)
    ]
    for key in dict.fromkeys([*facts["protocol"], *others["protocol"]]):
        value, other = facts["protocol"].get(key, ""), others["protocol"].get(key, "")
        if key != "preprocessing" and value != other:  # the input size belongs to the model
            found.append(f"{suite}, {key}: {value or 'none'} and {other or 'none'}")
    same_order = _orders(a, suite) == _orders(b, suite)
    if facts["fingerprint"] != others["fingerprint"] or not (found or same_order):
        found.append(f"{suite}: other images or labels")
    protocols = [one.results["models"][one.name].get("protocol", "native") for one in (a, b)]
    if protocols[0] != protocols[1]:
        found.append(f"{suite}: --protocol {protocols[0]} and {protocols[1]}")
    return found


def _orders(one: ComparedModel, suite: str) -> dict[str, Any]:
    counts, images = one.results["cells"][one.name][suite], _images(one, suite)
    return {cell: (count["total"], images.get(cell, {}).get("order")) for cell, count in counts.items()}


def _images(one: ComparedModel, suite: str) -> Mapping[str, Any]:
    return one.results.get("images", {}).get(one.name, {}).get(suite, {})


def _other_versions(a: ComparedModel, b: ComparedModel, suites: list[str]) -> list[str]:
    """Return in words which packages have other versions in the two measurements."""
    versions = [_versions(one, suites) for one in (a, b)]
    packages = dict.fromkeys(package for one in versions for package in one)
    return [
        f"{package} {' and '.join(sorted(versions[0].get(package, {'none'})))} in A, "
        f"{' and '.join(sorted(versions[1].get(package, {'none'})))} in B"
        for package in packages
        if versions[0].get(package) != versions[1].get(package)
    ]


def _versions(one: ComparedModel, suites: list[str]) -> dict[str, set[str]]:
    """Return all versions that the suites of a model were measured under, by package; equal sources are equal, whatever
    their commit."""
    found: dict[str, set[str]] = {}
    for entry in one.results.get("measured_under", []):
        if any(suite in entry["cells"].get(one.name, {}) for suite in suites):
            for package, version in entry["versions"].items():
                if package != COMMIT_KEY:
                    found.setdefault(package, set()).add(version)
    return found


def _check_predictions(one: ComparedModel, suites: list[str]) -> None:
    """Raise CheckpointError unless there are predictions for each image and they agree with the counts."""
    for suite in suites:
        for cell, count in one.results["cells"][one.name][suite].items():
            record = _images(one, suite).get(cell)
            place = f"{one.source}: {one.name}, {suite} {cell}".rstrip()
            if record is None:
                raise CheckpointError(f"{place} has no predictions for each image: evaluate the model again.")
            if known_bits(record["correct"], count["correct"], count["total"]) is None:
                raise CheckpointError(
                    f"{place}: the predictions do not give {count['correct']} of {count['total']} correct. The file is "
                    "damaged or was edited; evaluate the model again."
                )


def _merged(a: ComparedModel, b: ComparedModel, suites: list[str]) -> Results:
    pair = {BEFORE: a, AFTER: b}
    titles = [one.title for one in pair.values()]
    if titles[0] == titles[1]:
        titles = [f"{titles[0]} ({key})" for key in pair]
    measured_under: list[VersionedCells] = [
        {"versions": entry["versions"], "cells": {key: _chosen(entry["cells"][one.name], suites)}}
        for key, one in pair.items()
        for entry in one.results.get("measured_under", [])
        if one.name in entry["cells"]
    ]

    def of_both(part: str) -> dict[str, Any]:
        whole: list[Any] = [one.results.get(part, {}) for one in pair.values()]
        return {
            key: _chosen(by_model.get(one.name, {}), suites)
            for (key, one), by_model in zip(pair.items(), whole, strict=True)
        }

    collapsed = {key: one.results.get("collapsed", {}).get(one.name) for key, one in pair.items()}
    merged: dict[str, Any] = {
        "format": a.results["format"],
        "title": f"{titles[1]} compared with {titles[0]}",
        "command": f"mae-dat report --compare {a.source} {b.source}",
        "created": max(a.results["created"], b.results["created"]),
        "seconds": a.results["seconds"] + b.results["seconds"],
        "machine": b.results["machine"],
        "versions": all_versions(measured_under),
        "measured_under": measured_under,
        "models": {
            key: {**one.results["models"][one.name], "title": title}
            for (key, one), title in zip(pair.items(), titles, strict=True)
        },
        **{part: of_both(part) for part in ("suites", "cells", "images", "classes", "calibration", "reliability")},
        "image_sets": _chosen(b.results.get("image_sets", {}), suites),
        "collapsed": {key: one for key, one in collapsed.items() if one},
        "checks": {key: one.results["checks"].get(one.name, {}) for key, one in pair.items()},
        "not_measured": _in_one_only(a, b, suites),
        "examples": [],
    }
    return merged  # type: ignore[return-value]


def _chosen(by_suite: Mapping[str, Any], suites: list[str]) -> dict[str, Any]:
    return {suite: by_suite[suite] for suite in suites if suite in by_suite}


def _in_one_only(a: ComparedModel, b: ComparedModel, suites: list[str]) -> dict[str, str]:
    """Return the suites that only one of the evaluations has, with this as the reason."""
    measured = ((one, suite) for one in (a, b) for suite in one.results["cells"][one.name])
    return {suite: f"only in {one.source}" for one, suite in measured if suite not in suites}
