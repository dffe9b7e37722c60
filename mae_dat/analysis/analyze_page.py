"""Write the page of `mae-dat analyze`: clean, discrete-adversarial and pixel-adversarial images in tables
and figures."""

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
_TEMPLATE = Path(__file__).parent / "templates" / "explanation.html.j2"
_MIN_POWER = 1e-12  # on a logarithmic axis
_AMPLIFICATION = 4


@dataclass(frozen=True)
class DotFigure:
    """A figure of one number of each view: its file, the key of the number, its axis label and caption."""

    file: str
    key: str
    axis_label: str
    caption: str
    log: bool = False


_STATISTICS_FIGURES = (
    *(
        DotFigure(
            file=f"correlation_{moment}.png",
            key=key,
            axis_label=f"correlation of channel {moment} with clean",
            caption=f"Channel {moment} inside the model, against those of the clean images (the paper's Fig. 2).",
        )
        for key, moment in (("correlation_mean", "means"), ("correlation_variance", "variances"))
    ),
    DotFigure(
        file="frechet.png",
        key="frechet",
        axis_label="Fréchet distance from clean",
        caption="Distance of the features before the head from those of the clean images, in each model's own units.",
        log=True,
    ),
)
_APPEARANCE_FIGURES = (
    DotFigure("colors.png", "colors", "different 8-bit colors per image", "Number of colors (the paper's Fig. 3)."),
)


@dataclass(frozen=True)
class PageSection:
    """A section of the page."""

    title: str
    figures: tuple[ReportFigure, ...] = ()
    tables: tuple[Table, ...] = ()


def write_page(results: Mapping[str, Any], examples: Mapping[str, Mapping[str, Tensor]], output: Path) -> Path:
    """Write analysis.html and figures/*.png into `output`; return the page's path.

    `results` is the content of analysis.json; `examples` holds each network's first images of every view,
    (B, 3, H, W) in [0, 1].
    """
    prepare_output_folder(output / "figures")
    networks = results["networks"]
    statistics = dot_figures(networks, _STATISTICS_FIGURES)
    appearance = (*dot_figures(networks, _APPEARANCE_FIGURES), *spectrum_figures(networks))
    changes = tuple(perturbation_figure(name, views) for name, views in examples.items())
    sections = [
        PageSection("Statistics inside the model", statistics, (correlation_table(networks),)),
        PageSection("Appearance of the changes", appearance, (appearance_table(networks),)),
        PageSection("Images", changes),
    ]
    page = html_page(_TEMPLATE, results=results, summary=summary_sentences(networks), sections=sections)
    for figure in (figure for section in sections for figure in section.figures):
        _write(output / "figures" / figure.name, figure.png)
    _write(output / "analysis.html", page.encode())
    return output / "analysis.html"


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


def summary_sentences(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Summarize the numbers of each network in a sentence, and explain how to read them."""
    sentences = []
    for network in networks:
        views = network["views"]
        parts = [
            f"{VIEW_TITLES[view]} {views[view]['correlation_mean']:.3f} and {views[view]['correlation_variance']:.3f}"
            for view in ("released", "symbolic", "pixel", "pixel_length")
            if view in views
        ]
        images = views[CLEAN_VIEW]["images"]
        sentences.append(
            f"{network['name']}: over {images} images and {network['layers']} layers, channel means and variances "
            f"correlate with those of the clean images by {'; '.join(parts)} (1: the same)."
        )
    sentences.append(
        "These attacks differ in strength: read each correlation together with the loss that the attack reaches and "
        "the length of its change. The numbers are of one model and one choice of images, without a spread over "
        "seeds."
    )
    return sentences


def correlation_table(networks: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table of Fig. 2's numbers: a row for each view of each network."""
    rows: list[tuple[str, ...]] = []
    breaks: list[int] = []
    for network in networks:
        breaks.append(len(rows))
        for view, numbers in network["views"].items():
            compared = numbers if view != CLEAN_VIEW else {**network["halves"], "frechet": None}
            distance = "–" if compared["frechet"] is None else f"{compared['frechet']:.2f}"
            rows.append(
                (
                    network["name"],
                    VIEW_TITLES[view] if view != CLEAN_VIEW else "clean, one half against the other",
                    f"{100 * numbers['correct']:.1f}",
                    f"{numbers['loss']:.2f}",
                    f"{compared['correlation_mean']:.4f}",
                    f"{compared['correlation_variance']:.4f}",
                    distance,
                )
            )
    note = (
        "r: Pearson's correlation over a layer's channels with the clean images, averaged over the layers (inputs "
        "of BatchNorm, or of the other norms where there is none). Fréchet distance: between the features before the "
        "head, in their own units; biased upwards for few images, so only to be compared within this page."
    )
    return Table(
        "correlations",
        "Correlations",
        head=("model", "images", "accuracy (%)", "loss", "r of means", "r of variances", "Fréchet distance"),
        rows=tuple(rows),
        notes=(note,),
        words=2,
        breaks=frozenset(breaks[1:]),
    )


def appearance_table(networks: Sequence[Mapping[str, Any]]) -> Table:
    """Make the table of Fig. 3's numbers: a row for each view of each network."""
    rows: list[tuple[str, ...]] = []
    breaks: list[int] = []
    for network in networks:
        breaks.append(len(rows))
        for view, numbers in network["views"].items():
            rows.append(
                (
                    network["name"],
                    VIEW_TITLES[view],
                    f"{numbers['length']:.2f}",
                    f"{numbers['length_decoded']:.2f}" if "length_decoded" in numbers else "–",
                    f"{255 * numbers['largest']:.0f}",
                    f"{numbers['colors']:.0f}",
                    f"{100 * numbers['words']:.1f}" if "words" in numbers else "–",
                )
            )
    lengths = ("L2 length", "L2 length from the decoded image", "largest change (of 255)")
    note = (
        "Means over the images; changes from the clean image, pixels in [0, 1]. An image decoded from its words "
        "has the tokenizer's error: the second length leaves that out."
    )
    return Table(
        "looks",
        "Appearance",
        head=("model", "images", *lengths, "colors", "changed words (%)"),
        rows=tuple(rows),
        notes=(note,),
        words=2,
        breaks=frozenset(breaks[1:]),
    )


def dot_figures(networks: Sequence[Mapping[str, Any]], figures: Sequence[DotFigure]) -> tuple[ReportFigure, ...]:
    """Draw a number of every view as dots, one color per network."""
    drawings = []
    for figure in figures:
        views = [view for view in VIEW_TITLES if figure.key in networks[0]["views"].get(view, {})]
        series = [
            Series(
                network["name"],
                style,
                tuple((network["views"][view][figure.key], float(row), 0.0) for row, view in enumerate(views)),
            )
            for style, network in enumerate(networks)
        ]
        png = charts.dot_plot([VIEW_TITLES[view] for view in views], series, figure.axis_label, log=figure.log)
        drawings.append(ReportFigure(figure.file, png, figure.caption, figure.caption))
    return tuple(drawings)


def spectrum_figures(networks: Sequence[Mapping[str, Any]]) -> tuple[ReportFigure, ...]:
    """Draw a chart for each network: the power of the changes by spatial frequency."""
    drawings = []
    for index, network in enumerate(networks):
        series = []
        for style, (view, numbers) in enumerate(item for item in network["views"].items() if item[0] != CLEAN_VIEW):
            power = numbers["spectrum"]
            points = tuple(((k + 0.5) / (2 * len(power)), max(p, _MIN_POWER), 0.0) for k, p in enumerate(power))
            series.append(Series(VIEW_TITLES[view], style, points))
        png = charts.spectrum_plot(series, "power of the change", "cycles per pixel")
        caption = f"{network['name']}: at which spatial frequencies the images were changed (the paper's Fig. 3)."
        drawings.append(ReportFigure(f"spectrum_{index}.png", png, caption, caption))
    return tuple(drawings)


def perturbation_figure(name: str, views: Mapping[str, Tensor]) -> ReportFigure:
    """Draw a network's clean images (B, 3, H, W) in [0, 1] next to the changes of every view, shown around gray."""
    clean = views[CLEAN_VIEW]
    columns = []
    for view, image in views.items():
        change = (0.5 + _AMPLIFICATION * (image - clean)).clamp(0, 1)
        columns.append((VIEW_TITLES[view], image if view == CLEAN_VIEW else change))
    heading = f"{name}: the clean image and what each attack changed, times {_AMPLIFICATION}"
    drawing = draw_gallery(columns, heading=heading, cell=112)
    file = "".join(letter if letter.isalnum() else "_" for letter in name)
    return ReportFigure(f"changes_{file}.png", encode_png(drawing), heading, heading)
