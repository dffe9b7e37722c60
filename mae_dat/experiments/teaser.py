"""One picture of a report: how a network's error differs from another's by corruption and severity, and pictures that
only one of them has right, with their words.

`python -m mae_dat.teaser OUT PICTURE.png` draws it from an evaluation's folder; README's first picture is the demo's.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import run_command
from mae_dat.robustness.corruptions import SEVERITIES
from mae_dat.robustness.report.charts import COLORS, LINES, MARKERS, STYLE, signed
from mae_dat.robustness.report.corruption_figures import corruption_rows, error_grid, grid_difference
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.scores.results import Results, read_results
from mae_dat.storage.files import atomic_write

SIZE, DENSITY, PAIRS = (10.6, 4.2), 120, 4  # inches, pixels an inch, pictures beside their words
GREYS = 128
"""Colours of the file: half of what PNG's palette can hold, which no one sees."""


def draw(folder: Path, path: Path) -> None:
    """Writes the picture of the last arm against the first as PNG.

    Raises MissingInputError, CheckpointError (no results), ConfigError for results without corruptions of two arms.
    """
    results = read_results(folder / "results.json")
    report = summarize(results)
    arms, corrupted = report.groups, report.of_kind("corruptions")
    if len(arms) < 2 or not corrupted:
        raise ConfigError(f"{folder} holds no two networks measured on corruptions.")
    first, last = arms[0], arms[-1]
    names, breaks = corruption_rows(corrupted[0])
    old, new = (np.array(error_grid(corrupted[0], arm), float) for arm in (first, last))
    with rc_context(STYLE | {"font.size": 9.5}):
        figure = Figure(figsize=SIZE, dpi=DENSITY, layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(figure)
        lines, map_, shown = figure.subplots(1, 3, width_ratios=(3, 3, 3.4))
        _lines(lines, (first, last), np.stack([old, new]))
        _map(map_, names, breaks, np.array(grid_difference(new.tolist(), old.tolist()), float), (first, last))
        _examples(shown, results, folder)
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(GREYS, dither=Image.Dither.NONE)
    with atomic_write(path) as file:
        image.save(file, "PNG", optimize=True)


def _lines(axes: Axes, arms: tuple[Group, Group], errors: np.ndarray) -> None:
    """Accuracy against severity, mean of the corruptions. `errors`: (arms, corruptions, severities)."""
    for arm, own in zip(arms, errors, strict=True):
        look: dict[str, Any] = {"color": COLORS[arm.style], "marker": MARKERS[arm.style], "linestyle": LINES[arm.style]}
        axes.plot(SEVERITIES, 100 - np.nanmean(own, axis=0), label=arm.title, markeredgecolor="white", **look)
    axes.set_xlabel("severity")
    axes.set_title("accuracy, mean of the corruptions (%)")
    axes.grid(axis="y")
    axes.legend()


def _map(axes: Axes, names: list[str], breaks: list[int], gaps: np.ndarray, arms: tuple[Group, Group]) -> None:
    """Points of accuracy that the last arm gains on each corruption and severity: green, or loses: brown."""
    largest = max(1.0, float(np.nanmax(np.abs(gaps))))
    axes.imshow(-gaps, cmap="BrBG", vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), gap in np.ndenumerate(-gaps):
        color = "white" if abs(gap) > 0.62 * largest else "black"
        text = signed(gap, 0)
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    for edge in breaks:
        axes.axhline(edge - 0.5, color="white", linewidth=3)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8.5)
    axes.set_xticks(range(len(SEVERITIES)), list(map(str, SEVERITIES)))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("severity")
    axes.set_title(f"points gained, {arms[1].title} over {arms[0].title}")


def _examples(axes: Axes, results: Results, folder: Path) -> None:
    """Pictures that the networks answer differently, each beside what its visual words decode to."""
    axes.axis("off")
    known = [one for one in results["examples"] if "words" in one][:PAIRS]
    if not known:
        return
    axes.set_title("where they differ: the picture, its words")
    titles = {name: facts["title"].split(",")[0] for name, facts in results["models"].items()}
    for number, example in enumerate(known):
        top = 1 - number / PAIRS
        for column, key in enumerate(("file", "words")):
            own = axes.inset_axes((0.21 * column, top - 0.225, 0.2, 0.215))
            own.imshow(np.asarray(Image.open(folder / example[key]).convert("RGB")), interpolation="nearest")
            own.set_axis_off()
        said = [f"{example['label']}, {str(example['cell']).replace('_', ' ').replace('/', ' ')}".rstrip(", ")]
        said += [f"{'✓' if a == example['label'] else '✗'} {titles[n]}: {a}" for n, a in example["answers"].items()]
        axes.text(0.45, top - 0.12, "\n".join(said), va="center", fontsize=8.5, color="black")


def main() -> None:
    """Command line."""
    if len(sys.argv) != 3:
        raise ConfigError("give an evaluation's folder and the picture: python -m mae_dat.teaser OUT PICTURE.png")
    draw(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_command(main)
