"""Galleries: what the autoencoder fills in, where a network looks, visual words, and what the adversary did to them.

A gallery is drawn pixel by pixel: pictures are enlarged by whole numbers, so that every pixel and patch stays a square.
Colours are read off cividis and inferno, which colour-blind readers can order, and are never the only sign.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mae_dat.attacks.discrete import DiscreteAdversary
from mae_dat.models.attention import evaluating
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.storage.files import atomic_write

Column = tuple[str, Tensor]
Captions = Sequence[Sequence[str]]

DENSITY = 160  # pixels an inch
FONT, CHARACTER, LINE = 8, 10.5, 23  # points; widths and heights in pixels
GAP = 8
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601
CHANGED = (0.0, 0.135, 0.305)  # cividis' dark end


def gallery(columns: Sequence[Column], captions: Captions = (), heading: str = "", cell: int = 224) -> Tensor:
    """Draws columns of pictures (B, C, H, W) in [0, 1] under their titles, one row a picture; returns (3, height,
    width) in [0, 1].

    `captions` holds a text for every picture of every row, drawn below it. Cells are about `cell` pixels wide, never
    smaller than a picture.
    """
    rows, (height, width) = len(columns[0][1]), columns[0][1].shape[-2:]
    scale = max(1, round(cell / max(height, width)))
    height, width = height * scale, width * scale
    titles = [_wrapped(title, width) for title, _ in columns]
    below = LINE * max((text.count("\n") + 1 for row in captions for text in row if text), default=0)
    total_width = GAP + len(columns) * (width + GAP)
    head = _wrapped(heading, total_width)
    top = GAP + (LINE * len(head) + GAP if head else 0)
    first = top + LINE * max(len(title) for title in titles) + GAP // 2
    total_height = first + rows * (height + below + GAP)
    figure = Figure(figsize=(total_width / DENSITY, total_height / DENSITY), dpi=DENSITY, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, **options: Any) -> None:
        figure.text(x / total_width, 1 - y / total_height, text.replace("$", r"\$"), fontsize=FONT, **options)

    write(GAP, GAP, "\n".join(head), va="top")
    for column, (_, pictures) in enumerate(columns):
        left = GAP + column * (width + GAP)
        write(left + width / 2, first - GAP // 2, "\n".join(titles[column]), ha="center", va="bottom")
        for row, picture in enumerate(_displayable(pictures)):
            upper = first + row * (height + below + GAP)
            low = 1 - (upper + height) / total_height
            axis = figure.add_axes((left / total_width, low, width / total_width, height / total_height))
            axis.imshow(picture, interpolation="nearest", aspect="auto")
            axis.set_axis_off()
            text = captions[row][column] if captions else ""
            lines = [_shortened(line, int(width / CHARACTER)) for line in text.split("\n")]
            write(left + width / 2, upper + height + 3, "\n".join(lines), ha="center", va="top")
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def sheet(pictures: Tensor, captions: Sequence[str], heading: str = "", across: int = 8, cell: int = 112) -> Tensor:
    """Draws pictures (B, C, H, W) with their captions in rows of `across`, as `gallery` does."""
    missing = -len(pictures) % across
    filled = torch.cat([pictures.cpu(), pictures.new_ones(missing, *pictures.shape[1:], device="cpu")])
    texts = [*captions, *[""] * missing]
    columns = [("", filled[column::across]) for column in range(across)]
    return gallery(columns, [texts[row : row + across] for row in range(0, len(texts), across)], heading, cell)


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a text that fit into `width` pixels."""
    return [line for part in text.split("\n") for line in textwrap.wrap(part, max(int(width / CHARACTER), 8))]


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


def _grey(pictures: Tensor) -> Tensor:
    """(B, C, H, W) -> luminance (B, 1, H, W) of what is displayed."""
    shown = torch.from_numpy(_displayable(pictures))
    return (shown @ torch.tensor(LUMINANCE)).unsqueeze(1)


def _enlarged(maps: Tensor, like: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W) of the picture `like`, every place a square."""
    return F.interpolate(maps.float().cpu(), size=like.shape[-2:], mode="nearest")


def _colored(values: Tensor, colormap: str) -> Tensor:
    """Values (B, h, w) in [0, 1] -> colours (B, 3, h, w)."""
    colors = matplotlib.colormaps[colormap](values.detach().cpu().numpy())[..., :3]
    return torch.from_numpy(colors).permute(0, 3, 1, 2).float()


def png_bytes(picture: Tensor) -> bytes:
    """(3, H, W) in [0, 1] as PNG."""
    pixels = picture.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save_png(picture: Tensor, path: Path) -> None:
    """Writes (3, H, W) in [0, 1] as PNG, atomically."""
    with atomic_write(path) as file:
        file.write(png_bytes(picture))


# ---- masked autoencoding ----


def reconstruction_gallery(
    model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor, norm_pix: bool
) -> Tensor:
    """The drawn `reconstruction_columns`, (3, height, width) in [0, 1]."""
    return gallery(reconstruction_columns(model, image, mask_ratio, noise, norm_pix))


@torch.no_grad()
def reconstruction_columns(
    model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor, norm_pix: bool
) -> list[Column]:
    """Masked / prediction pasted into the visible patches / original, each (B, C, H, W); grey where removed.

    With `norm_pix` the prediction is de-normalized by the true patches' mean and deviation, and the title says so.
    """
    with evaluating(model):
        prediction, mask = model(image, mask_ratio, noise)
    drawn = model.prediction_to_image(prediction.float(), image, norm_pix)
    removed = model.unpatchify(mask.unsqueeze(-1).expand(-1, -1, prediction.shape[-1]))
    title = "reconstruction\n(true patch statistics)" if norm_pix else "reconstruction"
    masked = image * (1 - removed) + 0.5 * removed
    pasted = image * (1 - removed) + drawn * removed
    return [(f"masked {mask_ratio:.0%}", masked), (title, pasted), ("original", image)]


# ---- attention ----


def attention_columns(image: Tensor, maps: Tensor) -> tuple[list[Column], list[list[str]]]:
    """The picture, the mean over heads and every head of attention `maps` (B, heads, h, w), laid over the picture;
    with captions.

    A map's colours run from 0 (dark) to its largest weight (bright), which the caption gives with the share of the
    attention that falls on patches at all.
    """
    heads = maps.shape[1]
    shown = {"attention": maps} if heads == 1 else {f"mean of {heads} heads": maps.mean(1, keepdim=True)}
    if heads > 1:
        shown |= {f"head {head + 1}": maps[:, head : head + 1] for head in range(heads)}
    columns = [("picture", image), *((title, overlay(image, one.squeeze(1))) for title, one in shown.items())]
    captions = [
        ["", *(f"peak {float(one[row].max()):.1%}\npatches {float(one[row].sum()):.0%}" for one in shown.values())]
        for row in range(len(image))
    ]
    return columns, captions


def overlay(image: Tensor, weights: Tensor) -> Tensor:
    """Weights (B, h, w) >= 0 as colours over the grey picture (B, C, H, W), each map scaled to its largest value."""
    scaled = weights / weights.amax((1, 2), keepdim=True).clamp(min=1e-12)
    return 0.35 * _grey(image) + 0.65 * _enlarged(_colored(scaled, "inferno"), image)


# ---- visual words ----


def word_columns(image: Tensor, words: Tensor, tokenizer: VisualTokenizer) -> tuple[list[Column], list[list[str]]]:
    """The picture / decoded from its words (B, h, w) / every word drawn alone / index map, with captions."""
    with torch.no_grad():
        decoded = tokenizer.decode(words)
    used, places = words.unique(return_inverse=True)
    tiles = word_tiles(tokenizer, used)[places]  # (B, h, w, C, f, f)
    alone = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    errors = (decoded - image).square().mean((1, 2, 3)).clamp(min=1e-10)
    captions = [
        ["", f"{-10 * math.log10(error):.1f} dB", "", f"{len(one.unique())} words in {one.numel()} places"]
        for error, one in zip(errors.tolist(), words, strict=True)
    ]
    index_map = _enlarged(word_colors(words), image)
    titles = ("picture", "decoded from its words", "each word drawn alone", "index map\n(a colour a word)")
    return list(zip(titles, (image, decoded, alone, index_map), strict=True)), captions


def word_colors(words: Tensor) -> Tensor:
    """A colour for every word of a map (B, h, w) -> (B, 3, h, w): always the same for the same word.

    Hue and brightness follow a sequence that spreads evenly, so neighbours among the words are far apart.
    """
    index = words.cpu().double()
    hue, value = index.mul(0.7548776662) % 1, index.mul(0.5698402910) % 1
    hsv = torch.stack([hue, 0.75 - 0.35 * value, 0.3 + 0.7 * value], dim=-1)
    return torch.from_numpy(hsv_to_rgb(hsv.numpy())).permute(0, 3, 1, 2).float()


@torch.no_grad()
def word_tiles(tokenizer: VisualTokenizer, words: Tensor, chunk: int = 256) -> Tensor:
    """Every word of a list (N,) drawn alone, (N, C, factor, factor): the middle of a 3 x 3 map of nothing else."""
    side = tokenizer.factor
    drawn = [tokenizer.decode(some.view(-1, 1, 1).expand(-1, 3, 3)) for some in words.split(chunk)]
    return torch.cat(drawn)[:, :, side : 2 * side, side : 2 * side]


def codebook_picture(tiles: Tensor, cell: int = 24) -> Tensor:
    """Tiles (N, C, f, f) in rows of a near-square sheet with white lines between, as one picture (1, C, H, W)."""
    scale = max(1, cell // tiles.shape[-1])
    tiles = tiles.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    across = math.ceil(math.sqrt(2 * len(tiles)))
    blank = tiles.new_ones(-len(tiles) % across, *tiles.shape[1:])
    tiles = F.pad(torch.cat([tiles, blank]), (0, 2, 0, 2), value=1.0)
    return tiles.unflatten(0, (-1, across)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).unsqueeze(0)


# ---- adversaries ----


def adversary_gallery(image: Tensor, found: DiscreteAdversary) -> Tensor:
    """The drawn `adversary_columns`, (3, height, width) in [0, 1]."""
    return gallery(adversary_columns(image, found))


def adversary_columns(image: Tensor, found: DiscreteAdversary, amplify: float = 4) -> list[Column]:
    """Clean / reconstruction from its words / adversarial / their difference, amplified around grey / changed words
    (dark, over the pale picture), (B, C, H, W)."""
    changed = (found.words != found.adversarial_words).float().unsqueeze(1)
    shown = _enlarged(changed, image)
    pale = (0.7 + 0.3 * _grey(image)).expand(-1, 3, -1, -1)
    marked = torch.where(shown > 0, torch.tensor(CHANGED).view(3, 1, 1), pale)
    difference = 0.5 + amplify * (found.adversarial - found.reconstruction)
    return [
        ("clean", image),
        ("words, decoded", found.reconstruction),
        ("adversarial", found.adversarial),
        (f"difference × {amplify:g}\n(to the decoded)", difference),
        (f"changed words ({float(found.changed):.1%})", marked),
    ]


@torch.no_grad()
def changed_words(words: Tensor, adversarial_words: Tensor, most: int) -> list[tuple[int, int, int, int]]:
    """The `most` often changed words of two maps of the same shape: word, what it became most often, how many times it
    was changed, and in how many places it stood."""
    before, after = words.flatten(), adversarial_words.flatten()
    moved, times = before[before != after].unique(return_counts=True)
    rows = []
    for word, count in zip(moved.tolist(), times.tolist(), strict=True):
        became = after[(before == word) & (after != word)]
        rows.append((word, int(became.mode().values), count, int((before == word).sum())))
    return sorted(rows, key=lambda row: (-row[2], row[0]))[:most]


def changed_word_sheet(tokenizer: VisualTokenizer, rows: Sequence[tuple[int, int, int, int]], heading: str) -> Tensor:
    """The words of `changed_words` and what they became, side by side, (3, height, width) in [0, 1]."""
    listed = torch.tensor(rows, device=tokenizer.codebook.device)
    before, after = (word_tiles(tokenizer, listed[:, side]) for side in (0, 1))
    both = torch.cat([before, torch.ones_like(before[..., :1]), after], -1)
    texts = [f"{word} → {other}\n{times} of {places}" for word, other, times, places in rows]
    return sheet(both, texts, heading)


def used_words(words: Tensor) -> tuple[Tensor, list[float]]:
    """Words by use, the most used first (N,), and the share of places that each takes."""
    used, counts = words.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return used[order], (counts[order] / words.numel()).tolist()
