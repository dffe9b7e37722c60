"""How far pictures are from clean ones: channel statistics inside a network, distance of features, colours, spectrum.

Mao et al. 2022 explain DAT by the statistics of BatchNorm on clean and on adversarial pictures (Fig. 2) and by what the
perturbations look like (Fig. 3). Everything is gathered in float64 over batches of pictures (B, C, H, W) in [0, 1].
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_CHANNEL_NORMS = (_BATCH_NORM, nn.GroupNorm, LayerNorm2d)  # channels stand second
LEVELS = 255


class Moments:
    """Mean and variance of each of C channels, gathered over batches."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_C = self.square_C = torch.zeros((), dtype=torch.float64)

    def add(self, values_MC: Tensor) -> None:
        """M further values of each channel."""
        values_MC = values_MC.detach().double()
        self.count += len(values_MC)
        self.sum_C = self.sum_C.to(values_MC.device) + values_MC.sum(0)
        self.square_C = self.square_C.to(values_MC.device) + values_MC.square().sum(0)

    @property
    def mean(self) -> Tensor:
        """(C,)."""
        return self.sum_C / self.count

    @property
    def variance(self) -> Tensor:
        """(C,), as BatchNorm normalizes by it: divided by the count."""
        return (self.square_C / self.count - self.mean.square()).clamp(min=0)


def norm_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The layers whose inputs are looked at: BatchNorm's as in the paper, of a network without them LayerNorm's or
    GroupNorm's. Raises ConfigError for a network that has none."""
    for kinds in ((_BATCH_NORM,), (nn.LayerNorm, nn.GroupNorm)):
        found: dict[str, nn.Module] = {
            name: module for name, module in network.named_modules() if isinstance(module, kinds)
        }
        if found:
            return found
    raise ConfigError(f"{type(network).__name__} has no BatchNorm, LayerNorm or GroupNorm to compare the inputs of.")


@contextmanager
def record_moments(layers: Mapping[str, nn.Module], found: Mapping[str, Moments]) -> Iterator[None]:
    """Adds the channels of the layers' inputs, over the forwards within the block, to the moments of the same name."""

    def hook(name: str, layer: nn.Module) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            second = isinstance(layer, _CHANNEL_NORMS) and inputs[0].ndim > 2
            found[name].add((inputs[0].transpose(1, -1) if second else inputs[0]).flatten(0, -2))

        return add

    handles = [layer.register_forward_pre_hook(hook(name, layer)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def correlation(one_C: Tensor, other_C: Tensor) -> float:
    """Pearson's r of two vectors over the channels; nan where one of them is constant."""
    one, other = one_C.double() - one_C.double().mean(), other_C.double() - other_C.double().mean()
    return float((one @ other) / (one.norm() * other.norm()))


def correlations(clean: Mapping[str, Moments], other: Mapping[str, Moments]) -> dict[str, dict[str, float]]:
    """Pearson's r of means and of variances over each layer's channels: the paper's Fig. 2."""
    return {
        name: {
            "mean": correlation(clean[name].mean, other[name].mean),
            "variance": correlation(clean[name].variance, other[name].variance),
        }
        for name in clean
    }


def frechet_distance(one_ND: Tensor, other_MD: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) of two sets of features, as in FID (Heusel et al. 2017, eq. 6).

    Biased upwards for few pictures: compare sets of the same size only. Raises ConfigError for fewer than 2.
    """
    if min(len(one_ND), len(other_MD)) < 2:
        raise ConfigError("a distance of feature distributions needs at least 2 pictures on either side.")
    one, other = one_ND.double(), other_MD.double()
    first, second = torch.atleast_2d(one.T.cov()), torch.atleast_2d(other.T.cov())
    # The product of two positive matrices has real eigenvalues that are not negative; rounding makes them almost so.
    common = torch.linalg.eigvals(first @ second).real.clamp(min=0).sqrt().sum()
    gap = (one.mean(0) - other.mean(0)).square().sum()
    return float(gap + first.trace() + second.trace() - 2 * common)


def distinct_colors(image: Tensor) -> Tensor:
    """Different 8-bit colours in each picture, int64 (B,): the paper's Fig. 3 counts them."""
    levels = (image * LEVELS).round().long()
    codes = torch.zeros_like(levels[:, 0])
    for channel in levels.unbind(1):
        codes = codes * (LEVELS + 1) + channel
    return torch.tensor([one.unique().numel() for one in codes])


def power_spectrum(delta: Tensor, bins: int = 16) -> Tensor:
    """Mean power of a perturbation (B, C, H, W) by spatial frequency, (bins,) from 0 to 0.5 cycles a pixel.

    Summed over a picture's frequencies it is the perturbation's mean square times H * W; corners beyond 0.5 are left
    out.
    """
    height, width = delta.shape[-2:]
    power_HW = torch.fft.fft2(delta.double()).abs().square().mean((0, 1)) / (height * width)
    rows, columns = torch.fft.fftfreq(height), torch.fft.fftfreq(width)
    radius = torch.hypot(rows[:, None], columns[None, :]).to(delta.device)
    place = (radius * 2 * bins).long().flatten()
    inside = place < bins
    place, power = place[inside], power_HW.flatten()[inside]
    total = torch.zeros(bins, dtype=torch.float64, device=delta.device).index_add_(0, place, power)
    return total / torch.bincount(place, minlength=bins).clamp(min=1)
