"""Galleries: what the autoencoder fills in, and what the adversary did to the visual words."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from mae_dat.attack import DiscreteAdversary
from mae_dat.files import atomic_write
from mae_dat.mae import MaskedAutoencoder

Column = tuple[str, Tensor]


def gallery(columns: Sequence[Column], cell_inches: float = 1.3) -> Tensor:
    """Draws columns of pictures (B, C, H, W) in [0, 1] under their titles, one row a picture; returns (3, height,
    width) in [0, 1]."""
    rows, width = len(columns[0][1]), len(columns)
    figure = Figure(figsize=(width * cell_inches, rows * cell_inches + 0.35), dpi=160, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    top = 1 - 0.32 / (rows * cell_inches + 0.35)
    axes = figure.subplots(
        rows,
        width,
        squeeze=False,
        gridspec_kw={"wspace": 0.04, "hspace": 0.04, "left": 0.01, "right": 0.99, "bottom": 0.01, "top": top},
    )
    for column, (title, pictures) in enumerate(columns):
        for row, picture in enumerate(_displayable(pictures)):
            axis = axes[row][column]
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, fontsize=8, pad=3)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _displayable(pictures: Tensor) -> np.ndarray:
    """(B, C, H, W) -> (B, H, W, 3): grey is repeated, further channels are left out."""
    pictures = pictures.detach().float().cpu().clamp(0, 1)
    pictures = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures[:, :3]
    if pictures.shape[1] == 2:
        pictures = torch.cat([pictures, torch.zeros_like(pictures[:, :1])], 1)
    return pictures.permute(0, 2, 3, 1).numpy()


def save_png(picture: Tensor, path: Path) -> None:
    """Writes (3, H, W) in [0, 1] as PNG, atomically."""
    pixels = picture.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def reconstruction_gallery(
    model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor, norm_pix: bool
) -> Tensor:
    """The drawn `reconstruction_columns`, (3, height, width) in [0, 1]."""
    return gallery(reconstruction_columns(model, image, mask_ratio, noise, norm_pix), 1.6)


@torch.no_grad()
def reconstruction_columns(
    model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor, norm_pix: bool
) -> list[Column]:
    """Masked / prediction pasted into the visible patches / original, each (B, C, H, W); grey where removed.

    With `norm_pix` the prediction is de-normalized by the true patches' mean and deviation, and the title says so.
    """
    training = model.training
    prediction, mask = model.eval()(image, mask_ratio, noise)
    model.train(training)
    drawn = model.prediction_to_image(prediction.float(), image, norm_pix)
    removed = model.unpatchify(mask.unsqueeze(-1).expand(-1, -1, prediction.shape[-1]))
    title = "reconstruction (true patch statistics)" if norm_pix else "reconstruction"
    masked = image * (1 - removed) + 0.5 * removed
    pasted = image * (1 - removed) + drawn * removed
    return [(f"masked {mask_ratio:.0%}", masked), (title, pasted), ("original", image)]


def adversary_gallery(image: Tensor, found: DiscreteAdversary) -> Tensor:
    """The drawn `adversary_columns`, (3, height, width) in [0, 1]."""
    return gallery(adversary_columns(image, found))


def adversary_columns(image: Tensor, found: DiscreteAdversary) -> list[Column]:
    """Clean / reconstruction from its words / adversarial / map of changed words (dark: changed), (B, C, H, W)."""
    changed = (found.words != found.adversarial_words).float().unsqueeze(1)
    shown = F.interpolate(changed, size=image.shape[-2:], mode="nearest")
    colors = matplotlib.colormaps["cividis_r"](shown.squeeze(1).cpu().numpy())[..., :3]
    words = torch.from_numpy(colors).permute(0, 3, 1, 2).float()
    share = f"changed words ({float(found.changed):.1%})"
    return [
        ("clean", image),
        ("words, decoded", found.reconstruction),
        ("adversarial", found.adversarial),
        (share, words),
    ]
