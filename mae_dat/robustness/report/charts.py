"""Charts of the report, as PNG bytes. They know nothing of results: numbers and labels come in, a picture goes out.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every series also has its own marker and line
style, so the charts survive a black-and-white printer. 96 CSS pixels are one inch, and the density is twice that.
Charts are narrow (a phone shows them nearly at full size) and stand side by side on a wide screen.
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

CSS_PIXELS_PER_INCH = 96
DENSITY = 2
WIDTH = 5.0  # inches
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
GREY = "#5f6368"
LONGEST_LABEL = 26  # characters; longer ones would push the legend out of the picture

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

Point = tuple[float, float, float]  # x, y, half the length of the error bar (0: none)


@dataclass(frozen=True)
class Series:
    """One model in one chart; `style` numbers its colour, marker and line style and is the same in all charts."""

    label: str
    style: int
    points: tuple[Point, ...]


def _plain(text: str) -> str:
    """Text for matplotlib: no mathematics, no endless label."""
    short = text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"
    return short.replace("$", r"\$")


def signed(value: float, digits: int) -> str:
    """'+1.2', '−0.3', and '0.0' for what rounds to it."""
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def _figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), dpi=CSS_PIXELS_PER_INCH * DENSITY, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    """The same bytes for the same numbers: no date, no version inside."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from", category=UserWarning
        )  # a label in a script without font
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _legend(figure: Figure, axes: Axes, count: int, across: int = 3) -> None:
    """One legend above the axes, where it covers no data, of `across` columns; nothing for a single series."""
    handles, labels = axes.get_legend_handles_labels()
    if count > 1:
        figure.legend(
            handles, labels, loc="outside upper center", ncols=min(across, count), handlelength=2.4, columnspacing=1.2
        )


def _look(series: Series) -> dict[str, Any]:
    """Colour, marker and line of a series."""
    i = series.style
    turn = i // len(COLORS)  # when colours come again, with another marker and line
    return {
        "color": COLORS[i % len(COLORS)],
        "marker": MARKERS[(i + turn) % len(MARKERS)],
        "linestyle": LINES[(i + turn) % len(LINES)],
        "markeredgecolor": "white",
        "markeredgewidth": 0.7,
        "label": _plain(series.label),
    }


def _draw_line(axes: Axes, series: Series, markers: bool = True) -> None:
    """A line with markers, and error bars where there is a spread."""
    if not series.points:
        return
    x, y, bar = zip(*series.points, strict=True)
    look = _look(series)
    if not markers:
        look["markevery"] = max(1, len(x) // 6)
    axes.errorbar(x, y, yerr=bar if any(bar) else None, capsize=3, elinewidth=1.2, **look)


@rc_context(STYLE)
def dot_plot(
    rows: Sequence[str], series: Sequence[Series], xlabel: str, zero: bool = False, log: bool = False
) -> bytes:
    """Rows from top to bottom, one dot a series; a point is (value, row number, half error bar). `zero`: a line there,
    for differences. `log`: a logarithmic axis, for values above 0; others are left out.
    """
    figure = _figure(1.2 + 0.16 * len(rows) * (1.6 + len(series)))
    axes = figure.subplots()
    if zero:
        axes.axvline(0, color=GREY, linewidth=1)
    step = 0.68 / max(1, len(series))
    for i, one in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * step
        look = _look(one) | {"linestyle": "none"}
        x, y, bar = zip(*one.points, strict=True) if one.points else ((), (), ())
        heights = [row + shift for row in y]
        axes.errorbar(x, heights, xerr=bar if any(bar) else None, capsize=3, elinewidth=1.2, **look)
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
    """Error against severity, one small panel a title, all on one scale; severity 0 is the clean image. Other labels
    make it a plot of something else against a strength."""
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    figure = _figure(4.2 if rows == 1 else 0.6 + 2.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, series) in zip(grid.flat, panels.items(), strict=False):
        for one in series:
            _draw_line(axes, one)
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
    """Error in percent, rows x columns with numbers; None is an empty cell. A gap is drawn above each row in
    `breaks`. `difference`: of two errors, with a sign; green is less, brown is more.
    """
    figure = _figure(0.75 + 0.3 * len(rows))
    axes = figure.subplots()
    cells = [[math.nan if value is None else value for value in row] for row in values]
    largest = max([abs(value) for row in values for value in row if value is not None] + [1.0])
    low, high, colors = (-largest, largest, "BrBG_r") if difference else (0, 100, "Blues")
    axes.imshow(cells, cmap=colors, vmin=low, vmax=high, aspect="auto")
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
def curve_plot(series: Sequence[Series], ylabel: str, xlabel: str = "epoch") -> bytes:
    """Lines over epochs; several runs of one model share its style and appear once in the legend."""
    figure = _figure(3.2)
    axes = figure.subplots()
    seen: set[str] = set()
    for one in series:
        label = one.label if one.label not in seen else "_again"  # matplotlib leaves labels with an underscore out
        seen.add(one.label)
        _draw_line(axes, Series(label, one.style, one.points), markers=False)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y")
    axes.margins(x=0.03)
    _legend(figure, axes, len(seen))
    return _png(figure)


@rc_context(STYLE)
def shape_plot(series: Sequence[Series], notes: Sequence[str]) -> bytes:
    """Shape bias from 0 (texture alone) to 1 (shape alone), one row a model; a note such as the coverage stands under
    each name.
    """
    figure = _figure(1.1 + 0.55 * len(series))
    axes = figure.subplots()
    axes.axvline(0.5, color=GREY, linewidth=1, linestyle=(0, (2, 3)))
    for row, one in enumerate(series):
        for x, _, bar in one.points:
            look = _look(one) | {"linestyle": "none"}
            axes.errorbar([x], [row], xerr=[bar] if bar else None, capsize=3, **look)
            right = x < 0.8
            offset = bar + 0.03 if right else -bar - 0.03
            axes.text(x + offset, row, f"{x:.2f}", va="center", ha="left" if right else "right")
    names = [f"{_plain(one.label)}\n{note}" for one, note in zip(series, notes, strict=True)]
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
    """Lines over a frequency; values above 0 on a logarithmic axis."""
    figure = _figure(4.2)
    axes = figure.subplots()
    for one in series:
        _draw_line(axes, one, markers=False)
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y")
    axes.margins(x=0.03)
    _legend(figure, axes, len(series), across=2)
    return _png(figure)
