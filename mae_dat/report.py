"""The report of a run: report.html, one self-contained page; figures/*.png; results.json with the exact counts.

`python -m mae_dat.report OUTPUT_DIR` makes the page again from results.json. The same results give the same page.
"""

import argparse
import base64
import json
import logging
import math
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mae_dat import charts, findings
from mae_dat.corruptions import CATEGORIES, CORRUPTIONS, EXTRA, SEVERITIES, SOURCE
from mae_dat.errors import DataError, UserError
from mae_dat.files import atomic_write, prepare_output_folder, require_file
from mae_dat.findings import Gallery, Group, Pretraining, Results, Run
from mae_dat.scores import Stat, corruption_error, error, severity_errors

__all__ = ["Gallery", "Pretraining", "Results", "Run", "read_results", "render", "write_report"]

logger = logging.getLogger(__name__)

TEMPLATE = "report.html.j2"
CURVE_TITLES = {
    "train_loss": "training loss",
    "test_loss": "test loss",
    "test_acc1": "test accuracy (%)",
    "test_acc5": "test top-5 accuracy (%)",
    "changed_words": "changed words (%)",
    "lr": "learning rate",
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """One figure of the page; `png` is also written to figures/`name`."""

    name: str
    png: bytes
    alt: str
    caption: str

    @property
    def uri(self) -> str:
        """The picture itself, as an address that needs no network."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()

    @property
    def width(self) -> int:
        """Width in CSS pixels, from the PNG header: charts are drawn at twice the density."""
        pixels: int = struct.unpack(">I", self.png[16:20])[0]
        return round(pixels / charts.DENSITY)


def _series(group: Group, points: Sequence[tuple[float, Stat | None]]) -> charts.Series:
    """(x, statistic) pairs -> a line of means with error bars."""
    return charts.Series(group.label, group.style, tuple((x, s.mean, s.spread) for x, s in points if s is not None))


def _said(groups: Sequence[Group], key: str) -> str:
    """One headline number of every model, in words: the text alternative of charts."""
    column = next(column for column in findings.COLUMNS if column.key == key)
    stats = {group.label: group.stat(column.value) for group in groups}
    return ", ".join(f"{label} {stat.text(column.digits)}" for label, stat in stats.items() if stat is not None)


def _category_picture(groups: Sequence[Group]) -> Picture:
    columns = [c for c in findings.COLUMNS if c.key in ("mean", *CATEGORIES) and any(g.stat(c.value) for g in groups)]
    series = []
    for group in groups:
        found = [(row, group.stat(column.value)) for row, column in enumerate(columns)]
        points = tuple((stat.mean, float(row), stat.spread) for row, stat in found if stat is not None)
        series.append(charts.Series(group.label, group.style, points))
    rows = ["mean of all" if column.key == "mean" else column.title for column in columns]
    alt = f"Dot plot of the error by kind of corruption. Mean corruption error in percent: {_said(groups, 'mean')}."
    caption = "Error by kind of corruption, each corruption averaged over severities. Further left is better."
    return Picture("categories.png", charts.dot_plot(rows, series, "error (%)"), alt, caption)


def _by_severity(group: Group, names: Sequence[str]) -> charts.Series:
    """Error against severity over `names`, starting with the clean error at severity 0."""
    points = [(0, group.stat(lambda run: error(run["clean"])))]
    points += [(s, group.stat(partial(_severity_error, names, s))) for s in SEVERITIES]
    return _series(group, points)


def _severity_pictures(groups: Sequence[Group]) -> list[Picture]:
    overall = charts.severity_plot({"mean of the corruptions": [_by_severity(group, CORRUPTIONS) for group in groups]})
    panels = {kind: [_by_severity(group, names) for group in groups] for kind, names in CATEGORIES.items()}
    said = "; ".join(
        f"{one.label} " + ", ".join(f"{y:.1f} at {x:.0f}" for x, y, _ in one.points)
        for one in (_by_severity(group, CORRUPTIONS) for group in groups)
    )
    alt = f"Line plot of the error in percent against severity. {said}."
    return [
        Picture("severity.png", overall, alt, "Error against severity, averaged over the corruptions measured."),
        Picture(
            "severity-categories.png",
            charts.severity_plot(panels),
            "Four line plots of the error against severity, for noise, blur, weather and digital corruptions.",
            "The same by kind of corruption.",
        ),
    ]


def _measured(groups: Sequence[Group]) -> list[str]:
    """Corruptions that any run has, in the usual order."""
    present = {name for group in groups for run in group.runs for name in run["corruptions"]}
    return [name for name in CORRUPTIONS + EXTRA if name in present] + sorted(present - {*CORRUPTIONS, *EXTRA})


def _breaks(names: Sequence[str]) -> list[int]:
    """Rows at which another category begins."""
    kind = {name: category for category, members in CATEGORIES.items() for name in members}
    return [i for i in range(1, len(names)) if kind.get(names[i]) != kind.get(names[i - 1])]


def _cell_stat(group: Group, name: str, severity: int) -> Stat | None:
    """Error in percent of one corruption at one severity, over seeds."""
    counts = (run["corruptions"].get(name, {}).get(str(severity)) for run in group.runs)
    return Stat.of(None if count is None else error(count) for count in counts)


def _heat_picture(group: Group, names: Sequence[str]) -> Picture:
    stats = [[_cell_stat(group, name, severity) for severity in SEVERITIES] for name in names]
    values = [[None if stat is None else stat.mean for stat in row] for row in stats]
    png = charts.heat_map(names, [str(s) for s in SEVERITIES], values, _breaks(names))
    slug = re.sub(r"[^a-z0-9]+", "-", group.name.lower()).strip("-")[:40]
    alt = f"Heat map of the error of {group.label} by corruption and severity; the exact counts are in a table below."
    return Picture(f"heat-{group.style + 1}-{slug}.png", png, alt, f"{group.label}: error in percent. Darker is worse.")


def _shape_picture(groups: Sequence[Group]) -> Picture | None:
    chosen = [(group, group.stat(findings.bias_or_none), group.stat(findings.coverage_or_none)) for group in groups]
    known = [(group, bias, share) for group, bias, share in chosen if bias is not None and share is not None]
    if not known:
        return None
    series = [_series_of_bias(group, bias) for group, bias, _ in known]
    png = charts.shape_plot(series, [f"coverage {share.mean:.0f} %" for _, _, share in known])
    alt = f"Shape bias from 0 (texture) to 1 (shape): {_said([group for group, _, _ in known], 'shape')}."
    caption = (
        "Pictures whose shape and texture belong to different classes: shape answers among shape and texture answers. "
        "Coverage is the share of pictures answered with either of the two."
    )
    return Picture("shape-bias.png", png, alt, caption)


def _series_of_bias(group: Group, bias: Stat) -> charts.Series:
    return charts.Series(group.label, group.style, ((bias.mean, 0.0, bias.spread),))


def _curve_points(curve: findings.Curve, key: str) -> tuple[charts.Point, ...]:
    scale = 100 if key == "changed_words" else 1
    return tuple((epoch, scale * value, 0.0) for epoch, value in curve if epoch is not None and value is not None)


def _curve_pictures(groups: Sequence[Group]) -> list[Picture]:
    """One chart a curve, all models and seeds in it."""
    keys = dict.fromkeys(key for group in groups for run in group.runs for key in run.get("curves", {}))
    pictures = []
    for number, key in enumerate(sorted(keys, key=lambda key: [*CURVE_TITLES, key].index(key)), 1):
        series = [
            charts.Series(group.label, group.style, _curve_points(run["curves"][key], key))
            for group in groups
            for run in group.runs
            if run.get("curves", {}).get(key)
        ]
        if series:
            title = CURVE_TITLES.get(key, key)
            alt = f"Line plot of the {title} over epochs of fine-tuning."
            caption = f"Fine-tuning: {title}; one line for each seed."
            pictures.append(Picture(f"curve-{number}.png", charts.curve_plot(series, title), alt, caption))
    return pictures


def _pretraining_pictures(results: Results) -> list[Picture]:
    pictures = []
    curves = results["pretraining"]["curves"] if "pretraining" in results else {}
    for number, (key, curve) in enumerate(curves.items(), 1):
        points = _curve_points(curve, key)
        if points:
            title = CURVE_TITLES.get(key, key)
            png = charts.curve_plot([charts.Series("pretraining", 6, points)], title)
            alt = f"Line plot of the {title} of pretraining, from {points[0][1]:.3f} to {points[-1][1]:.3f}."
            pictures.append(Picture(f"pretraining-{number}.png", png, alt, f"Pretraining: {title}."))
    return pictures


def _gallery(gallery: Gallery, number: int, folder: Path) -> dict[str, Any]:
    """A gallery for the template; one whose file is missing, no PNG or outside `folder` is shown as missing."""
    path = (folder / gallery["file"]).resolve()
    png = path.read_bytes() if path.is_relative_to(folder.resolve()) and path.is_file() else b""
    if not png.startswith(PNG_SIGNATURE):
        logger.warning("gallery picture %s is missing or no PNG inside %s: left out", gallery["file"], folder)
        return {**gallery, "picture": None}
    return {**gallery, "picture": Picture(f"gallery-{number}", png, gallery["caption"], gallery["caption"])}


def _corruption_error(name: str, run: Run) -> float | None:
    """Error of one corruption averaged over severities, None if it was not measured."""
    cells = run["corruptions"].get(name)
    return corruption_error(cells) if cells else None


def _severity_error(names: Sequence[str], severity: int, run: Run) -> float | None:
    return severity_errors(run, names).get(severity)


def _corruption_rows(groups: Sequence[Group], names: Sequence[str]) -> list[dict[str, Any]]:
    """The full table: error of each corruption averaged over severities, a cell for each group."""
    rows = []
    for name in names:
        stats = [group.stat(partial(_corruption_error, name)) for group in groups]
        kind = next((kind for kind, members in CATEGORIES.items() if name in members), "hold-out")
        rows.append({"name": name, "kind": kind, "cells": ["–" if stat is None else stat.text() for stat in stats]})
    return rows


def _pictures(results: Results, groups: Sequence[Group], names: Sequence[str]) -> dict[str, list[Picture]]:
    """All charts by section of the page."""
    counted = any(group.stat(findings.mean_error_or_none) for group in groups)
    shape = _shape_picture(groups)
    return {
        "overview": [_category_picture(groups), *_severity_pictures(groups)] if counted else [],
        "heat": [_heat_picture(group, names) for group in groups] if names else [],
        "shape": [shape] if shape else [],
        "curves": [*_pretraining_pictures(results), *_curve_pictures(groups)],
    }


def _finite(value: Any) -> Any:
    """The value as JSON knows it: what is not finite becomes null, keys become text, unknown objects their text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _build(results: Results, folder: Path) -> tuple[str, list[Picture]]:
    """The page and its charts."""
    groups = findings.group_runs(results["models"])
    names = _measured(groups)
    pictures = _pictures(results, groups, names)
    columns, rows = findings.headline(groups)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template(TEMPLATE).render(
        results=results,
        groups=groups,
        summary=findings.summary(groups),
        caution=findings.caution(groups),
        columns=columns,
        rows=rows,
        pictures=pictures,
        names=names,
        severities=SEVERITIES,
        table=_corruption_rows(groups, names),
        galleries=[_gallery(gallery, i, folder) for i, gallery in enumerate(results["galleries"])],
        not_measured=findings.not_measured(results, groups),
        comparable=findings.comparable(groups),
        source=SOURCE,
    )
    return page, [picture for section in pictures.values() for picture in section]


def render(results: Results, output_dir: Path = Path()) -> str:
    """The page as text. `output_dir` is where the galleries' files are. Raises DataError, naming a missing key."""
    clean = check_results(_finite(results), "results")
    return _build(clean, output_dir)[0]


def write_report(results: Results, output_dir: Path) -> Path:
    """Write results.json, figures/*.png and report.html, each atomically, and return the path of the page.

    The numbers are stored first, so that they survive whatever happens to the page. Raises DataError (a missing key),
    OutputError or StorageError.
    """
    clean = check_results(_finite(results), "results")
    prepare_output_folder(output_dir / "figures")
    _write(output_dir / "results.json", json.dumps(clean, indent=1, allow_nan=False).encode() + b"\n")
    page, pictures = _build(clean, output_dir)
    for picture in pictures:
        _write(output_dir / "figures" / picture.name, picture.png)
    _write(output_dir / "report.html", page.encode())
    return output_dir / "report.html"


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def check_results(results: Any, where: str) -> Results:
    """Return `results` if it has the keys of the schema; DataError otherwise, naming what is missing in `where`."""
    _require(results, Results.__required_keys__, where)
    for number, run in enumerate(results["models"]):
        _require(run, Run.__required_keys__, f"{where}, models[{number}]")
    return cast(Results, results)


def _require(mapping: Any, keys: frozenset[str], where: str) -> None:
    missing = sorted(keys - set(mapping)) if isinstance(mapping, Mapping) else sorted(keys)
    if missing:
        raise DataError(f"{where}: {', '.join(missing)} missing; make the results again with this version of mae_dat")


def read_results(path: Path) -> Results:
    """Read results.json. Raises MissingInputError (no such file) and DataError (damaged, or of another schema)."""
    require_file(path, "results to report")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise DataError(f"{path}: not valid JSON ({fault}); run the evaluation again") from fault
    return check_results(results, str(path))


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the page again from a folder's results.json; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mae_dat.report", description="Make report.html from results.json.")
    parser.add_argument("output_dir", type=Path, help="folder that holds results.json; the page is written there")
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="print the headline table and the differences at the same seed as Markdown instead",
    )
    options = parser.parse_args(arguments)
    try:
        results = read_results(options.output_dir / "results.json")
        if options.markdown:
            groups = findings.group_runs(results["models"])
            print(findings.markdown(groups) + "\n\n" + findings.paired_markdown(groups))
        else:
            print(write_report(results, options.output_dir))
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return fault.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
