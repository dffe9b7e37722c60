"""The report of an evaluation: report.html (one self-contained page), report.md, report.tex, report.csv and
figures/*.png, all from its results alone.

`python -m mae_dat.scorecard OUT` makes them again from OUT/results.json. The same results give the same files.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mae_dat import charts, comparison, tables, typeset
from mae_dat.axes import (
    Axis,
    Variant,
    axes_of,
    cues_of,
    interval,
    kind_of,
    kinds_of,
    mean_of,
    pixels_text,
    scores_of,
    severity_means,
    variants,
)
from mae_dat.corruptions import CATEGORIES, SEVERITIES
from mae_dat.errors import UserError
from mae_dat.files import atomic_write, prepare_output_folder
from mae_dat.published import COLUMNS, published_rows
from mae_dat.report import PNG_SIGNATURE, Picture
from mae_dat.results import Results, read_results
from mae_dat.scores import ModelScores, accuracy, category_errors, coverage, error, shape_share
from mae_dat.tables import Table, number_text

TEMPLATE = "scorecard.html.j2"


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    key: str
    title: str
    pictures: tuple[Picture, ...] = ()
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
        "report.md": typeset.markdown(results, comparison.summary(results), [*shown, *measured], lacking),
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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        results=results,
        summary=comparison.summary(results),
        sections=sections,
        examples=[_example(results, example, folder) for example in results["examples"]],
        measured=measured,
        not_measured=lacking,
    )


def _measured(results: Results) -> list[Table]:
    return [tables.networks_table(results), tables.suites_table(results)]


def _sections(results: Results) -> list[Section]:
    """The parts that have something to show."""
    glance = tuple(filter(None, (_gains_picture(results), _published_picture(results))))
    found = [Section("numbers", "Numbers", glance, (comparison.headline_table(results),))]
    published = comparison.published_table(results)
    if published:
        found.append(Section("published", published.title, tables=(published,)))
    corrupted = [variant for variant in variants(results) if _kind(results, variant) == "corruptions"]
    for number, variant in enumerate(corrupted, 1):
        pictures = (*_overview(results, variant, number), *_heat_maps(results, variant, number))
        table = tables.corruption_table(results, variant)
        found.append(Section(f"corruptions-{number}", variant.title, pictures, (table,)))
    if shape := _shape_pictures(results):
        found.append(Section("shape", "Shape bias", tuple(shape)))
    words, checks = tables.words_table(results), tables.checks_table(results)
    if words or checks:
        pictures = (_words_picture(results),) if words else ()
        found.append(Section("attacks", "Attacks", pictures, tuple(table for table in (words, checks) if table)))
    calibration = tables.calibration_table(results)
    if calibration:
        found.append(Section("calibration", calibration.title, tables=(calibration,)))
    return found


def _kind(results: Results, variant: Variant) -> str:
    return kind_of(results["cells"][variant.models[0]][variant.suite])


# ---- charts ----


def _styles(results: Results) -> dict[str, int]:
    """The colour and marker of each network, the same in all charts."""
    return {model: number for number, model in enumerate(results["models"])}


def _said(values: Mapping[str, float | None], digits: int = 1) -> str:
    """Every network's number in words: the text alternative of charts."""
    return ", ".join(f"{title} {number_text(value, digits)}" for title, value in values.items())


def _gains_picture(results: Results) -> Picture | None:
    """What every network gains over the first on each suite, with its interval; None for a single one."""
    titles, styles, axes = tables.titles_of(results), _styles(results), axes_of(results)
    first, *others = titles
    judged = {other: [axis for axis, _ in comparison.judged_axes(axes, other, first)] for other in others}
    rows = [axis for axis in axes if any(axis in own for own in judged.values())]
    if not rows:
        return None
    series = [
        charts.Series(titles[other], styles[other], tuple(_gain(axis, other, first, rows.index(axis)) for axis in own))
        for other, own in judged.items()
        if own
    ]
    sizes = {pixels_text(facts["size"]) for facts in results["models"].values()}
    known = f", {sizes.pop()} px" if len(sizes) == 1 else ""  # of all, as the table below says
    names = [_short(axis).replace(known, "") for axis in rows]
    who = series[0].label if len(series) == 1 else "each network"
    caption = (
        f"What {who} gains over {titles[first]} (zero), in points of the table below, shape bias in hundredths. "
        "Right of zero is better. Bars: 95 % intervals."
    )
    alt = f"Dot plot of the differences to {titles[first]} with their intervals; the table below holds the numbers."
    png = charts.dot_plot(names, series, f"gain over {titles[first]}", zero=True)
    return Picture("gains.png", png, alt, caption)


def _short(axis: Axis) -> str:
    """An axis's title where there is little room."""
    title = re.sub(r" \((?:%|0–1)\)$", "", axis.title)
    return title.replace("mean corruption error", "mean error").replace(" of the words", "")


def _published_picture(results: Results) -> Picture | None:
    """Every network among the published rows; None where none of them may stand there."""
    titles, styles = tables.titles_of(results), _styles(results)
    axes = [axis for axis in axes_of(results) if axis.published in COLUMNS]
    columns = [key for key in COLUMNS if any(axis.published == key for axis in axes)]
    if not columns:
        return None
    series = [
        charts.Series(
            titles[model],
            styles[model],
            tuple(
                (axis.numbers[model].value, float(columns.index(axis.published)), 0.0)
                for axis in axes
                if model in axis.numbers
            ),
        )
        for model in titles
    ]
    others = tuple(
        (float(row.values[key]), float(number), 0.0)
        for number, key in enumerate(columns)
        for row in published_rows()
        if key in row.values
    )
    shown = [*(one for one in series if one.points), charts.Series("published", 6, others)]
    names = [re.sub(r" \(%\)(?= [↑↓])", "", COLUMNS[key]) for key in columns]
    return Picture(
        "published.png",
        charts.dot_plot(names, shown, "% (mCE: in units of AlexNet's error)"),
        "Dot plot of the networks among the published rows; the table of published rows holds the numbers.",
        "The networks among published ones; only whole official benchmarks have a row. ↑ more is better, ↓ less is.",
    )


def _gain(axis: Axis, model: str, first: str, row: int) -> charts.Point:
    """The difference in points, more is better; the longer half of its interval."""
    new, old = axis.numbers[model], axis.numbers[first]
    ends = interval(new, old)
    assert ends is not None, "judged axes have one"
    gap, scale = new.value - old.value, 100 if axis.key.endswith("/bias") else 1
    return axis.better * scale * gap, float(row), scale * max(ends[1] - gap, gap - ends[0])


def _overview(results: Results, variant: Variant, number: int) -> list[Picture]:
    """Dots by category and lines over severities."""
    titles, styles = tables.titles_of(results), _styles(results)
    scores = {model: scores_of(results, model, variant.suite) for model in variant.models}
    said = _said({titles[model]: mean_of(own) for model, own in scores.items()})
    rows = {model: {"mean of all": mean_of(own), **category_errors(own)} for model, own in scores.items()}
    kinds = [kind for kind in ("mean of all", *CATEGORIES) if any(kind in found for found in rows.values())]
    dots = [
        charts.Series(titles[m], styles[m], tuple((own[k], float(i), 0.0) for i, k in enumerate(kinds) if k in own))
        for m, own in rows.items()
    ]
    lines = [charts.Series(titles[m], styles[m], _over_severities(own)) for m, own in scores.items()]
    clean = any(own["clean"]["total"] for own in scores.values())
    return [
        Picture(
            f"{number}-categories.png",
            charts.dot_plot(kinds, dots, "error (%)"),
            f"Dot plot of the error by kind of corruption. Mean corruption error in percent: {said}.",
            "Error by kind of corruption, each averaged over severities. Further left is better.",
        ),
        Picture(
            f"{number}-severity.png",
            charts.severity_plot({"mean of the corruptions": lines}, "severity (0 = clean)" if clean else "severity"),
            f"Line plot of the error against severity. Mean corruption error in percent: {said}.",
            "Error against severity, averaged over corruptions.",
        ),
    ]


def _over_severities(scores: ModelScores) -> tuple[charts.Point, ...]:
    clean = [(0.0, error(scores["clean"]), 0.0)] if scores["clean"]["total"] else []
    return tuple(clean + [(float(severity), value, 0.0) for severity, value in severity_means(scores).items()])


def _heat_maps(results: Results, variant: Variant, number: int) -> list[Picture]:
    """A map of each network, and of what each differs by from the first."""
    titles = tables.titles_of(results)
    scores = {model: scores_of(results, model, variant.suite) for model in variant.models}
    names = tables.corruption_names(scores)
    kinds = kinds_of(names)
    breaks = [i for i in range(1, len(names)) if kinds[names[i]] != kinds[names[i - 1]]]
    maps = {model: [[_cell(own, name, s) for s in SEVERITIES] for name in names] for model, own in scores.items()}
    first, *others = maps
    columns = [str(severity) for severity in SEVERITIES]
    found = []
    for model, values in maps.items():
        png = charts.heat_map(names, columns, values, breaks)
        alt = f"Heat map of the error of {titles[model]} by corruption and severity; report.csv holds the counts."
        caption = f"{titles[model]}: error in percent. Darker is worse."
        found.append(Picture(f"{number}-heat-{_slug(model)}.png", png, alt, caption))
    for model in others:
        gaps = [
            [None if new is None or old is None else new - old for new, old in zip(row, base, strict=True)]
            for row, base in zip(maps[model], maps[first], strict=True)
        ]
        png = charts.heat_map(names, columns, gaps, breaks, difference=True)
        what = f"{titles[model]} − {titles[first]}: difference of errors in points"
        caption = f"{what}. Green: {titles[model]} is better; brown: {titles[first]}."
        found.append(Picture(f"{number}-difference-{_slug(model)}.png", png, f"Heat map. {what}.", caption))
    return found


def _cell(scores: ModelScores, name: str, severity: int) -> float | None:
    count = scores["corruptions"].get(name, {}).get(str(severity))
    return None if count is None else error(count)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]


def _shape_pictures(results: Results) -> list[Picture]:
    titles, styles = tables.titles_of(results), _styles(results)
    found = []
    for number, variant in enumerate((one for one in variants(results) if _kind(results, one) == "shape"), 1):
        series, notes, said = [], [], {}
        for model in variant.models:
            cues = cues_of(results["cells"][model][variant.suite][""])
            bias = shape_share(cues)
            if bias is not None:
                said[titles[model]] = bias
                series.append(charts.Series(titles[model], styles[model], ((bias, 0.0, 0.0),)))
                notes.append(f"coverage {100 * coverage(cues):.0f} %")
        if series:
            alt = f"Shape bias from 0 (texture) to 1 (shape): {_said(said, 2)}."
            caption = (
                f"{variant.title}: pictures whose shape and texture belong to different classes. Shape answers among "
                "shape and texture answers; coverage is the share of pictures answered with either."
            )
            found.append(Picture(f"shape-bias-{number}.png", charts.shape_plot(series, notes), alt, caption))
    return found


def _words_picture(results: Results) -> Picture:
    """Accuracy against the share of changed words, a panel a kind of attack."""
    titles, styles = tables.titles_of(results), _styles(results)
    panels = {}
    for variant in (one for one in variants(results) if _kind(results, one) == "words"):
        panels[variant.title] = [
            charts.Series(
                titles[model],
                styles[model],
                tuple(
                    (100 * float(share), accuracy(count), 0.0)
                    for share, count in sorted(
                        results["cells"][model][variant.suite].items(), key=lambda item: float(item[0])
                    )
                ),
            )
            for model in variant.models
        ]
    last = {f"{one.label}, {title}": one.points[-1][1] for title, own in panels.items() for one in own}
    return Picture(
        "words.png",
        charts.severity_plot(panels, "visual words changed, up to (%)", "accuracy (%)"),
        f"Line plots of the accuracy against the share of changed words. At the largest, in percent: {_said(last)}.",
        "Accuracy when up to so many of a picture's visual words are changed. Higher is better.",
    )


# ---- examples ----


def _example(results: Results, example: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A picture on which the networks differ, for the template; one that is no PNG in `folder` is called missing."""
    titles = tables.titles_of(results)
    where = ", ".join(
        filter(None, (example["suite"], str(example["cell"]).replace("/", ", severity ").replace("_", " ")))
    )
    pictures, lacking = [], []
    for key, alt in (("file", f"{example['label']}, {where}"), ("words", "its visual words")):
        if file := example.get(key):
            path = (folder / file).resolve()
            png = path.read_bytes() if path.is_relative_to(folder.resolve()) and path.is_file() else b""
            if png.startswith(PNG_SIGNATURE):
                pictures.append(Picture(path.name, png, alt, alt))
            else:
                lacking.append(file)
    answers = [
        f"{'✓' if answer == example['label'] else '✗'} {titles.get(model, model)}: {answer}"
        for model, answer in example["answers"].items()
    ]
    return {"label": example["label"], "where": where, "answers": answers, "pictures": pictures, "lacking": lacking}


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the report again from a folder's results.json; returns the exit code."""
    about = "Make report.html, report.md, report.tex and report.csv from the results.json of an evaluation."
    parser = argparse.ArgumentParser(prog="python -m mae_dat.scorecard", description=about)
    parser.add_argument("folder", type=Path, help="holds results.json; the report is written there")
    options = parser.parse_args(arguments)
    try:
        print(write_report(read_results(options.folder / "results.json"), options.folder))
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return fault.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
