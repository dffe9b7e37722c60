"""The report of an evaluation: report.html (one self-contained page), report.md, report.tex, report.csv and
figures/*.png, all from its results alone.

`mae-dat report OUT` makes them again from OUT/results.json. The same results give the same files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_dat.config.commands.report import ReportConfig
from mae_dat.config.requirements import read_requirements
from mae_dat.config.terminal import print_text
from mae_dat.robustness.report import comparison, corruption_figures, figures, render, tables
from mae_dat.robustness.report.class_tables import class_tables
from mae_dat.robustness.report.corruption_table import corruption_table
from mae_dat.robustness.report.figures import ReportFigure
from mae_dat.robustness.report.findings import findings
from mae_dat.robustness.report.gate import gate_lines, require_met
from mae_dat.robustness.report.headline import headline_text
from mae_dat.robustness.report.published import published_tables
from mae_dat.robustness.report.shift_table import shift_table
from mae_dat.robustness.report.summarize import ReportData, summarize
from mae_dat.robustness.report.tables import Table
from mae_dat.robustness.scores.results import TrainingFacts, read_results
from mae_dat.robustness.scores.results_check import check_results
from mae_dat.storage.files import atomic_write, prepare_output_folder

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


@dataclass(frozen=True)
class ReportSection:
    """A part of the page."""

    key: str
    title: str
    figures: tuple[ReportFigure, ...] = ()
    tables: tuple[Table, ...] = ()


def write_report(report: ReportData, folder: Path) -> Path:
    """Write every file of the report into `folder`, each atomically, and return the path of the page.

    The images that `examples` and `galleries` name are read from `folder`. Raises OutputError or StorageError.
    """
    prepare_output_folder(folder / "figures")
    sections = report_sections(report)
    protocol_tables = [*filter(None, [tables.inputs_table(report)])]
    protocol_tables += [tables.models_table(report), tables.suites_table(report)]
    section_tables = [table for section in sections for table in section.tables]
    texts = {"findings": findings(report), "not_measured": tables.not_measured(report)}
    page = render.html_page(
        TEMPLATE,
        report=report,
        sections=sections,
        examples=[_example(report, example, folder) for example in report.examples],
        galleries=_galleries(report.training, folder) if report.training else [],
        protocol_tables=protocol_tables,
        **texts,
    )
    files = {
        "report.csv": render.counts_csv(report),
        "report.tex": render.latex(report, section_tables),
        "report.md": render.markdown(report, [*section_tables, *protocol_tables], **texts),
        "report.html": page,
    }
    for figure in (figure for section in sections for figure in section.figures):
        _write(folder / "figures" / figure.name, figure.png)
    for name, text in files.items():
        _write(folder / name, text.encode(errors="backslashreplace"))
    return folder / "report.html"


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


# ---- the sections of the page ----


def report_sections(report: ReportData) -> list[ReportSection]:
    """Return the sections that have something to show. Many groups have a row each, and no lines in charts."""
    sections = [_numbers_section(report)]
    if published := published_tables(report):
        sections.append(ReportSection("published", published[0].title, tables=tuple(published)))
    for number, measurement in enumerate(report.of_kind("corruptions"), 1):
        lines = [] if report.groups_are_rows else corruption_figures.corruption_figures(measurement, number)
        charts = (*lines, *corruption_figures.heat_map_figures(measurement, number))
        table = corruption_table(measurement)
        sections.append(ReportSection(f"corruptions-{number}", measurement.title, charts, (table,)))
    if shape := figures.shape_figures(report):
        sections.append(ReportSection("shape", "Shape bias", tuple(shape)))
    if shifts := shift_table(report):
        sections.append(ReportSection("shifts", shifts.title, tables=(shifts,)))
    if classes := class_tables(report):
        sections.append(ReportSection("classes", "Classes", tables=tuple(classes)))
    sections += _attacks_section(report)
    if calibration := tables.calibration_table(report):
        sections.append(ReportSection("calibration", calibration.title, tables=(calibration,)))
    if report.training:
        curves = [] if report.groups_are_rows else figures.curve_figures(report.training, report.groups)
        runs = tables.runs_table(report.training)
        sections.append(ReportSection("training", "Training", tuple(curves), (runs,)))
    return sections


def _numbers_section(report: ReportData) -> ReportSection:
    numbers: list[Table | None]
    if report.groups_are_rows:
        gains, numbers = figures.ablation_figure(report), [*comparison.ablation_tables(report)]
    else:
        gains = figures.gains_figure(report)
        numbers = [comparison.headline_table(report), comparison.pairs_table(report)]
    charts = (gains, figures.published_figure(report))
    return ReportSection("numbers", "Numbers", tuple(filter(None, charts)), tuple(filter(None, numbers)))


def _attacks_section(report: ReportData) -> list[ReportSection]:
    """Return the section of changed words and checks of attacks, if there is any."""
    charts: tuple[ReportFigure, ...] = ()
    if report.groups_are_rows:
        words = tables.words_tables_by_group(report)
    else:
        words = list(filter(None, [tables.words_table(report)]))
        charts = (figures.words_figure(report),) if words else ()
    attacks = [*words, *filter(None, [tables.checks_table(report)])]
    return [ReportSection("attacks", "Attacks", charts, tuple(attacks))] if attacks else []


# ---- images on which the models differ, and images drawn in training ----


def _example(report: ReportData, example: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return an image on which the models differ, for the template. Files that are no PNG in `folder` are missing."""
    label, cell = example["label"], str(example["cell"])
    place = ", ".join(filter(None, (example["suite"], cell.replace("/", ", severity ").replace("_", " "))))
    alts = {"file": f"{label}, {place}", "words": "its visual words"}
    images = [(example[key], _image(example[key], alt, folder)) for key, alt in alts.items() if example.get(key)]
    predictions = [
        f"{'✓' if prediction == label else '✗'} {report.model_titles.get(model, model)}: {prediction}"
        for model, prediction in example["answers"].items()
    ]
    return {
        "label": label,
        "place": place,
        "predictions": predictions,
        "images": [image for _, image in images if image],
        "missing": [file for file, image in images if not image],
    }


def _galleries(training: TrainingFacts, folder: Path) -> list[dict[str, Any]]:
    return [
        {**gallery, "image": _image(gallery["file"], gallery["caption"], folder)} for gallery in training["galleries"]
    ]


def _image(file: str, alt: str, folder: Path) -> ReportFigure | None:
    """Load a PNG in `folder`; None for anything else."""
    path = (folder / file).resolve()
    png = path.read_bytes() if path.is_relative_to(folder.resolve()) and path.is_file() else b""
    return ReportFigure(path.name, png, alt, alt) if png.startswith(PNG_SIGNATURE) else None


def main(config: ReportConfig) -> None:
    """Make the report again from results.json, and print the main numbers."""
    source = Path(config.results)
    file = source / "results.json" if source.is_dir() else source
    requirements = read_requirements(config.require) if config.require else None
    results = read_results(file)
    check_results(results, str(file))
    report = summarize(results)
    path = write_report(report, Path(config.output_dir) if config.output_dir else file.parent)
    print_text(headline_text(report))
    print_text(path)
    if requirements:
        lines = gate_lines(results, requirements, config.undecided, file, path.parent)
        print_text("\n".join(map(str, lines)))
        require_met(lines, config.undecided)
