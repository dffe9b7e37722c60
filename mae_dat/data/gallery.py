"""Drawing of galleries: images in rows and columns with captions, as one PNG."""

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
"""A title, and images (B, C, H, W) in [0, 1]."""
Captions = Sequence[Sequence[str]]
"""A text for every image of every row."""

_DPI = 160
_FONT_PT, _CHARACTER_PX, _LINE_PX = 8, 10.5, 23  # size of the text, width of a character, height of a line
_GAP_PX = 8
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601


def draw_gallery(columns: Sequence[Column], captions: Captions = (), heading: str = "", cell: int = 224) -> Tensor:
    """Draw columns of images (B, C, H, W) in [0, 1] under their titles; returns (3, height, width) in [0, 1].

    Row b shows image b of every column, with its caption below. Images are enlarged by a whole number to about `cell`
    pixels and never shrunk.
    """
    rows, (height, width) = len(columns[0][1]), columns[0][1].shape[-2:]
    scale = max(1, round(cell / max(height, width)))
    height, width = height * scale, width * scale
    titles = [_wrap(title, width) for title, _ in columns]
    caption_height = _LINE_PX * max((text.count("\n") + 1 for row in captions for text in row if text), default=0)
    total_width = _GAP_PX + len(columns) * (width + _GAP_PX)
    heading_lines = _wrap(heading, total_width)
    titles_top = _GAP_PX + (_LINE_PX * len(heading_lines) + _GAP_PX if heading_lines else 0)
    images_top = titles_top + _LINE_PX * max(len(title) for title in titles) + _GAP_PX // 2
    row_height = height + caption_height + _GAP_PX
    page = _Page(total_width, images_top + rows * row_height)
    page.write(_GAP_PX, _GAP_PX, "\n".join(heading_lines), va="top")
    for column, (_, images) in enumerate(columns):
        left = _GAP_PX + column * (width + _GAP_PX)
        page.write(left + width / 2, images_top - _GAP_PX // 2, "\n".join(titles[column]), ha="center", va="bottom")
        for row, image in enumerate(_to_rgb(images)):
            top = images_top + row * row_height
            page.show(image, left, top, width=width, height=height)
            text = captions[row][column] if captions else ""
            lines = [_shorten(line, int(width / _CHARACTER_PX)) for line in text.split("\n")]
            page.write(left + width / 2, top + height + 3, "\n".join(lines), ha="center", va="top")
    return page.pixels()


def draw_sheet(images: Tensor, captions: Sequence[str], heading: str = "", across: int = 8, cell: int = 112) -> Tensor:
    """Draw images (B, C, H, W) with their captions in rows of `across`, as `draw_gallery` does."""
    missing = -len(images) % across
    filled = torch.cat([images.cpu(), images.new_ones(missing, *images.shape[1:], device="cpu")])
    texts = [*captions, *[""] * missing]
    columns = [("", filled[column::across]) for column in range(across)]
    return draw_gallery(columns, [texts[row : row + across] for row in range(0, len(texts), across)], heading, cell)


class _Page:
    """A white page; positions are pixels from its upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def write(self, x: float, y: float, text: str, **options: Any) -> None:
        text = text.replace("$", r"\$")  # which would begin a formula
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=_FONT_PT, **options)

    def show(self, image: np.ndarray, left: int, top: int, *, width: int, height: int) -> None:
        bottom = 1 - (top + height) / self.height
        axes = self.figure.add_axes((left / self.width, bottom, width / self.width, height / self.height))
        axes.imshow(image, interpolation="nearest", aspect="auto")
        axes.set_axis_off()

    def pixels(self) -> Tensor:
        self.canvas.draw()
        rgb = np.asarray(self.canvas.buffer_rgba())[..., :3]
        return torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 255


def _wrap(text: str, width: int) -> list[str]:
    """Return the lines of a text that fit into `width` pixels."""
    return [line for part in text.split("\n") for line in textwrap.wrap(part, max(int(width / _CHARACTER_PX), 8))]


def _shorten(text: str, max_length: int) -> str:
    """Return at most `max_length` characters, without the middle: file names differ at their ends."""
    if len(text) <= max_length:
        return text
    return f"{text[: (max_length - 1) // 2]}…{text[-(max_length // 2) :]}"


def _to_rgb(images: Tensor) -> np.ndarray:
    """Convert (B, C, H, W) to (B, H, W, 3) for display: gray is repeated, further channels are left out."""
    images = images.detach().float().cpu().clamp(0, 1)
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    if images.shape[1] == 2:
        images = torch.cat([images, torch.zeros_like(images[:, :1])], 1)
    return images.permute(0, 2, 3, 1).numpy()


def luminance(images: Tensor) -> Tensor:
    """Return the luminance (B, 1, H, W) in [0, 1] of images (B, C, H, W), on the CPU."""
    return (torch.from_numpy(_to_rgb(images)) @ torch.tensor(_LUMINANCE)).unsqueeze(1)


def upsample_to(image: Tensor, maps: Tensor) -> Tensor:
    """Upsample maps (B, C, h, w) to the size of `image` (B, C, H, W), every value a square; on the CPU."""
    return F.interpolate(maps.float().cpu(), size=image.shape[-2:], mode="nearest")


def overlay(image: Tensor, weights: Tensor) -> Tensor:
    """Draw weights (B, h, w) >= 0 as colors over the gray image (B, C, H, W), each map scaled to its largest value."""
    scaled = weights / weights.amax((1, 2), keepdim=True).clamp(min=1e-12)
    colors = matplotlib.colormaps["inferno"](scaled.detach().cpu().numpy())[..., :3]
    heat = torch.from_numpy(colors).permute(0, 3, 1, 2).float()
    return 0.35 * luminance(image) + 0.65 * upsample_to(image, heat)


def encode_png(image: Tensor) -> bytes:
    """Encode an image (3, H, W) in [0, 1] as PNG."""
    pixels = image.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(image: Tensor, path: Path) -> None:
    """Write an image (3, H, W) in [0, 1] as PNG, atomically. Raises StorageError."""
    with atomic_write(path) as file:
        file.write(encode_png(image))
