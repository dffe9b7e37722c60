"""The report of an evaluation: report.html (one self-contained page), report.md, report.tex, report.csv and
figures/*.png, all from its results alone.

`python -m mae_dat scorecard OUT` makes them again from OUT/results.json. The same results give the same files.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_dat.robustness.report import ablation, comparison, figures, tables
from mae_dat.robustness.report import render as typeset
from mae_dat.robustness.report.figures import ReportFigure
from mae_dat.robustness.report.groups import groups_of, titles_of
from mae_dat.robustness.report.tables import Table
from mae_dat.robustness.scores.results import Results, TrainingFacts, read_results
from mae_dat.storage.files import atomic_write, prepare_output_folder

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEMPLATE = "scorecard.html.j2"


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    key: str
    title: str
    pictures: tuple[ReportFigure, ...] = ()
    tables: tuple[Table, ...] = ()


def write_report(results: Results, folder: Path) -> Path:
    """Writes every file of the report into `folder`, each whole or not at all, and returns the path of the page.

    The pictures that `examples` name are read from `folder`. Raises OutputError or StorageError.
    """
    prepare_output_folder(folder / "figures")
    sections, measured, lacking = _sections(results), _measured(results), tables.not_measured(results)
    shown = [table for section in sections for table in section.tables]
    page = _page(results, folder, sections, measured, lacking)
    files = {
        "report.csv": typeset.counts_csv(results),
        "report.tex": typeset.latex(results, shown),
        "report.md": typeset.markdown(results, _summary(results), [*shown, *measured], lacking),
        "report.html": page,
    }
    for picture in (picture for section in sections for picture in section.pictures):
        _write(folder / "figures" / picture.name, picture.png)
    for name, text in files.items():
        _write(folder / name, text.encode())
    return folder / "report.html"


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def _page(
    results: Results, folder: Path, sections: Sequence[Section], measured: Sequence[Table], lacking: Sequence[str]
) -> str:
    return typeset.html_page(
        TEMPLATE,
        results=results,
        summary=_summary(results),
        sections=sections,
        examples=[_example(results, example, folder) for example in results["examples"]],
        galleries=_galleries(results["training"], folder) if "training" in results else [],
        measured=measured,
        not_measured=lacking,
    )


def _summary(results: Results) -> list[str]:
    return ablation.summary(results) if ablation.many(results) else comparison.summary(results)


def _measured(results: Results) -> list[Table]:
    return [tables.networks_table(results), tables.suites_table(results)]


def _sections(results: Results) -> list[Section]:
    """The parts that have something to show. Many arms have a row each, and no charts with a line each."""
    many = ablation.many(results)
    found = [_many_numbers(results) if many else _numbers(results)]
    if published := comparison.published_tables(results):
        found.append(Section("published", published[0].title, tables=tuple(published)))
    for number, variant in enumerate(figures.of_kind(results, "corruptions"), 1):
        lines = [] if many else figures.overview(results, variant, number)
        pictures = (*lines, *figures.heat_maps(results, variant, number))
        table = tables.corruption_table(results, variant)
        found.append(Section(f"corruptions-{number}", variant.title, pictures, (table,)))
    if shape := figures.shape_pictures(results):
        found.append(Section("shape", "Shape bias", tuple(shape)))
    words = ablation.words_by_arm(results) if many else list(filter(None, [tables.words_table(results)]))
    checks = filter(None, [tables.checks_table(results)])
    pictures = (figures.words_picture(results),) if words and not many else ()
    if attacks := (*words, *checks):
        found.append(Section("attacks", "Attacks", pictures, attacks))
    calibration = tables.calibration_table(results)
    if calibration:
        found.append(Section("calibration", calibration.title, tables=(calibration,)))
    if "training" in results:
        curves = [] if many else figures.curve_pictures(results["training"], groups_of(results))
        found.append(Section("training", "Training", tuple(curves), (tables.runs_table(results["training"]),)))
    return found


def _numbers(results: Results) -> Section:
    glance = tuple(filter(None, (figures.gains_picture(results), figures.published_picture(results))))
    columns = filter(None, (comparison.headline_table(results), comparison.pairs_table(results)))
    return Section("numbers", "Numbers", glance, tuple(columns))


def _many_numbers(results: Results) -> Section:
    arms = figures.arms_picture(results, ablation.ablation_axes(results))
    glance = tuple(filter(None, (arms, figures.published_picture(results))))
    return Section("numbers", "Numbers", glance, tuple(ablation.ablation_tables(results)))


# ---- examples ----


def _example(results: Results, example: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A picture on which the networks differ, for the template; one that is no PNG in `folder` is called missing."""
    titles = titles_of(results)
    where = ", ".join(
        filter(None, (example["suite"], str(example["cell"]).replace("/", ", severity ").replace("_", " ")))
    )
    alts = {"file": f"{example['label']}, {where}", "words": "its visual words"}
    found = [(example[key], _picture(example[key], alt, folder)) for key, alt in alts.items() if example.get(key)]
    answers = [
        f"{'✓' if answer == example['label'] else '✗'} {titles.get(model, model)}: {answer}"
        for model, answer in example["answers"].items()
    ]
    pictures, lacking = [one for _, one in found if one], [file for file, one in found if not one]
    return {"label": example["label"], "where": where, "answers": answers, "pictures": pictures, "lacking": lacking}


def _galleries(training: TrainingFacts, folder: Path) -> list[dict[str, Any]]:
    return [{**one, "picture": _picture(one["file"], one["caption"], folder)} for one in training["galleries"]]


def _picture(file: str, alt: str, folder: Path) -> ReportFigure | None:
    """A PNG in `folder`; None for anything else."""
    path = (folder / file).resolve()
    png = path.read_bytes() if path.is_relative_to(folder.resolve()) and path.is_file() else b""
    return ReportFigure(path.name, png, alt, alt) if png.startswith(PNG_SIGNATURE) else None


def main(arguments: Sequence[str]) -> None:
    """Make the report again from the results.json of a folder."""
    about = "Make report.html, report.md, report.tex and report.csv from the results.json of an evaluation."
    parser = argparse.ArgumentParser(prog="python -m mae_dat scorecard", description=about)
    parser.add_argument("folder", type=Path, help="holds results.json; the report is written there")
    options = parser.parse_args(arguments)
    print(write_report(read_results(options.folder / "results.json"), options.folder))
