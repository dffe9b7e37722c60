"""Galleries: images in rows and columns with captions, as one PNG."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mae_dat.storage.files import atomic_write

Column = tuple[str, Tensor]


Captions = Sequence[Sequence[str]]


_DPI = 160  # pixels an inch


_FONT_PT, _CHARACTER_PX, _LINE_PX = 8, 10.5, 23  # points; widths and heights in pixels


_GAP_PX = 8


_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601


def draw_gallery(columns: Sequence[Column], captions: Captions = (), heading: str = "", cell: int = 224) -> Tensor:
    """Draws columns of pictures (B, C, H, W) in [0, 1] under their titles, one row a picture; returns (3, height,
    width) in [0, 1].

    `captions` holds a text for every picture of every row, drawn below it. Cells are about `cell` pixels wide, never
    smaller than a picture.
    """
    rows, (height, width) = len(columns[0][1]), columns[0][1].shape[-2:]
    scale = max(1, round(cell / max(height, width)))
    height, width = height * scale, width * scale
    titles = [_wrapped(title, width) for title, _ in columns]
    below = _LINE_PX * max((text.count("\n") + 1 for row in captions for text in row if text), default=0)
    total_width = _GAP_PX + len(columns) * (width + _GAP_PX)
    head = _wrapped(heading, total_width)
    top = _GAP_PX + (_LINE_PX * len(head) + _GAP_PX if head else 0)
    first = top + _LINE_PX * max(len(title) for title in titles) + _GAP_PX // 2
    total_height = first + rows * (height + below + _GAP_PX)
    figure = Figure(figsize=(total_width / _DPI, total_height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, **options: Any) -> None:
        figure.text(x / total_width, 1 - y / total_height, text.replace("$", r"\$"), fontsize=_FONT_PT, **options)

    write(_GAP_PX, _GAP_PX, "\n".join(head), va="top")
    for column, (_, pictures) in enumerate(columns):
        left = _GAP_PX + column * (width + _GAP_PX)
        write(left + width / 2, first - _GAP_PX // 2, "\n".join(titles[column]), ha="center", va="bottom")
        for row, picture in enumerate(_displayable(pictures)):
            upper = first + row * (height + below + _GAP_PX)
            low = 1 - (upper + height) / total_height
            axis = figure.add_axes((left / total_width, low, width / total_width, height / total_height))
            axis.imshow(picture, interpolation="nearest", aspect="auto")
            axis.set_axis_off()
            text = captions[row][column] if captions else ""
            lines = [_shortened(line, int(width / _CHARACTER_PX)) for line in text.split("\n")]
            write(left + width / 2, upper + height + 3, "\n".join(lines), ha="center", va="top")
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def draw_sheet(
    pictures: Tensor, captions: Sequence[str], heading: str = "", across: int = 8, cell: int = 112
) -> Tensor:
    """Draws pictures (B, C, H, W) with their captions in rows of `across`, as `draw_gallery` does."""
    missing = -len(pictures) % across
    filled = torch.cat([pictures.cpu(), pictures.new_ones(missing, *pictures.shape[1:], device="cpu")])
    texts = [*captions, *[""] * missing]
    columns = [("", filled[column::across]) for column in range(across)]
    return draw_gallery(columns, [texts[row : row + across] for row in range(0, len(texts), across)], heading, cell)


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a text that fit into `width` pixels."""
    return [line for part in text.split("\n") for line in textwrap.wrap(part, max(int(width / _CHARACTER_PX), 8))]


def _shortened(text: str, most: int) -> str:
    """At most `most` characters; names differ at their ends, so the middle goes."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def _displayable(pictures: Tensor) -> np.ndarray:
    """(B, C, H, W) -> (B, H, W, 3): grey is repeated, further channels are left out."""
    pictures = pictures.detach().float().cpu().clamp(0, 1)
    pictures = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3]
    if pictures.shape[1] == 2:
        pictures = torch.cat([pictures, torch.zeros_like(pictures[:, :1])], 1)
    return pictures.permute(0, 2, 3, 1).numpy()


def luminance(pictures: Tensor) -> Tensor:
    """(B, C, H, W) -> luminance (B, 1, H, W) of what is displayed."""
    shown = torch.from_numpy(_displayable(pictures))
    return (shown @ torch.tensor(_LUMINANCE)).unsqueeze(1)


def enlarge(maps: Tensor, like: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W) of the picture `like`, every place a square."""
    return F.interpolate(maps.float().cpu(), size=like.shape[-2:], mode="nearest")


def _colored(values: Tensor, colormap: str) -> Tensor:
    """Values (B, h, w) in [0, 1] -> colours (B, 3, h, w)."""
    colors = matplotlib.colormaps[colormap](values.detach().cpu().numpy())[..., :3]
    return torch.from_numpy(colors).permute(0, 3, 1, 2).float()


def encode_png(picture: Tensor) -> bytes:
    """(3, H, W) in [0, 1] as PNG."""
    pixels = picture.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(picture: Tensor, path: Path) -> None:
    """Writes (3, H, W) in [0, 1] as PNG, atomically."""
    with atomic_write(path) as file:
        file.write(encode_png(picture))


def overlay(image: Tensor, weights: Tensor) -> Tensor:
    """Weights (B, h, w) >= 0 as colours over the grey picture (B, C, H, W), each map scaled to its largest value."""
    scaled = weights / weights.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return 0.35 * luminance(image) + 0.65 * enlarge(_colored(scaled, "inferno"), image)
