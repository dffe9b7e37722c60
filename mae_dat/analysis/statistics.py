"""Compute how far images are from clean ones: channel statistics in a model, feature distances, colors and spectrum.

Mao et al. 2022 explain DAT by the statistics of BatchNorm on clean and on adversarial images (Fig. 2) and by the
appearance of the perturbations (Fig. 3). Everything is accumulated in float64 over batches of images (B, C, H, W) in
[0, 1].
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CHANNEL_NORMS = (_BATCH_NORM, nn.GroupNorm, LayerNorm2d)  # their inputs have the channels second, not last
LEVELS = 255


class Moments:
    """Mean and variance of each of C channels, accumulated over batches."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_C = self.square_C = torch.zeros((), dtype=torch.float64)

    def add(self, values_MC: Tensor) -> None:
        """Add M values of each channel, (M, C)."""
        values_MC = values_MC.detach().double()
        self.count += len(values_MC)
        self.sum_C = self.sum_C.to(values_MC.device) + values_MC.sum(0)
        self.square_C = self.square_C.to(values_MC.device) + values_MC.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, (C,)."""
        return self.sum_C / self.count

    @property
    def variance(self) -> Tensor:
        """Variance of each channel, (C,), divided by the count as BatchNorm does."""
        return (self.square_C / self.count - self.mean.square()).clamp(min=0)


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose inputs are compared, by name: BatchNorm as in the paper, else LayerNorm and GroupNorm.

    Raises ConfigError for a model without any of them.
    """
    for kinds in ((_BATCH_NORM,), (nn.LayerNorm, nn.GroupNorm)):
        layers: dict[str, nn.Module] = {
            name: module for name, module in model.named_modules() if isinstance(module, kinds)
        }
        if layers:
            return layers
    raise ConfigError(f"{type(model).__name__} has no BatchNorm, LayerNorm or GroupNorm whose inputs can be compared.")


@contextmanager
def record_moments(layers: Mapping[str, nn.Module], moments: Mapping[str, Moments]) -> Iterator[None]:
    """Add the channels of each layer's inputs to the moments of the same name, in every forward pass of the block."""

    def add_inputs(layer: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        values = inputs[0]
        if isinstance(layer, _CHANNEL_NORMS) and values.ndim > 2:
            values = values.transpose(1, -1)
        moments[name].add(values.flatten(0, -2))

    handles = [layer.register_forward_pre_hook(partial(add_inputs, name=name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def correlation(first_C: Tensor, second_C: Tensor) -> float:
    """Compute Pearson's r of two vectors (C,) over the channels; nan if one of them is constant."""
    first, second = first_C.double() - first_C.double().mean(), second_C.double() - second_C.double().mean()
    return float((first @ second) / (first.norm() * second.norm()))


def correlations(clean: Mapping[str, Moments], other: Mapping[str, Moments]) -> dict[str, dict[str, float]]:
    """Compute Pearson's r of means and of variances over each layer's channels: the paper's Fig. 2."""
    return {
        name: {
            "mean": correlation(clean[name].mean, other[name].mean),
            "variance": correlation(clean[name].variance, other[name].variance),
        }
        for name in clean
    }


def frechet_distance(first_ND: Tensor, second_MD: Tensor) -> float:
    """Compute |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of two sets of features (Heusel et al. 2017, eq. 6: FID).

    It is biased upwards for few images: compare sets of the same size only. Raises ConfigError for fewer than 2.
    """
    if min(len(first_ND), len(second_MD)) < 2:
        raise ConfigError("a distance between feature distributions needs at least 2 images in both sets.")
    first, second = first_ND.double(), second_MD.double()
    first_DD, second_DD = torch.atleast_2d(first.T.cov()), torch.atleast_2d(second.T.cov())
    # The product of two positive semi-definite matrices has real eigenvalues >= 0; the clamp removes rounding errors.
    common = torch.linalg.eigvals(first_DD @ second_DD).real.clamp(min=0).sqrt().sum()
    gap = (first.mean(0) - second.mean(0)).square().sum()
    return float(gap + first_DD.trace() + second_DD.trace() - 2 * common)


def distinct_colors(image: Tensor) -> Tensor:
    """Count the different 8-bit colors in each image (B, C, H, W), int64 (B,): the paper's Fig. 3."""
    levels = (image * LEVELS).round().long()
    codes = torch.zeros_like(levels[:, 0])
    for channel in levels.unbind(1):
        codes = codes * (LEVELS + 1) + channel
    return torch.tensor([image_codes.unique().numel() for image_codes in codes])


def power_spectrum(delta: Tensor, bins: int = 16) -> Tensor:
    """Compute the mean power of a perturbation (B, C, H, W) by spatial frequency: (bins,), 0 to 0.5 cycles per pixel.

    Summed over all frequencies of an image, the power is the perturbation's mean square times H * W; the corners of the
    spectrum, above 0.5 cycles per pixel, are omitted.
    """
    height, width = delta.shape[-2:]
    power_HW = torch.fft.fft2(delta.double()).abs().square().mean((0, 1)) / (height * width)
    rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    radius_HW = torch.hypot(rows[:, None], columns[None, :]).to(delta.device)
    bin_index = (radius_HW * 2 * bins).long().flatten()
    inside = bin_index < bins
    bin_index, power = bin_index[inside], power_HW.flatten()[inside]
    total = torch.zeros(bins, dtype=torch.float64, device=delta.device).index_add_(0, bin_index, power)
    return total / torch.bincount(bin_index, minlength=bins).clamp(min=1)
