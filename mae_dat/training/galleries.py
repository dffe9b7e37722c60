"""Galleries: what the autoencoder fills in, where a network looks, visual words, and what the adversary did to them.

A gallery is drawn pixel by pixel: pictures are enlarged by whole numbers, so that every pixel and patch stays a square.
Colours are read off cividis and inferno, which colour-blind readers can order, and are never the only sign.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from matplotlib.colors import hsv_to_rgb
from torch import Tensor

from mae_dat.attacks.discrete import DiscreteAdversary
from mae_dat.data.gallery import Column, draw_gallery, draw_sheet, luminance, overlay, save_png, upsample_to
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.models.modes import evaluation_mode
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.runtime.run_log import RunLog
from mae_dat.training.context import RunContext

CHANGED = (0.0, 0.135, 0.305)  # cividis' dark end


# ---- masked autoencoding ----


def reconstruction_gallery(
    model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor, norm_pix: bool
) -> Tensor:
    """The drawn `reconstruction_columns`, (3, height, width) in [0, 1]."""
    return draw_gallery(reconstruction_columns(model, image, mask_ratio, noise, norm_pix))


@torch.no_grad()
def reconstruction_columns(
    model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor, norm_pix: bool
) -> list[Column]:
    """Masked / prediction pasted into the visible patches / original, each (B, C, H, W); grey where removed.

    With `norm_pix` the prediction is de-normalized by the true patches' mean and deviation, and the title says so.
    """
    with evaluation_mode(model):
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
    index_map = upsample_to(image, word_colors(words))
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
    return draw_gallery(adversary_columns(image, found))


def adversary_columns(image: Tensor, found: DiscreteAdversary, amplify: float = 4) -> list[Column]:
    """Clean / reconstruction from its words / adversarial / their difference, amplified around grey / changed words
    (dark, over the pale picture), (B, C, H, W)."""
    changed = (found.words != found.adversarial_words).float().unsqueeze(1)
    shown = upsample_to(image, changed)
    pale = (0.7 + 0.3 * luminance(image)).expand(-1, 3, -1, -1)
    marked = torch.where(shown > 0, torch.tensor(CHANGED).view(3, 1, 1), pale)
    difference = 0.5 + amplify * (found.adversarial - found.reconstruction)
    return [
        ("clean", image),
        ("words, decoded", found.reconstruction),
        ("adversarial", found.adversarial),
        (f"difference × {amplify:g}\n(to the decoded)", difference),
        (f"changed words ({float(found.changed_share):.1%})", marked),
    ]


@torch.no_grad()
def most_changed_words(words: Tensor, adversarial_words: Tensor, most: int) -> list[tuple[int, int, int, int]]:
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
    """The words of `most_changed_words` and what they became, side by side, (3, height, width) in [0, 1]."""
    listed = torch.tensor(rows, device=tokenizer.codebook.device)
    before, after = (word_tiles(tokenizer, listed[:, side]) for side in (0, 1))
    both = torch.cat([before, torch.ones_like(before[..., :1]), after], -1)
    texts = [f"{word} → {other}\n{times} of {places}" for word, other, times, places in rows]
    return draw_sheet(both, texts, heading)


def used_words(words: Tensor) -> tuple[Tensor, list[float]]:
    """Words by use, the most used first (N,), and the share of places that each takes."""
    used, counts = words.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return used[order], (counts[order] / words.numel()).tolist()


def galleries_due(epoch: int, context: RunContext) -> bool:
    """Return whether this rank draws galleries after this epoch: rank 0 does, and with a sharded model all ranks."""
    every = context.run.pictures_every
    return every > 0 and (epoch + 1) % every == 0 and (context.world.main or context.sharded)


def show_galleries(pictures: Mapping[str, Tensor], context: RunContext, log: RunLog, epoch: int) -> None:
    """Galleries by name, (3, H, W) in [0, 1]: the newest of each as pictures/NAME.png, all of them in TensorBoard."""
    if not context.world.main:
        return
    folder = context.output / "pictures"
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        save_png(picture, folder / f"{name}.png")
        log.image(name, picture, 1000 * (epoch + 1))
