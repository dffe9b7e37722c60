"""Charts as PNG bytes, from numbers and labels alone.

The colours are Okabe and Ito's, which colour-blind readers can distinguish; every series also has its own marker and
line style for black-and-white prints. An inch is 96 CSS pixels, and the PNG has twice as many pixels. Charts are narrow
enough for a phone, and the page puts them side by side on a wide screen.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mae_dat.config.terminal import printable

CSS_PIXELS_PER_INCH = 96
DENSITY = 2
WIDTH = 5.0  # inches
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
GREY = "#5f6368"
LONGEST_LABEL = 26  # characters; longer labels would push the legend out of the image

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.labelsize": 10.5,
    "legend.fontsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": "#dadce0",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "legend.frameon": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
}

Point = tuple[float, float, float | tuple[float, float]]
"""x, y, half the length of the error bar (0: none), or its lengths below and above."""


@dataclass(frozen=True)
class Series:
    """The points of one model or group in a chart."""

    label: str
    style: int
    """Number of its colour, marker and line style, the same in all charts."""
    points: tuple[Point, ...]


def _plain(text: str) -> str:
    """Shorten a label and escape it for matplotlib, which reads `$` as mathematics and rejects what is no Unicode."""
    text = printable(text)
    short = text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"
    return short.replace("$", r"\$")


def signed(value: float, digits: int) -> str:
    """Format a difference as '+1.2' or '−0.3', and as '0.0' if it rounds to zero."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def _figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), dpi=CSS_PIXELS_PER_INCH * DENSITY, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    """Return the figure as PNG, without date and version, so that the same numbers give the same bytes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A label may be in a script that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _legend(figure: Figure, axes: Axes, count: int, across: int = 3) -> None:
    """Draw one legend of up to `across` columns above the axes, where it covers no data; none for a single series."""
    handles, labels = axes.get_legend_handles_labels()
    if count > 1:
        figure.legend(
            handles, labels, loc="outside upper center", ncols=min(across, count), handlelength=2.4, columnspacing=1.2
        )


def _style(series: Series) -> dict[str, Any]:
    """Return the colour, marker and line style of a series."""
    style = series.style
    turn = style // len(COLORS)  # when the colours repeat, they get another marker and line style
    return {
        "color": COLORS[style % len(COLORS)],
        "marker": MARKERS[(style + turn) % len(MARKERS)],
        "linestyle": LINES[(style + turn) % len(LINES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "label": _plain(series.label),
    }


def bar_lengths(points: Sequence[Point]) -> list[list[float]] | None:
    """Return the lengths of the error bars below and above the points; None if there are none."""
    bars = [(bar, bar) if isinstance(bar, int | float) else bar for _, _, bar in points]
    return [[low for low, _ in bars], [high for _, high in bars]] if any(map(any, bars)) else None


def _draw_line(axes: Axes, series: Series, markers: bool = True) -> None:
    """Draw a line with markers, and with error bars if there is a spread."""
    if not series.points:
        return
    x, y, _ = zip(*series.points, strict=True)
    style = _style(series)
    if not markers:
        style["markevery"] = max(1, len(x) // 6)
    axes.errorbar(x, y, yerr=bar_lengths(series.points), capsize=3, elinewidth=1.2, **style)


@rc_context(STYLE)
def dot_plot(
    rows: Sequence[str], series: Sequence[Series], xlabel: str, zero: bool = False, log: bool = False
) -> bytes:
    """Draw rows from top to bottom with a dot for each series; a point is (value, row number, half error bar).

    `zero` draws a line at 0, for differences. `log` makes the axis logarithmic, which leaves out values up to 0.
    """
    figure = _figure(1.2 + 0.16 * len(rows) * (1.6 + len(series)))
    axes = figure.subplots()
    if zero:
        axes.axvline(0, color=GREY, linewidth=1)
    step = 0.68 / max(1, len(series))
    for number, line in enumerate(series):
        shift = (number - (len(series) - 1) / 2) * step  # the dots of a row do not cover each other
        style = _style(line) | {"linestyle": "none"}
        x, y, _ = zip(*line.points, strict=True) if line.points else ((), (), ())
        heights = [row + shift for row in y]
        axes.errorbar(x, heights, xerr=bar_lengths(line.points), capsize=3, elinewidth=1.2, **style)
    axes.set_yticks(range(len(rows)), [_plain(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for edge in range(1, len(rows)):
        axes.axhline(edge - 0.5, color="#dadce0", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.margins(x=0.08)
    if log:
        axes.set_xscale("log", nonpositive="mask")
    axes.set_xlabel(xlabel)
    _legend(figure, axes, len(series))
    return _png(figure)


@rc_context(STYLE)
def severity_plot(
    panels: Mapping[str, Sequence[Series]], xlabel: str = "severity (0 = clean)", ylabel: str = "error (%)"
) -> bytes:
    """Draw the error against severity in a small panel for each title, all on one scale; severity 0 is the clean image.

    With other labels it plots something else against a strength.
    """
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    figure = _figure(4.2 if rows == 1 else 0.6 + 2.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, series) in zip(grid.flat, panels.items(), strict=False):
        for line in series:
            _draw_line(axes, line)
        axes.set_title(_plain(title))
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.supxlabel(xlabel, fontsize=STYLE["axes.labelsize"])
    figure.supylabel(ylabel, fontsize=STYLE["axes.labelsize"])
    _legend(figure, grid.flat[0], len(next(iter(panels.values()))))
    return _png(figure)


@rc_context(STYLE)
def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    breaks: Sequence[int],
    difference: bool = False,
) -> bytes:
    """Draw errors in percent as rows x columns of numbers; None is an empty cell, and `breaks` are rows below a gap.

    `difference` is for differences of errors, drawn with a sign: green is less, brown is more.
    """
    figure = _figure(0.75 + 0.3 * len(rows))
    axes = figure.subplots()
    filled = [[math.nan if value is None else value for value in row] for row in values]
    largest = max([abs(value) for row in values for value in row if value is not None] + [1.0])
    low, high, colors = (-largest, largest, "BrBG_r") if difference else (0, 100, "Blues")
    axes.imshow(filled, cmap=colors, vmin=low, vmax=high, aspect="auto")
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            text = "–" if value is None else signed(value, 1) if difference else f"{value:.1f}"
            dark = abs(value or 0) > 0.62 * high
            axes.text(c, r, text, ha="center", va="center", color="white" if dark else "black")
    for edge in breaks:
        axes.axhline(edge - 0.5, color="white", linewidth=4)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), [_plain(row.replace("_", " ")) for row in rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("severity")
    return _png(figure)


@rc_context(STYLE)
def matrix_plot(rows: Sequence[str], columns: Sequence[str], shares: Sequence[Sequence[float]]) -> bytes:
    """Draw a confusion matrix, rows x columns of shares in percent."""
    figure = _figure(1.4 + 0.24 * len(rows))
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), [_plain(column) for column in columns], rotation=60, ha="right")
    axes.set_yticks(range(len(rows)), [_plain(row) for row in rows])
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted")
    return _png(figure)


@rc_context(STYLE)
def reliability_plot(series: Sequence[Series]) -> bytes:
    """Draw accuracy against confidence, both in percent, and the diagonal."""
    figure = _figure(4.4)
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle=(0, (4, 4)))
    for line in series:
        _draw_line(axes, line)
    axes.set_xlim(0, 102)
    axes.set_ylim(0, 102)
    axes.set_xlabel("confidence (%)")
    axes.set_ylabel("accuracy (%)")
    axes.grid(axis="both")
    _legend(figure, axes, len(series))
    return _png(figure)


@rc_context(STYLE)
def curve_plot(series: Sequence[Series], ylabel: str, xlabel: str = "epoch") -> bytes:
    """Draw lines over epochs; several runs of one group share its style and appear once in the legend."""
    figure = _figure(3.2)
    axes = figure.subplots()
    labels: set[str] = set()
    for line in series:
        # Matplotlib's legend ignores labels that start with an underscore.
        label = line.label if line.label not in labels else "_again"
        labels.add(line.label)
        _draw_line(axes, Series(label, line.style, line.points), markers=False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    axes.margins(x=0.03)
    _legend(figure, axes, len(labels))
    return _png(figure)


@rc_context(STYLE)
def shape_plot(series: Sequence[Series], notes: Sequence[str]) -> bytes:
    """Draw the shape bias from 0 (texture alone) to 1 (shape alone), a row for each series, with a note such as the
    coverage under its name."""
    figure = _figure(1.1 + 0.55 * len(series))
    axes = figure.subplots()
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    for row, line in enumerate(series):
        for point in line.points:
            x, bars = point[0], bar_lengths([point])
            style = _style(line) | {"linestyle": "none"}
            axes.errorbar([x], [row], xerr=bars, capsize=3, **style)
            right = x < 0.8
            below, above = (bars[0][0], bars[1][0]) if bars else (0.0, 0.0)
            offset = above + 0.03 if right else -below - 0.03
            axes.text(x + offset, row, f"{x:.2f}", va="center", ha="left" if right else "right")
    names = [f"{_plain(line.label)}\n{note}" for line, note in zip(series, notes, strict=True)]
    axes.set_yticks(range(len(series)), names)
    axes.set_ylim(len(series) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\ntexture", "0.25", "0.5", "0.75", "1\nshape"])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("shape bias")
    return _png(figure)


@rc_context(STYLE)
def spectrum_plot(series: Sequence[Series], ylabel: str, xlabel: str) -> bytes:
    """Draw lines over a frequency, on a logarithmic axis of values above 0."""
    figure = _figure(4.2)
    axes = figure.subplots()
    for line in series:
        _draw_line(axes, line, markers=False)
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    axes.margins(x=0.03)
    _legend(figure, axes, len(series), across=2)
    return _png(figure)
