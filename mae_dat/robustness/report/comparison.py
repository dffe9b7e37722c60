"""The tables that compare groups: every metric with the groups side by side, or every group with the metrics side by
side, and the differences with how sure they are."""

import itertools

from mae_dat.robustness.report.charts import signed
from mae_dat.robustness.report.corruption_table import section_starts
from mae_dat.robustness.report.differences import ALPHA, is_doubtful
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.measurements import WHOLE_SUITES
from mae_dat.robustness.report.metrics import Metric
from mae_dat.robustness.report.paired import MIN_SEEDS
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.report.tables import NOTHING, Table, mean_text
from mae_dat.robustness.scores.results import SUITE_ORDER, TrainingFacts

ARROWS = {+1: " ↑", -1: " ↓", 0: ""}
DOUBT = "‡"
_ARROW_NOTE = "↑ more is better, ↓ less is better."
_MARK_NOTES = {
    "*": "* not a published benchmark's files: corruptions generated on the fly from clean images, or images of "
    "one's own. AlexNet's errors do not belong to them.",
    "†": "† partial: images are missing (the table of suites says which).",
}
_SEEDS_NOTE = (
    "Mean ± standard deviation over seeds. Differences are between runs with the same seed. Their 95 % intervals are "
    "over seeds and images: Student's, with the variance between seeds plus the variance between images."
)
_IMAGES_NOTE = (
    "Differences between single runs have 95 % intervals of a paired comparison on the same images: Bonett & Price's "
    "for one prediction per image, no narrower than the exact one; otherwise a bootstrap over images, which keeps all "
    "versions of an image together. They do not cover the scatter between training runs."
)
_COUNTS_NOTE = (
    "Differences between single runs of an older release, without predictions for each image, have Newcombe's 95 % "
    "intervals, as if each model had met other images: true ones are narrower. They do not cover the scatter between "
    "training runs."
)
_SEEDS_COUNTS_NOTE = (
    "Where results of an older release have no predictions for each image, the variance between images is the least "
    "that the differences allow."
)


def verdict_note(tests: int) -> str:
    """Return when a difference is called better or worse, where up to `tests` suites of a pair are compared."""
    return (
        f"Better and worse mean p < {ALPHA:g} after Holm's correction over the suites of each pair (here up to "
        f"{tests}): McNemar's exact test for one prediction per image, else the bootstrap's or Student's. Intervals "
        "are not corrected, so that one may exclude zero without a verdict. The best of a row is better than every "
        f"other. Trainings with fewer than {MIN_SEEDS} seeds get no verdict, and no number of a collapsed model is "
        "called better."
    )


def interval_notes(report: ReportData) -> list[str]:
    """Return how the intervals of differences were computed, and what better and worse mean."""
    differences = [difference for difference in report.differences.values() if difference.ends is not None]
    seeds = any(len(group.members) > 1 for group in report.groups)
    single = any(len(group.members) == 1 for group in report.groups)
    paired = any(difference.paired for difference in differences)
    from_counts = any(not difference.paired for difference in differences)
    notes = [_SEEDS_NOTE] if seeds else []
    notes += [_SEEDS_COUNTS_NOTE] if seeds and from_counts else []
    notes += [_IMAGES_NOTE] if single and paired else []
    notes += [_COUNTS_NOTE] if single and from_counts else []
    tests = max((len(report.verdicts(*pair)) for pair in itertools.permutations(report.groups, 2)), default=0)
    return [*notes, verdict_note(tests)]


def value_text(metric: Metric, group: Group) -> str:
    """Format the value of a group, with several seeds as mean and deviation; a dash if there is none."""
    values = (metric.values[model].value for model in group.members.values() if model in metric.values)
    return mean_text(values, metric.digits) + DOUBT * is_doubtful(metric, group)


def difference_text(report: ReportData, metric: Metric, new: Group, old: Group) -> str:
    """Format a difference as '+1.2 [+0.4, +2.0] better' with its 95 % interval; a dash if there is none."""
    difference = report.difference(metric, new, old)
    if difference is None:
        return NOTHING
    text = signed(difference.gap, metric.digits)
    if difference.ends is not None:
        low, high = difference.ends
        text += f" [{signed(low, metric.digits)}, {signed(high, metric.digits)}]"
    return text + {1: " better", -1: " worse"}.get(difference.verdict or 0, "")


# ---- a row for every metric ----


def headline_table(report: ReportData) -> Table:
    """Return every metric with the groups side by side, then the differences to the first group."""
    groups, metrics = report.groups, report.metrics
    first, *others = groups
    seeds = any(len(group.members) > 1 for group in groups)
    unit = "at the same seed [95 %]" if seeds else "[95 %]"
    rows = []
    for metric in metrics:
        values = (value_text(metric, group) for group in groups)
        differences = (difference_text(report, metric, other, first) for other in others)
        rows.append((_titled(metric) + reference_text(report, metric), *values, *differences))
    columns = {group: column for column, group in enumerate(groups, 1)}
    best = ((row, report.best.get(metric)) for row, metric in enumerate(metrics))
    return Table(
        key="headline",
        title="Numbers",
        head=("", *(group.title for group in groups), *(f"{other.title} − {first.title} {unit}" for other in others)),
        rows=tuple(rows),
        notes=tuple(_headline_notes(report, rows)),
        breaks=frozenset(section_starts([_section(metric) for metric in metrics])),
        best=frozenset((row, columns[group]) for row, group in best if group is not None),
    )


def _titled(metric: Metric) -> str:
    return metric.title + ARROWS[metric.better]


def _section(metric: Metric) -> str:
    """Return the section of the headline table that a metric belongs to; lines are drawn between them."""
    if metric.suite not in SUITE_ORDER:
        return "attacks"
    position = SUITE_ORDER.index(metric.suite)
    return "images" if position < SUITE_ORDER.index("imagenet-c") else metric.suite


def reference_text(report: ReportData, metric: Metric) -> str:
    """Return ' (chance 10.0, most common class 12.5)' for an accuracy whose classes are known, in percent."""
    scores = next((report.classes.get(model, {}).get(metric.suite) for model in metric.values), None)
    if scores is None or metric.key != metric.suite:
        return ""
    return f" (chance {scores['chance']:.1f}, most common class {scores['most_common_percent']:.1f})"


def _headline_notes(report: ReportData, rows: list[tuple[str, ...]]) -> list[str]:
    notes = [_ARROW_NOTE]
    notes += [note for mark, note in _MARK_NOTES.items() if any(mark in metric.title for metric in report.metrics)]
    if report.image_subset:
        whole = " and ".join(WHOLE_SUITES[name] for name in WHOLE_SUITES if name in report.suites)
        exception = "" if report.subset_of_all or not whole else f" but {whole}"
        notes.append(f"All suites{exception}: {report.image_subset}.")
    if report.image_size:
        notes.append(f"All models take images of {report.image_size}.")
    if any(DOUBT in text for row in rows for text in row):
        notes.append(f"{DOUBT} a check of this attack failed: the model may be less robust than that.")
    if len(report.groups) > 1:
        notes += [f"Differences are to {report.groups[0].title}.", *interval_notes(report)]
    return notes


def pairs_table(report: ReportData) -> Table | None:
    """Return the differences between groups other than the first; None without two such groups."""
    _, *others = report.groups
    pairs = [(new, old) for position, new in enumerate(others) for old in others[:position]]
    if not pairs:
        return None
    rows = [
        (_titled(metric), *(difference_text(report, metric, new, old) for new, old in pairs))
        for metric in report.metrics
        if metric.better
    ]
    return Table(
        key="pairs",
        title="Differences between the others",
        head=("", *(f"{new.title} − {old.title}" for new, old in pairs)),
        rows=tuple(rows),
        notes=("As in the table above.",),
    )


# ---- a row for every group, as in the ablations of a paper ----


def ablation_tables(report: ReportData) -> list[Table]:
    """Return the metrics and processor minutes of every group, and its differences to the first group."""
    first, *others = report.groups
    tables = [_groups_table(report)]
    if others:
        tables.append(_differences_table(report, first, others))
    return tables


def _groups_table(report: ReportData) -> Table:
    notes = ["Mean ± standard deviation over seeds. In percent, but for the shape bias, which is from 0 to 1."]
    if "generated" in report.suites:
        notes.append(
            "Corruptions are made on the fly from clean images: not ImageNet-C, and no AlexNet-normalised mCE."
        )
    head, metrics = _column_titles(report), report.columns.values()
    for title, metric in report.columns.items():
        if reference := reference_text(report, metric):
            notes.append(f"Of {title}:{reference}, in percent.")
    rows = [(group.title, *(value_text(metric, group) for metric in metrics)) for group in report.groups]
    minutes = [_cpu_minutes(report.training, group) for group in report.groups]
    if any(text != NOTHING for text in minutes):
        head += ["processor minutes ↓"]
        rows = [(*row, text) for row, text in zip(rows, minutes, strict=True)]
        notes.append("Processor minutes are those of the fine-tuning, without its pretraining.")
    return Table(key="arms", title="Every arm", head=("", *head), rows=tuple(rows), notes=tuple(notes))


def _column_titles(report: ReportData) -> list[str]:
    return [title + ARROWS[metric.better] for title, metric in report.columns.items()]


def _cpu_minutes(training: TrainingFacts | None, group: Group) -> str:
    """Format the mean processor time of a group's fine-tunings; a dash if unknown."""
    runs = training["runs"] if training else {}
    seconds = [runs[model].get("cpu_seconds") for model in group.members.values() if model in runs]
    return mean_text((None if value is None else value / 60 for value in seconds), 1)


def _differences_table(report: ReportData, first: Group, others: list[Group]) -> Table:
    metrics = report.columns.values()
    verdicts = {
        (row, column): report.verdict(metric, group, first)
        for row, group in enumerate(others)
        for column, metric in enumerate(metrics, 1)
    }
    note = (
        "Differences of runs with the same seed. Better and worse are in bold. The correction is over the suites of "
        f"each row, not over the {len(others)} rows."
    )
    return Table(
        key="against-first",
        title=f"Difference to {first.title}",
        head=("", *_column_titles(report)),
        rows=tuple(
            (group.title, *(difference_text(report, metric, group, first) for metric in metrics)) for group in others
        ),
        notes=(note, *interval_notes(report)),
        best=frozenset(position for position, verdict in verdicts.items() if verdict),
    )
