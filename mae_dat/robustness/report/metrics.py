"""The axes of an evaluation: every number of a report, from counts, and how sure a difference of two networks is.

Networks share an axis only where they were asked the same: the same pictures, protocol and input size. A suite that was
measured in two ways gives two axes. What is generated, partial, or of another size than 224 px says so in its title.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS
from mae_dat.robustness.report.groups import groups_of
from mae_dat.robustness.scores.accuracy import (
    CorruptionCounts,
    Count,
    cue_coverage,
    severity_errors,
    shape_bias,
    top1_accuracy,
    top1_error,
    unnormalized_mce,
)
from mae_dat.robustness.scores.corruption_error import ALEXNET, mce
from mae_dat.robustness.scores.results import Results, SuiteFacts

CLEAN = ("imagenet", "clean")
ORDER = (
    *CLEAN, "imagenet-real", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "objnet-113", "objnet-1000",
    "stylized", "imagenet-c", "generated", "imagenet-c-bar", "cue-conflict", "conflict",
)  # fmt: skip
TITLES = {
    "generated": "IN-C*",
    "cue-conflict": "Cue conflict",
    "objnet-113": "ObjectNet (113 classes)",
    "objnet-1000": "ObjectNet (all 1000)",
}
USUAL_SIZE = [224, 224]
ROBUSTBENCH = "5,000 pictures of a list"  # what a protocol says where its list was used
GRADIENTS = "gradient attacks"  # FGSM, PGD and AutoAttack, whose checks are one
HEADLINE_SHARE = 0.05  # of changed words; the whole curve has a table of its own
Z = statistics.NormalDist().inv_cdf(0.975)


class WeightedCount(NamedTuple):
    """A number's part: so many times the share of right answers of a cell."""

    weight: float
    cell: Count


@dataclass(frozen=True)
class MetricValue:
    """A value, and the terms that it is made of, up to a constant; none where it is no sum of shares."""

    value: float
    terms: tuple[WeightedCount, ...] = ()
    doubtful: bool = False
    """Whether a check of the attack failed."""


@dataclass(frozen=True, eq=False)
class Metric:
    """One number of every network that was asked the same."""

    key: str
    """imagenet-a, imagenet-c/mce, generated/mean, words-symbolic/0.05, ..."""
    suite: str
    title: str
    better: int
    """+1 where more is better, -1 where less is, 0 where neither."""
    numbers: dict[str, MetricValue]
    """By network, in the order of the results."""
    published: str = ""
    """Column of the published table that this may stand in: only whole, official pictures."""
    digits: int = 1


class Variant(NamedTuple):
    """Networks for which a suite is the same measurement."""

    suite: str
    title: str
    models: tuple[str, ...]
    facts: SuiteFacts
    """Of the first of them."""


# ---- which measurements are the same ----


def suites_of(results: Results) -> list[str]:
    """Every suite that any network has, in the order of a report."""
    found = dict.fromkeys(suite for cells in results["cells"].values() for suite in cells)
    return sorted(found, key=lambda suite: ORDER.index(suite) if suite in ORDER else len(ORDER))


def _asked(results: Results, model: str, suite: str) -> tuple[Any, ...]:
    """What must be equal for two numbers to be compared; interpolation and precision belong to the network."""
    facts, cells = results["suites"][model][suite], results["cells"][model][suite]
    protocol = {key: value for key, value in facts["protocol"].items() if key != "preprocessing"}
    totals = sorted((cell, count["total"]) for cell, count in cells.items())
    size = results["models"][model]["size"]
    return size, protocol, facts["fingerprint"], facts["official"], facts["missing"], totals


def variants(results: Results) -> list[Variant]:
    """The measurements of all suites, each with the networks that share it."""
    found = []
    for suite in suites_of(results):
        groups: list[list[str]] = []
        for model in (model for model in results["models"] if results["cells"].get(model, {}).get(suite)):
            same = (group for group in groups if _asked(results, group[0], suite) == _asked(results, model, suite))
            group = next(same, None)
            if group is None:
                groups.append([model])
            else:
                group.append(model)
        titles = [_title(results, group[0], suite) for group in groups]
        for group, title in zip(groups, titles, strict=True):
            if titles.count(title) > 1:  # of other pictures or settings, which the table of suites tells
                title = f"{title}, as of {' and '.join(results['models'][model]['title'] for model in group)}"
            found.append(Variant(suite, title, tuple(group), results["suites"][group[0]][suite]))
    return found


def _title(results: Results, model: str, suite: str) -> str:
    facts, size = results["suites"][model][suite], results["models"][model]["size"]
    title = TITLES.get(suite, facts["title"])
    if not facts["official"] and kind_of(results["cells"][model][suite]) != "words":
        title = f"{title.rstrip('*')}*"
    notes = [] if size == USUAL_SIZE or common_size(results) else [f"{pixels_text(size)} px"]
    subset = facts["protocol"].get("subset", "")
    notes += [subset] if subset and not made_subset(results) else []
    notes += ["partial†"] if facts["missing"] else []
    return ", ".join([title, *notes])


def common_subset(results: Results) -> str:
    """The choice of pictures that all suites share, in words; empty where there is none, or several."""
    chosen = {facts["protocol"].get("subset", "") for own in results["suites"].values() for facts in own.values()}
    return chosen.pop() if len(chosen) == 1 else ""


def made_subset(results: Results) -> str:
    """The same, or the choice that all suites share but the clean and conflicting pictures of other classes, which are
    counted whole (`Choice.whole_clean`)."""
    suites = [
        (name, facts["protocol"].get("subset", "")) for own in results["suites"].values() for name, facts in own.items()
    ]
    chosen = {subset for name, subset in suites if name not in ("clean", "conflict")}
    whole = {subset for name, subset in suites if name in ("clean", "conflict")} <= {""}
    return chosen.pop() if len(chosen) == 1 and whole else common_subset(results)


def common_size(results: Results) -> str:
    """'64 px', where all networks take it and it is not the usual 224; empty otherwise."""
    sizes = {pixels_text(facts["size"]) for facts in results["models"].values()} - {pixels_text(USUAL_SIZE)}
    one = len({tuple(facts["size"]) for facts in results["models"].values()}) == 1
    return f"{sizes.pop()} px" if one and sizes else ""


def pixels_text(size: Sequence[int]) -> str:
    """'224', or '224 × 448', height first."""
    return str(size[0]) if size[0] == size[1] else f"{size[0]} × {size[1]}"


def kind_of(cells: dict[str, Count]) -> str:
    """What a suite is, as its cells tell: plain, shape, corruptions or words."""
    if "" in cells:
        return "shape" if "shape" in cells[""] else "plain"
    return "corruptions" if all("/" in cell for cell in cells) else "words"


def scores_of(results: Results, model: str, suite: str) -> CorruptionCounts:
    """The corruptions of a suite, and the clean pictures that they may be held against: as many, of the same network;
    otherwise none were counted."""
    cells = results["cells"][model]
    corruptions: dict[str, dict[str, Count]] = {}
    for cell, count in cells[suite].items():
        name, _, severity = cell.partition("/")
        corruptions.setdefault(name, {})[severity] = {"correct": count["correct"], "total": count["total"]}
    totals = {count["total"] for count in cells[suite].values()}
    clean = (cells[suite][""] for suite in CLEAN if "" in cells.get(suite, {}))
    same = next((count for count in clean if {count["total"]} == totals), None)
    none: Count = {"correct": 0, "total": 0}
    return {"clean": {**(none if same is None else same)}, "corruptions": corruptions}


# ---- the axes ----


def metrics_of(results: Results) -> list[Metric]:
    """Every axis of the headline, in order; one without a number is left out."""
    makers = {"plain": _plain, "shape": _shape, "corruptions": _corruptions, "words": _words}
    found = [
        axis
        for variant in variants(results)
        for axis in makers[kind_of(results["cells"][variant.models[0]][variant.suite])](results, variant)
    ]
    return [axis for axis in found if axis.numbers]


def _axis(
    results: Results,
    variant: Variant,
    key: str,
    title: str,
    better: int,
    value: Callable[[str], MetricValue | None],
    published: str = "",
) -> Metric:
    numbers = {model: number for model in variant.models if (number := value(model)) is not None}
    pictures = min(sum(cell["total"] for _, cell in number.terms[:1]) for number in numbers.values()) if numbers else 0
    whole = variant.facts["official"] and not variant.facts["missing"]
    return Metric(key, variant.suite, title, better, numbers, published if whole else "", 2 if pictures >= 5_000 else 1)


def _subset(variant: Variant) -> str:
    """'-5000' for RobustBench's list, which published rows of its own belong to; '-part' for any other choice."""
    subset = variant.facts["protocol"].get("subset", "")
    return {"": "", ROBUSTBENCH: "-5000"}.get(subset, "-part")


def doubtful(results: Results, model: str, suite: str) -> bool:
    """Whether a check of an attack failed; gradients are checked once for all attacks that follow them."""
    checks = results["checks"].get(model, {})
    shared = GRADIENTS if suite.startswith(("fgsm", "pgd", "autoattack")) else suite
    return not all(check["passed"] for name in {suite, shared} for check in checks.get(name, []))


def _plain(results: Results, variant: Variant) -> Iterator[Metric]:
    suite = variant.suite

    def right(model: str) -> MetricValue:
        count = results["cells"][model][suite][""]
        return MetricValue(top1_accuracy(count), (WeightedCount(100.0, count),), doubtful(results, model, suite))

    yield _axis(results, variant, suite, f"{variant.title} (%)", +1, right, suite + _subset(variant))
    if suite in CLEAN:
        ece = {model: results["calibration"].get(model, {}).get(suite, {}).get("ece") for model in variant.models}
        title = f"{variant.title}: calibration error, ECE (%)"
        numbers = {model: MetricValue(100 * value) for model, value in ece.items() if value is not None}
        yield Metric(f"{suite}/ece", suite, title, -1, numbers)


def _shape(results: Results, variant: Variant) -> Iterator[Metric]:
    suite = variant.suite

    def bias(model: str) -> MetricValue | None:
        cues = results["cells"][model][suite][""]
        share = shape_bias(cues)
        terms = (WeightedCount(1.0, {"correct": cues["shape"], "total": cues["shape"] + cues["texture"]}),)
        return None if share is None else MetricValue(share, terms)

    def covered(model: str) -> MetricValue:
        cues = results["cells"][model][suite][""]
        answered: Count = {"correct": cues["shape"] + cues["texture"], "total": cues["total"]}
        return MetricValue(100 * cue_coverage(cues), (WeightedCount(100.0, answered),))

    title = f"{variant.title}: shape bias (0–1)"
    yield replace(_axis(results, variant, f"{suite}/bias", title, +1, bias), digits=3)
    yield _axis(results, variant, f"{suite}/coverage", f"{variant.title}: coverage (%)", 0, covered)


def _words(results: Results, variant: Variant) -> Iterator[Metric]:
    suite, cells = variant.suite, results["cells"][variant.models[0]][variant.suite]
    shares = [cell for cell in cells if float(cell) > 0] or list(cells)
    share = min(shares, key=lambda cell: abs(float(cell) - HEADLINE_SHARE))

    def right(model: str) -> MetricValue:
        count = results["cells"][model][suite][share]
        return MetricValue(top1_accuracy(count), (WeightedCount(100.0, count),), doubtful(results, model, suite))

    title = f"{variant.title}, {100 * float(share):g} % of the words (%)"
    yield _axis(results, variant, f"{suite}/{share}", title, +1, right)


def _corruptions(results: Results, variant: Variant) -> Iterator[Metric]:
    suite = variant.suite
    scores = {model: scores_of(results, model, suite) for model in variant.models}

    def mean(model: str) -> MetricValue | None:
        cells = scores[model]["corruptions"]
        usual = [name for name in CORRUPTIONS if name in cells]
        names = usual or list(cells)
        weights = [
            WeightedCount(-100 / len(names) / len(cells[name]), count)
            for name in names
            for count in cells[name].values()
        ]
        return MetricValue(mean_of(scores[model]), tuple(weights))

    def normalised(relative: bool) -> Callable[[str], MetricValue | None]:
        return lambda model: _mce(scores[model], relative)

    arms = groups_of(results, variant.models)

    def against_first(model: str) -> MetricValue | None:
        seed = next(seed for arm in arms for seed, member in arm.members.items() if member == model)
        first = arms[0].members.get(seed)
        return None if len(arms) < 2 or first is None else _tried(lambda: mce(scores[model], scores[first]))

    if suite == "imagenet-c" and variant.facts["official"]:
        column = f"imagenet-c{_subset(variant)}/mce"
        yield _axis(results, variant, f"{suite}/mce", f"{variant.title}: mCE", -1, normalised(False), column)
        yield _axis(results, variant, f"{suite}/rmce", f"{variant.title}: relative mCE", -1, normalised(True))
    yield _axis(results, variant, f"{suite}/mean", f"{variant.title}: mean corruption error (%)", -1, mean)
    if not variant.facts["official"]:
        title = f"{variant.title}: mCE, of {arms[0].title} 100"
        yield _axis(results, variant, f"{suite}/mce-first", title, -1, against_first)


def mean_of(scores: CorruptionCounts) -> float:
    """Mean corruption error in percent over the 15, or over all where the suite has others."""
    if any(name in CORRUPTIONS for name in scores["corruptions"]):
        return unnormalized_mce(scores)
    return statistics.fmean(
        statistics.fmean(map(top1_error, cells.values())) for cells in scores["corruptions"].values()
    )


def severity_means(scores: CorruptionCounts) -> dict[int, float]:
    """Error in percent at each severity, over the same corruptions as `mean_of`."""
    names = [name for name in scores["corruptions"] if name in CORRUPTIONS] or list(scores["corruptions"])
    return severity_errors(scores, names)


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """The category of each corruption; "held out" for the four that never count, "" for those of another suite."""
    known = {name: kind for kind, members in CATEGORIES.items() for name in members}
    listed = list(names)
    other = "held out" if any(name in known for name in listed) else ""
    return {name: known.get(name, other) for name in listed}


def _tried(value: Callable[[], float]) -> MetricValue | None:
    """None where not all that it needs was measured."""
    try:
        return MetricValue(value())
    except ValueError:
        return None


def _mce(scores: CorruptionCounts, relative: bool) -> MetricValue | None:
    """AlexNet-normalised, with the terms of its sum."""
    number = _tried(lambda: mce(scores, relative=relative))
    if number is None:
        return None
    cells, baseline = scores["corruptions"], ALEXNET["corruptions"]
    less = top1_error(ALEXNET["clean"]) if relative else 0.0
    divisors = {name: sum(top1_error(count) - less for count in baseline[name].values()) for name in CORRUPTIONS}
    scale = 100 * 100 / len(CORRUPTIONS)
    terms = [WeightedCount(-scale / divisors[name], count) for name in CORRUPTIONS for count in cells[name].values()]
    if relative:
        terms.append(
            WeightedCount(sum(scale * len(cells[name]) / divisors[name] for name in CORRUPTIONS), scores["clean"])
        )
    return replace(number, terms=tuple(terms))


# ---- how sure a difference is ----


def wilson(count: Count) -> tuple[float, float]:
    """The 95 % interval of a share of right answers (Wilson 1927), 0 to 1."""
    n, share = count["total"], count["correct"] / count["total"]
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return middle - half, middle + half


def share_difference(new: Count, old: Count) -> tuple[float, float]:
    """The 95 % interval of new share - old share (Newcombe 1998, method 10), as if of different pictures."""
    (low, high), (old_low, old_high) = wilson(new), wilson(old)
    share, old_share = new["correct"] / new["total"], old["correct"] / old["total"]
    gap = share - old_share
    return gap - math.hypot(share - low, old_high - old_share), gap + math.hypot(high - share, old_share - old_low)


def interval(new: MetricValue, old: MetricValue) -> tuple[float, float] | None:
    """The 95 % interval of new.value - old.value; None where a number is no sum of counted shares.

    The intervals of the cells are added up. That is the widest that they can give, as if every picture were as hard
    under each corruption; and both networks met the same pictures, which narrows a difference further.
    """
    if not new.terms or len(new.terms) != len(old.terms):
        return None
    low = high = 0.0
    for (weight, count), (old_weight, old_count) in zip(new.terms, old.terms, strict=True):
        assert weight == old_weight
        if count["total"] == 0 or old_count["total"] == 0:
            return None
        ends = [weight * end for end in share_difference(count, old_count)]
        low, high = low + min(ends), high + max(ends)
    return low, high
