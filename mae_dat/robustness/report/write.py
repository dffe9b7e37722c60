"""The report of an evaluation: report.html (one self-contained page), report.md, report.tex, report.csv and
figures/*.png, all from its results alone.

`mae-dat report OUT` makes them again from OUT/results.json. The same results give the same files.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mae_dat.config.commands.report import ReportConfig
from mae_dat.config.requirements import read_requirements
from mae_dat.config.terminal import print_text
from mae_dat.robustness.report import render, tables
from mae_dat.robustness.report.changed_examples import with_changed_examples
from mae_dat.robustness.report.changes import changes_csv, changes_table
from mae_dat.robustness.report.figures import ReportFigure
from mae_dat.robustness.report.findings import findings
from mae_dat.robustness.report.gate import gate_lines, require_met
from mae_dat.robustness.report.headline import aligned_text, headline_text
from mae_dat.robustness.report.merge import merge_evaluations, read_compared
from mae_dat.robustness.report.sections import report_sections
from mae_dat.robustness.report.summarize import ReportData, summarize
from mae_dat.robustness.scores.results import TrainingFacts, read_results
from mae_dat.robustness.scores.results_check import check_results
from mae_dat.storage.files import atomic_write, prepare_output_folder

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"
COMPARISON_FOLDER = "output/comparison"
VEGA = Path(__file__).parent / "vega" / "vega.min.js"


def write_report(report: ReportData, folder: Path) -> Path:
    """Write every file of the report into `folder`, each atomically, and return the path of the page.

    The images that `examples` and `galleries` name are read from `folder`. Raises OutputError or StorageError.
    """
    prepare_output_folder(folder / "figures")
    sections = report_sections(report)
    protocol_tables = [tables.models_table(report), tables.suites_table(report)]
    protocol_tables += filter(None, [tables.inputs_table(report)])
    parts = [part for section in sections for part in section.parts]
    section_tables = [table for part in parts for table in part.tables]
    report_figures = [figure for part in parts for figure in part.figures]
    texts = {"findings": findings(report), "not_measured": tables.not_measured(report)}
    page = render.html_page(
        TEMPLATE,
        report=report,
        sections=sections,
        examples=[_example(report, example, folder) for example in report.examples],
        galleries=_galleries(report.training, folder) if report.training else [],
        protocol_tables=protocol_tables,
        vega=VEGA.read_text() if any(figure.spec for figure in report_figures) else "",
        **texts,
    )
    files = {
        "report.csv": render.counts_csv(report),
        "report.tex": render.latex(report, section_tables),
        "report.md": render.markdown(report, [*section_tables, *protocol_tables], **texts),
        "report.html": page,
    }
    for figure in report_figures:
        _write(folder / "figures" / figure.name, figure.png)
    for name, text in files.items():
        _write(folder / name, text.encode(errors="backslashreplace"))
    return folder / "report.html"


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


# ---- images on which the models differ, and images drawn in training ----


def _example(report: ReportData, example: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return an image on which the models differ, for the template: its versions, each with all predictions. Files that
    are no PNG in `folder` are missing."""
    label, cell = example["label"], str(example["cell"])
    place = ", ".join(filter(None, (example["suite"], cell.replace("/", ", severity ").replace("_", " "))))
    shown = "corrupted" if example.get("clean") else place
    captions = {"clean": ("clean", "clean_answers"), "file": (shown, "answers"), "words": ("its visual words", "")}
    versions, missing = [], []
    for key, (caption, answers) in captions.items():
        if not example.get(key):
            continue
        image = _image(example[key], f"{label}, {caption}", folder)
        if image is None:
            missing.append(example[key])
            continue
        versions.append({"image": image, "caption": caption, "predictions": _predictions(report, example, answers)})
    known = any(version["predictions"] for version in versions)
    rest = [] if known else _predictions(report, example, "answers")
    return {"label": label, "place": place, "versions": versions, "missing": missing, "predictions": rest}


def _predictions(report: ReportData, example: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    return [
        {"model": report.model_titles.get(model, model), "name": name, "correct": name == example["label"]}
        for model, name in example.get(key, {}).items()
    ]


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
    """Make the report again from results.json, or of two evaluations side by side, and print the main numbers."""
    if config.compare:
        _compare(config)
        return
    assert config.results is not None, "checked by the configuration"
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


def _compare(config: ReportConfig) -> None:
    report = summarize(merge_evaluations(*read_compared(config.compare, config.names)))
    path = write_comparison(report, Path(config.output_dir or COMPARISON_FOLDER))
    print_text(headline_text(report))
    table = changes_table(report)
    if table is not None:
        print_text(aligned_text(table))
    print_text(path)


def write_comparison(report: ReportData, folder: Path) -> Path:
    """Write the report of two evaluations side by side, with examples, and changes.csv; return the path of the page.

    Raises OutputError or StorageError.
    """
    path = write_report(with_changed_examples(report, folder), folder)
    _write(folder / "changes.csv", changes_csv(report).encode(errors="backslashreplace"))
    return path
