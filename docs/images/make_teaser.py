"""Draw a report as one image: the differences between two networks by corruption and severity, and example images that
only one of them classifies correctly, with their words.

`python docs/images/make_teaser.py OUT IMAGE.png` draws it from an evaluation's folder; the README's first image is the
demo's.
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

SIZE, DENSITY = (10.6, 4.2), 120  # inches, pixels per inch
EXAMPLES = 4
COLORS_IN_FILE = 128  # half of PNG's palette, without a visible difference


def draw_teaser(folder: Path, path: Path) -> None:
    """Draw the last group of an evaluation against the first, as a PNG.

    Raises MissingInputError, CheckpointError (no results), ConfigError for results without corruptions of two groups.
    """
    results = read_results(folder / "results.json")
    report = summarize(results)
    corrupted = report.of_kind("corruptions")
    if len(report.groups) < 2 or not corrupted:
        raise ConfigError(f"{folder} holds no two networks measured on corruptions.")
    first, last = report.groups[0], report.groups[-1]
    names, breaks = corruption_rows(corrupted[0])
    errors = [np.array(error_grid(corrupted[0], group), float) for group in (first, last)]
    differences = np.array(grid_difference(errors[1].tolist(), errors[0].tolist()), float)
    with rc_context(STYLE | {"font.size": 9.5}):
        figure = Figure(figsize=SIZE, dpi=DENSITY, layout="constrained", facecolor="white")
        canvas = FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3, width_ratios=(3, 3, 3.4))
        _draw_accuracies(left, (first, last), np.stack(errors))
        _draw_differences(middle, names, breaks, differences, title=f"{last.title} over {first.title}")
        _draw_examples(right, results, folder)
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(COLORS_IN_FILE, dither=Image.Dither.NONE)
    with atomic_write(path) as file:
        image.save(file, "PNG", optimize=True)


def _draw_accuracies(axes: Axes, groups: tuple[Group, Group], errors: np.ndarray) -> None:
    """Draw accuracy against severity, mean of the corruptions. `errors`: (groups, corruptions, severities) in
    percent."""
    for group, group_errors in zip(groups, errors, strict=True):
        look: dict[str, Any] = {
            "color": COLORS[group.style],
            "marker": MARKERS[group.style],
            "linestyle": LINES[group.style],
        }
        accuracy = 100 - np.nanmean(group_errors, axis=0)
        axes.plot(SEVERITIES, accuracy, label=group.title, markeredgecolor="white", **look)
    axes.set_xlabel("severity")
    axes.set_title("accuracy, mean of the corruptions (%)")
    axes.grid(axis="y")
    axes.legend()


def _draw_differences(axes: Axes, names: list[str], breaks: list[int], differences: np.ndarray, title: str) -> None:
    """Draw the points of accuracy gained (green) or lost (brown) on each corruption and severity.

    `differences` are of errors, (corruptions, severities), in points.
    """
    largest = max(1.0, float(np.nanmax(np.abs(differences))))
    axes.imshow(-differences, cmap="BrBG", vmin=-largest, vmax=largest, aspect="auto")
    for (row, column), gain in np.ndenumerate(-differences):
        color = "white" if abs(gain) > 0.62 * largest else "black"
        axes.text(column, row, signed(gain, 0), ha="center", va="center", color=color, fontsize=8)
    for edge in breaks:
        axes.axhline(edge - 0.5, color="white", linewidth=3)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8.5)
    axes.set_xticks(range(len(SEVERITIES)), list(map(str, SEVERITIES)))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("severity")
    axes.set_title(f"points gained, {title}")


def _draw_examples(axes: Axes, results: Results, folder: Path) -> None:
    """Draw images that the networks classify differently, each beside what its visual words decode to."""
    axes.axis("off")
    examples = [example for example in results["examples"] if "words" in example][:EXAMPLES]
    if not examples:
        return
    axes.set_title("where they differ: the image, its words")
    titles = {name: facts["title"].split(",")[0] for name, facts in results["models"].items()}
    for index, example in enumerate(examples):
        top = 1 - index / EXAMPLES
        for column, key in enumerate(("file", "words")):
            inset = axes.inset_axes((0.21 * column, top - 0.225, 0.2, 0.215))
            inset.imshow(np.asarray(Image.open(folder / example[key]).convert("RGB")), interpolation="nearest")
            inset.set_axis_off()
        label = example["label"]
        lines = [f"{label}, {str(example['cell']).replace('_', ' ').replace('/', ' ')}".rstrip(", ")]
        lines += [f"{'✓' if a == label else '✗'} {titles[name]}: {a}" for name, a in example["answers"].items()]
        axes.text(0.45, top - 0.12, "\n".join(lines), va="center", fontsize=8.5, color="black")


def main() -> None:
    """Run the command line."""
    if len(sys.argv) != 3:
        raise ConfigError("give an evaluation's folder and the image: python docs/images/make_teaser.py OUT IMAGE.png")
    draw_teaser(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_command(main)
