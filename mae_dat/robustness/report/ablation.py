"""Many arms at once: a row each, as a paper's ablation has them, with what each costs and differs by from the first."""

from collections.abc import Callable, Iterator

from mae_dat.robustness.corruptions import CATEGORIES
from mae_dat.robustness.report.comparison import ARROWS, caution, difference_text, measured_on, value_text, verdict
from mae_dat.robustness.report.groups import Group, groups_of
from mae_dat.robustness.report.metrics import CLEAN, Metric, MetricValue, metrics_of, scores_of, suites_of, variants
from mae_dat.robustness.report.tables import NOTHING, Table, stat_text
from mae_dat.robustness.scores.accuracy import Count, SeedStatistics, category_errors, top1_accuracy
from mae_dat.robustness.scores.results import Results

FEW = 4
"""Arms that still fit into a table as columns, beside what they differ by."""


def many(results: Results) -> bool:
    """Whether the arms are too many to be columns."""
    return len(groups_of(results)) > FEW


def summary(results: Results) -> list[str]:
    """Which arms differ from the first beyond chance on clean and on corrupted pictures, and how far that carries."""
    axes, (first, *others) = ablation_axes(results), groups_of(results)
    said = []
    for title in ("clean", "corruption error"):
        if title in axes:
            axis = axes[title]
            found = {sign: [arm.title for arm in others if verdict(axis, arm, first) == sign] for sign in (1, -1)}
            named = (
                f"{word} than {first.title}: {', '.join(found[sign]) or 'none'}"
                for sign, word in ((1, "better"), (-1, "worse"))
            )
            said.append(f"{title.capitalize()}, beyond chance {'; '.join(named)}.")
    return [*said, *measured_on(results), *caution(results)]


def ablation_tables(results: Results) -> list[Table]:
    """Every arm's numbers and processor minutes, and its differences to the first arm at the same seed."""
    arms, axes = groups_of(results), ablation_axes(results)
    first, *others = arms
    minutes = {arm.title: arm.stat(_minutes(results)) for arm in arms}
    timed = any(minutes.values())
    head = ("", *(name + ARROWS[axis.better] for name, axis in axes.items()), *["processor minutes ↓"] * timed)
    rows = [
        (arm.title, *(value_text(axis, arm) for axis in axes.values()), *[_text(minutes[arm.title])] * timed)
        for arm in arms
    ]
    notes = ["Mean ± standard deviation over seeds. In percent, but for the shape bias, which is from 0 to 1."]
    if "generated" in suites_of(results):
        notes.append(
            "Corruptions are made on the fly from clean pictures: not ImageNet-C, and no AlexNet-normalised mCE."
        )
    notes += ["Processor minutes are those of the fine-tuning, without its pretraining."] * timed
    found = [Table("arms", "Every arm", head, tuple(rows), tuple(notes))]
    if others:
        found.append(_differences(first, others, axes))
    return found


def _differences(first: Group, others: list[Group], axes: dict[str, Metric]) -> Table:
    rows = [(arm.title, *(difference_text(axis, arm, first) for axis in axes.values())) for arm in others]
    beyond = frozenset(
        (row, 1 + column)
        for row, arm in enumerate(others)
        for column, axis in enumerate(axes.values())
        if verdict(axis, arm, first)
    )
    tests = sum(verdict(axis, arm, first) is not None for arm in others for axis in axes.values())
    note = (
        "Differences of runs with the same seed, ± their standard deviation. Better and worse, in bold, are beyond "
        "chance by a 95 % interval (Student's over seeds, on these very pictures; of a single seed that of the number "
        f"of pictures). Of the {tests} intervals here, about {0.05 * tests:.0f} would exclude zero by chance alone: no "
        "correction is made for that."
    )
    head = ("", *(name + ARROWS[axis.better] for name, axis in axes.items()))
    return Table("against-first", f"Difference to {first.title}", head, tuple(rows), (note,), best=beyond)


def words_by_arm(results: Results) -> list[Table]:
    """Accuracy of every arm by share of changed words, a table for each attack."""
    found = []
    for variant in variants(results):
        if variant.suite.startswith("words"):
            cells = {model: results["cells"][model][variant.suite] for model in variant.models}
            shares = sorted({share for own in cells.values() for share in own}, key=float)
            rows = [
                (arm.title, *(_accuracies([cells[name] for name in arm.members.values()], share) for share in shares))
                for arm in groups_of(results, variant.models)
            ]
            head = ("words changed, up to", *(f"{100 * float(share):g} %" for share in shares))
            notes = ("Top-1 accuracy in percent. At 0 the picture is decoded from its own words.",)
            found.append(Table(variant.suite, f"Changed words: {variant.title}", head, tuple(rows), notes))
    return found


def _accuracies(members: list[dict[str, Count]], share: str) -> str:
    return stat_text((top1_accuracy(own[share]) for own in members if share in own), 1)


def ablation_axes(results: Results) -> dict[str, Metric]:
    """The columns: every axis by a short title, or its own where two would have the same, and the kinds of corruption
    behind their mean. Only errors in units of the first arm's are left out, which the differences tell."""
    found: dict[str, Metric] = {}
    for axis in metrics_of(results):
        if axis.key.endswith("/mce-first"):
            continue
        title = _short_title(axis)
        known = title in found
        found[axis.title if known else title] = axis
        if axis.key.endswith("/mean"):
            kinds = _categories(results, axis)
            found |= {f"{axis.title}: {kind}" if known else kind: own for kind, own in kinds}
    return found


def _short_title(axis: Metric) -> str:
    part = axis.key.removeprefix(axis.suite)
    if axis.suite in CLEAN and part in ("", "/ece"):
        return "ECE" if part else "clean"
    if part in ("/mean", "/bias"):
        return {"/mean": "corruption error", "/bias": "shape bias"}[part]
    if axis.suite.startswith("words-"):
        return f"{axis.suite.removeprefix('words-')} words"
    return axis.title


def _categories(results: Results, mean: Metric) -> Iterator[tuple[str, Metric]]:
    """The corruption error of each category; without intervals of single runs, which only its cells have."""
    errors = {model: category_errors(scores_of(results, model, mean.suite)) for model in mean.numbers}
    for kind in CATEGORIES:
        numbers = {model: MetricValue(own[kind]) for model, own in errors.items() if kind in own}
        if numbers:
            yield kind, Metric(f"{mean.suite}/{kind}", mean.suite, kind, -1, numbers)


def _minutes(results: Results) -> Callable[[str], float | None]:
    runs = results["training"]["runs"] if "training" in results else {}

    def minutes(name: str) -> float | None:
        seconds = runs[name].get("cpu_seconds") if name in runs else None
        return None if seconds is None else seconds / 60

    return minutes


def _text(stat: SeedStatistics | None) -> str:
    return NOTHING if stat is None else stat.text(1)
