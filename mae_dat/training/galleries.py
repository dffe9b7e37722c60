"""Galleries: what the autoencoder predicts, where a model attends, visual words, and what the adversary did to them.

A gallery is drawn pixel by pixel: images are enlarged by whole numbers, so that every pixel and patch stays a square.
Colors are read off cividis and inferno, which color-blind readers can order, and are never the only sign.
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

GALLERY_FOLDER, EARLIER_GALLERY_FOLDER = "images", "pictures"
"""The folder of galleries in the output folder of a run, and its name in runs of earlier versions."""
CHANGED = (0.0, 0.135, 0.305)  # cividis' dark end


# ---- masked autoencoding ----


def reconstruction_gallery(
    model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor, norm_pix: bool
) -> Tensor:
    """Draw `reconstruction_columns` as one image (3, height, width) in [0, 1]."""
    columns = reconstruction_columns(model, image, mask_ratio=mask_ratio, noise=noise, norm_pix=norm_pix)
    return draw_gallery(columns)


@torch.no_grad()
def reconstruction_columns(
    model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor, norm_pix: bool
) -> list[Column]:
    """Return three columns of images (B, C, H, W): masked (gray where removed), prediction pasted into the visible
    patches, original.

    `image` is (B, C, H, W) in [0, 1], `noise` (B, N) decides which patches are removed. With `norm_pix` the prediction
    is de-normalized by the true patches' mean and deviation, and the title says so.
    """
    with evaluation_mode(model):
        prediction, mask = model(image, mask_ratio, noise)
    predicted_image = model.prediction_to_image(prediction.float(), image, norm_pix)
    removed = model.unpatchify(mask.unsqueeze(-1).expand(-1, -1, prediction.shape[-1]))
    title = "reconstruction\n(true patch statistics)" if norm_pix else "reconstruction"
    masked = image * (1 - removed) + 0.5 * removed
    pasted = image * (1 - removed) + predicted_image * removed
    return [(f"masked {mask_ratio:.0%}", masked), (title, pasted), ("original", image)]


# ---- attention ----


def attention_columns(image: Tensor, maps: Tensor) -> tuple[list[Column], list[list[str]]]:
    """Return columns of the image (B, C, H, W), and of the mean over heads and every head of attention `maps`
    (B, heads, h, w) laid over the image; and the captions of every row.

    A map's colors run from 0 (dark) to its largest weight (bright). The caption gives this weight, and the share of
    the attention that falls on patches at all.
    """
    heads = maps.shape[1]
    titled_maps = {"attention": maps} if heads == 1 else {f"mean of {heads} heads": maps.mean(1, keepdim=True)}
    if heads > 1:
        titled_maps |= {f"head {head + 1}": maps[:, head : head + 1] for head in range(heads)}
    columns = [("image", image)]
    columns += [(title, overlay(image, weights.squeeze(1))) for title, weights in titled_maps.items()]
    captions = [
        ["", *(f"peak {float(w[row].max()):.1%}\npatches {float(w[row].sum()):.0%}" for w in titled_maps.values())]
        for row in range(len(image))
    ]
    return columns, captions


# ---- visual words ----


def word_columns(image: Tensor, words: Tensor, tokenizer: VisualTokenizer) -> tuple[list[Column], list[list[str]]]:
    """Return columns of the image (B, C, H, W), its reconstruction from its words (B, h, w), every word decoded alone,
    and the index map; and the captions of every row."""
    with torch.no_grad():
        decoded = tokenizer.decode(words)
    used, places = words.unique(return_inverse=True)
    tiles = word_tiles(tokenizer, used)[places]  # (B, h, w, C, f, f)
    alone = tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    errors = (decoded - image).square().mean((1, 2, 3)).clamp(min=1e-10)
    captions = [
        ["", f"{-10 * math.log10(error):.1f} dB", "", f"{len(word_map.unique())} words in {word_map.numel()} places"]
        for error, word_map in zip(errors.tolist(), words, strict=True)
    ]
    index_map = upsample_to(image, word_colors(words))
    titles = ("image", "decoded from its words", "each word drawn alone", "index map\n(one color for each word)")
    return list(zip(titles, (image, decoded, alone, index_map), strict=True)), captions


def word_colors(words: Tensor) -> Tensor:
    """Return a color for every word of a map (B, h, w), (B, 3, h, w) in [0, 1]: always the same for the same word.

    Hue and brightness follow a sequence that spreads evenly, so neighbors among the words are far apart.
    """
    index = words.cpu().double()
    hue, value = index.mul(0.7548776662) % 1, index.mul(0.5698402910) % 1
    hsv = torch.stack([hue, 0.75 - 0.35 * value, 0.3 + 0.7 * value], dim=-1)
    return torch.from_numpy(hsv_to_rgb(hsv.numpy())).permute(0, 3, 1, 2).float()


@torch.no_grad()
def word_tiles(tokenizer: VisualTokenizer, words: Tensor, chunk: int = 256) -> Tensor:
    """Decode every word of a list (N,) alone, (N, C, factor, factor): the middle of a 3 x 3 map of this word."""
    side = tokenizer.factor
    decoded = [tokenizer.decode(part.view(-1, 1, 1).expand(-1, 3, 3)) for part in words.split(chunk)]
    return torch.cat(decoded)[:, :, side : 2 * side, side : 2 * side]


def codebook_image(tiles: Tensor, tile_size: int = 24) -> Tensor:
    """Arrange tiles (N, C, f, f) in the rows of a near-square image (1, C, H, W), with white lines between; each is
    enlarged by a whole number to at most `tile_size` pixels."""
    scale = max(1, tile_size // tiles.shape[-1])
    tiles = tiles.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    across = math.ceil(math.sqrt(2 * len(tiles)))
    blank = tiles.new_ones(-len(tiles) % across, *tiles.shape[1:])
    tiles = F.pad(torch.cat([tiles, blank]), (0, 2, 0, 2), value=1.0)
    return tiles.unflatten(0, (-1, across)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2).unsqueeze(0)


# ---- adversaries ----


def adversary_gallery(image: Tensor, adversary: DiscreteAdversary) -> Tensor:
    """Draw `adversary_columns` as one image (3, height, width) in [0, 1]."""
    return draw_gallery(adversary_columns(image, adversary))


def adversary_columns(image: Tensor, adversary: DiscreteAdversary, amplify: float = 4) -> list[Column]:
    """Return columns of images (B, C, H, W): clean, reconstruction from its words, adversarial, their difference
    (amplified around gray), and changed words (dark, over the pale image)."""
    changed = (adversary.words != adversary.adversarial_words).float().unsqueeze(1)
    changed_pixels = upsample_to(image, changed)
    pale = (0.7 + 0.3 * luminance(image)).expand(-1, 3, -1, -1)
    marked = torch.where(changed_pixels > 0, torch.tensor(CHANGED).view(3, 1, 1), pale)
    difference = 0.5 + amplify * (adversary.adversarial - adversary.reconstruction)
    return [
        ("clean", image),
        ("words, decoded", adversary.reconstruction),
        ("adversarial", adversary.adversarial),
        (f"difference × {amplify:g}\n(to the decoded)", difference),
        (f"changed words ({float(adversary.changed_share):.1%})", marked),
    ]


@torch.no_grad()
def most_changed_words(words: Tensor, adversarial_words: Tensor, most: int) -> list[tuple[int, int, int, int]]:
    """Return the `most` words that were changed most often between two maps of the same shape.

    A row holds the word, the word that it became most often, how often it was changed, and in how many places it was.
    """
    before, after = words.flatten(), adversarial_words.flatten()
    moved, times = before[before != after].unique(return_counts=True)
    rows = []
    for word, count in zip(moved.tolist(), times.tolist(), strict=True):
        became = after[(before == word) & (after != word)]
        rows.append((word, int(became.mode().values), count, int((before == word).sum())))
    return sorted(rows, key=lambda row: (-row[2], row[0]))[:most]


def changed_word_sheet(tokenizer: VisualTokenizer, rows: Sequence[tuple[int, int, int, int]], heading: str) -> Tensor:
    """Draw the words of `most_changed_words` beside the words that they became, (3, height, width) in [0, 1]."""
    pairs = torch.tensor(rows, device=tokenizer.codebook.device)
    before, after = (word_tiles(tokenizer, pairs[:, side]) for side in (0, 1))
    both = torch.cat([before, torch.ones_like(before[..., :1]), after], -1)
    texts = [f"{word} → {other}\n{times} of {places}" for word, other, times, places in rows]
    return draw_sheet(both, texts, heading)


def used_words(words: Tensor) -> tuple[Tensor, list[float]]:
    """Return the words of a map that are used, the most used first, (N,), and the share of places of each."""
    used, counts = words.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)
    return used[order], (counts[order] / words.numel()).tolist()


def galleries_due(epoch: int, context: RunContext) -> bool:
    """Return whether this rank draws galleries after this epoch: rank 0 does, and with a sharded model all ranks."""
    every = context.run.images_every
    return every > 0 and (epoch + 1) % every == 0 and (context.world.main or context.sharded)


def show_galleries(galleries: Mapping[str, Tensor], context: RunContext, log: RunLog, step: int) -> None:
    """Save galleries by name, (3, H, W) in [0, 1], drawn after `step` updates: the newest as images/NAME.png, and all
    of them in TensorBoard."""
    if not context.world.main:
        return
    folder = context.output / GALLERY_FOLDER
    folder.mkdir(exist_ok=True)
    for name, gallery in galleries.items():
        save_png(gallery, folder / f"{name}.png")
        log.image(name, gallery, step)
