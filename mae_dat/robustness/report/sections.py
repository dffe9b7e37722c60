"""The sections of a report's page, in the order of a reader's questions: which model is better, where, for which
classes, how well calibrated, how it was trained."""

import dataclasses
from dataclasses import dataclass, field

from mae_dat.robustness.report import comparison, confusion_figures, corruption_figures, figures, tables
from mae_dat.robustness.report.changes import changes_table, class_changes_table
from mae_dat.robustness.report.class_tables import class_tables
from mae_dat.robustness.report.corruption_table import corruption_table
from mae_dat.robustness.report.figures import ReportFigure
from mae_dat.robustness.report.published import published_tables
from mae_dat.robustness.report.shift_table import shift_table
from mae_dat.robustness.report.suite_texts import is_attack, suite_text
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.report.tables import Table
from mae_dat.robustness.report.worst_classes import class_results, worst_classes_figure, worst_classes_table

_CALIBRATION_TEXTS = {
    "Confidence": "the probability that a model gives to the class that it predicts",
    "ECE": "expected calibration error: the mean gap between confidence and accuracy over 15 bins of confidence",
    "RMS": "root mean square of this gap, over bins of 100 images",
    "NLL": "negative log-likelihood of the correct class: also penalizes wrong predictions",
    "Brier": "squared error of all probabilities: also penalizes wrong predictions",
}


@dataclass(frozen=True)
class SectionPart:
    """Figures and tables of a section under a title of their own."""

    title: str = ""
    texts: dict[str, str] = field(default_factory=dict)
    """Terms, such as titles of suites, and what they mean."""
    figures: tuple[ReportFigure, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True)
class ReportSection:
    """A part of the page that answers one question."""

    key: str
    title: str
    short: str
    """The title in the navigation."""
    parts: tuple[SectionPart, ...]


def report_sections(report: ReportData) -> list[ReportSection]:
    """Return the sections that have something to show."""
    several = len(report.groups) > 1
    sections = [
        ReportSection(
            "better",
            "Which model is better, by how much, and how certain is it?" if several else "How accurate is the model?",
            "Which model" if several else "Accuracy",
            tuple(_number_parts(report)),
        ),
        ReportSection("where", "Where?" if several else "Where does it fail?", "Where", tuple(_where_parts(report))),
        ReportSection("classes", "For which classes?", "Classes", tuple(_class_parts(report))),
        ReportSection("calibration", "How well calibrated?", "Calibration", tuple(_calibration_parts(report))),
        ReportSection("training", "How were the models trained?", "Training", tuple(_training_parts(report))),
    ]
    return [section for section in sections if section.parts or (section.key == "classes" and report.examples)]


def _number_parts(report: ReportData) -> list[SectionPart]:
    """Return the numbers of all suites, and published ones beside those of the same protocol and images."""
    if report.groups_are_rows:  # many groups have a row each
        gains, numbers = figures.ablation_figure(report), list(comparison.ablation_tables(report))
    else:
        gains = figures.gains_figure(report)
        numbers = [table for table in (comparison.headline_table(report), comparison.pairs_table(report)) if table]
    texts = {measurement.title: suite_text(measurement) for measurement in report.measurements}
    parts = [SectionPart(texts=texts, figures=tuple(filter(None, [gains])), tables=tuple(numbers))]
    if changes := changes_table(report):
        parts.append(SectionPart("What changed, image by image", tables=(changes,)))
    if published := published_tables(report):
        chart = figures.published_figure(report)
        parts.append(SectionPart(published[0].title, figures=tuple(filter(None, [chart])), tables=tuple(published)))
    return parts


def _where_parts(report: ReportData) -> list[SectionPart]:
    """Return the suites of corruptions, the shape bias, and the attacks."""
    parts = []
    for number, measurement in enumerate(report.of_kind("corruptions"), 1):
        lines = [] if report.groups_are_rows else corruption_figures.corruption_figures(measurement, number)
        charts = (*corruption_figures.heat_map_figures(measurement, number), *lines)
        texts = {measurement.title: suite_text(measurement)}
        parts.append(SectionPart(measurement.title, texts, charts, (_folded(corruption_table(measurement)),)))
    if shape := figures.shape_figures(report):
        texts = {measurement.title: suite_text(measurement) for measurement in report.of_kind("shape")}
        parts.append(SectionPart("Shape or texture", texts, tuple(shape)))
    if shifts := shift_table(report):
        parts.append(SectionPart(shifts.title, tables=(shifts,)))
    return [*parts, *_attack_parts(report)]


def _folded(table: Table) -> Table:
    """Return a table that the page hides under a title of its own, because charts show its numbers."""
    return dataclasses.replace(table, title=f"{table.title}: error of every corruption", folded=True)


def _attack_parts(report: ReportData) -> list[SectionPart]:
    """Return the changed words and the checks of attacks, if there are any."""
    charts: tuple[ReportFigure, ...] = ()
    if report.groups_are_rows:
        words = tables.words_tables_by_group(report)
    else:
        words = list(filter(None, [tables.words_table(report)]))
        charts = (figures.words_figure(report),) if words else ()
    attacks = [*words, *filter(None, [tables.checks_table(report)])]
    if not attacks:
        return []
    texts = {one.title: suite_text(one) for one in report.measurements if is_attack(one)}
    return [SectionPart("Attacks and their controls", texts, charts, tuple(attacks))]


def _class_parts(report: ReportData) -> list[SectionPart]:
    """Return the worst classes of every suite, and the confusion matrices."""
    worst_figures, worst_tables = [], []
    for number, measurement in enumerate(report.measurements, 1):
        if results := class_results(report, measurement):
            worst_tables.append(worst_classes_table(measurement, results))
            if not report.groups_are_rows:
                worst_figures.append(worst_classes_figure(measurement, results, number))
    changed = class_changes_table(report)
    if changed is not None:
        worst_tables.append(dataclasses.replace(changed, folded=True))
    confusion = confusion_figures.confusion_figure(report)
    all_classes = SectionPart(
        "All classes", figures=tuple(filter(None, [confusion])), tables=tuple(class_tables(report))
    )
    parts = [SectionPart(figures=tuple(worst_figures), tables=tuple(worst_tables)), all_classes]
    return [part for part in parts if part.figures or part.tables]


def _calibration_parts(report: ReportData) -> list[SectionPart]:
    table = tables.calibration_table(report)
    if table is None:
        return []
    return [SectionPart("", _CALIBRATION_TEXTS, tuple(confusion_figures.reliability_figures(report)), (table,))]


def _training_parts(report: ReportData) -> list[SectionPart]:
    if report.training is None:
        return []
    curves = [] if report.groups_are_rows else figures.curve_figures(report.training, report.groups)
    return [SectionPart(figures=tuple(curves), tables=(tables.runs_table(report.training),))]
