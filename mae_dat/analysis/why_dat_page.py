"""The page of `python -m mae_dat analysis`: clean, discrete-adversarial and pixel-adversarial images in tables and
figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_dat.data.gallery import draw_gallery, encode_png
from mae_dat.robustness.report import charts
from mae_dat.robustness.report.charts import Series
from mae_dat.robustness.report.figures import ReportFigure
from mae_dat.robustness.report.render import html_page
from mae_dat.robustness.report.tables import Table
from mae_dat.storage.files import atomic_write, prepare_output_folder

CLEAN_VIEW = "clean"
VIEW_TITLES = {
    CLEAN_VIEW: "clean",
    "reconstruction": "decoded from its words",
    "random": "random words",
    "released": "DAT",
    "symbolic": "symbolic DAT",
    "pixel": "pixel attack",
    "pixel_length": "pixel, as long as DAT",
    "noise_length": "noise, as long as DAT",
    "pixel_decoded": "pixel from decoded, as DAT",
}
FLOOR = 1e-12  # of a power on a logarithmic axis
AMPLIFY = 4


@dataclass(frozen=True)
class DotFigure:
    """A figure of one number of each view: its file, the number's key, axis and caption."""

    file: str
    key: str
    axis: str
    caption: str
    log: bool = False


_STATISTICS_FIGURES = (
    *(
        DotFigure(
            f"correlation_{of}.png",
            key,
            f"correlation of channel {of} with clean",
            f"Channel {of} inside the network, against the clean pictures' (the paper's Fig. 2).",
        )
        for key, of in (("correlation_mean", "means"), ("correlation_variance", "variances"))
    ),
    DotFigure(
        "frechet.png",
        "frechet",
        "Fréchet distance from clean",
        "Distance of the features before the head from the clean pictures', in each network's own units.",
        log=True,
    ),
)
_APPEARANCE_FIGURES = (
    DotFigure("colors.png", "colors", "different 8-bit colours a picture", "Number of colours (the paper's Fig. 3)."),
)


@dataclass(frozen=True)
class PageSection:
    """A part of the page."""

    title: str
    pictures: tuple[ReportFigure, ...] = ()
    tables: tuple[Table, ...] = ()


def write_page(results: Mapping[str, Any], shown: Mapping[str, Mapping[str, Tensor]], output: Path) -> Path:
    """analysis.html and figures/*.png in `output`, from the numbers of the analysis and each network's first
    pictures of every view, (B, 3, H, W) in [0, 1]. Returns the page's path."""
    prepare_output_folder(output / "figures")
    networks = results["networks"]
    sections = [
        PageSection(
            "Statistics inside the network", dot_figures(networks, _STATISTICS_FIGURES), (correlation_table(networks),)
        ),
        PageSection(
            "What the changes look like",
            (*dot_figures(networks, _APPEARANCE_FIGURES), *spectrum_figures(networks)),
            (appearance_table(networks),),
        ),
        PageSection("Pictures", tuple(perturbation_figure(name, views) for name, views in shown.items())),
    ]
    page = html_page("explanation.html.j2", results=results, summary=summary_sentences(networks), sections=sections)
    for picture in (picture for section in sections for picture in section.pictures):
        _write(output / "figures" / picture.name, picture.png)
    _write(output / "analysis.html", page.encode())
    return output / "analysis.html"


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def summary_sentences(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers say of each network, in a sentence, and how to read them."""
    told = []
    for network in networks:
        views = network["views"]
        parts = [
            f"{VIEW_TITLES[view]} {views[view]['correlation_mean']:.3f} and {views[view]['correlation_variance']:.3f}"
            for view in ("released", "symbolic", "pixel", "pixel_length")
            if view in views
        ]
        images = views[CLEAN_VIEW]["images"]
        told.append(
            f"{network['name']}: over {images} pictures and {network['layers']} layers, channel means and variances "
            f"correlate with those of the clean pictures by {'; '.join(parts)} (1: the same)."
        )
    told.append(
        "Attacks of another strength are compared here: read each correlation beside the loss that the attack reaches "
        "and the length of its change. One network, one choice of pictures: no spread over seeds is in these numbers."
    )
    return told


def correlation_table(networks: Sequence[Mapping[str, Any]]) -> Table:
    """Fig. 2 in numbers: a row for each view of each network."""
    rows: list[tuple[str, ...]] = []
    breaks: list[int] = []
    for network in networks:
        breaks.append(len(rows))
        halves = network["halves"]
        for view, one in network["views"].items():
            compared = one if view != CLEAN_VIEW else {**halves, "frechet": None}
            distance = "–" if compared["frechet"] is None else f"{compared['frechet']:.2f}"
            rows.append(
                (
                    network["name"],
                    VIEW_TITLES[view] if view != CLEAN_VIEW else "clean, one half against the other",
                    f"{100 * one['correct']:.1f}",
                    f"{one['loss']:.2f}",
                    f"{compared['correlation_mean']:.4f}",
                    f"{compared['correlation_variance']:.4f}",
                    distance,
                )
            )
    head = ("network", "pictures", "accuracy (%)", "loss", "r of means", "r of variances", "Fréchet distance")
    notes = (
        "r: Pearson's correlation over a layer's channels with the clean pictures, averaged over the layers (inputs "
        "of BatchNorm, or of the other norms where there is none). Fréchet distance: between the features before the "
        "head, in their own units; biased upwards for few pictures, so only to be compared within this page.",
    )
    return Table("correlations", "Correlations", head, tuple(rows), notes, 2, frozenset(breaks[1:]))


def appearance_table(networks: Sequence[Mapping[str, Any]]) -> Table:
    """Fig. 3 in numbers."""
    rows: list[tuple[str, ...]] = []
    breaks: list[int] = []
    for network in networks:
        breaks.append(len(rows))
        for view, one in network["views"].items():
            words = f"{100 * one['words']:.1f}" if "words" in one else "–"
            own = f"{one['length_decoded']:.2f}" if "length_decoded" in one else "–"
            numbers = (f"{one['length']:.2f}", own, f"{255 * one['largest']:.0f}", f"{one['colors']:.0f}", words)
            rows.append((network["name"], VIEW_TITLES[view], *numbers))
    lengths = ("L2 length", "of it from the decoded picture", "largest change (of 255)")
    head = ("network", "pictures", *lengths, "colours", "changed words (%)")
    notes = (
        "Means over the pictures; changes from the clean picture, pixels in [0, 1]. What is decoded from words has "
        "the tokenizer's error: the second length is of what was changed besides.",
    )
    return Table("looks", "Looks", head, tuple(rows), notes, 2, frozenset(breaks[1:]))


def dot_figures(networks: Sequence[Mapping[str, Any]], shown: Sequence[DotFigure]) -> tuple[ReportFigure, ...]:
    """Dots of a number by view, one colour a network."""
    found = []
    for one in shown:
        views = [view for view in VIEW_TITLES if one.key in networks[0]["views"].get(view, {})]
        series = [
            Series(
                network["name"],
                style,
                tuple((network["views"][view][one.key], float(row), 0.0) for row, view in enumerate(views)),
            )
            for style, network in enumerate(networks)
        ]
        png = charts.dot_plot([VIEW_TITLES[view] for view in views], series, one.axis, log=one.log)
        found.append(ReportFigure(one.file, png, one.caption, one.caption))
    return tuple(found)


def spectrum_figures(networks: Sequence[Mapping[str, Any]]) -> tuple[ReportFigure, ...]:
    """One chart a network: power of the change by spatial frequency."""
    found = []
    for number, network in enumerate(networks):
        series = []
        for style, (view, one) in enumerate(item for item in network["views"].items() if item[0] != CLEAN_VIEW):
            power = one["spectrum"]
            points = tuple(((k + 0.5) / (2 * len(power)), max(p, FLOOR), 0.0) for k, p in enumerate(power))
            series.append(Series(VIEW_TITLES[view], style, points))
        png = charts.spectrum_plot(series, "power of the change", "cycles a pixel")
        caption = f"{network['name']}: at which spatial frequencies the pictures were changed (the paper's Fig. 3)."
        found.append(ReportFigure(f"spectrum_{number}.png", png, caption, caption))
    return tuple(found)


def perturbation_figure(name: str, views: Mapping[str, Tensor]) -> ReportFigure:
    """The pictures and, below each other, their changes around grey."""
    clean = views[CLEAN_VIEW]
    columns = []
    for view, picture in views.items():
        change = (0.5 + AMPLIFY * (picture - clean)).clamp(0, 1)
        columns.append((VIEW_TITLES[view], picture if view == CLEAN_VIEW else change))
    heading = f"{name}: the clean picture and what each attack changed, times {AMPLIFY}"
    image = draw_gallery(columns, heading=heading, cell=112)
    file = "".join(letter if letter.isalnum() else "_" for letter in name)
    return ReportFigure(f"changes_{file}.png", encode_png(image), heading, heading)
