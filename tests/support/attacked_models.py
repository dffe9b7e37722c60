"""Models and tokenizers whose attacks have known results."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golden_rule import rule_tensor
from mae_dat.attacks.gradient import LossFn
from mae_dat.data.generated.draw import draw_image
from mae_dat.models.tokenizer import VisualTokenizer


class Mosaic(VisualTokenizer):
    """Words are the mean colors of 4 x 4 blocks on a grid of `levels` a channel: nothing learned, nothing random."""

    factor = 4

    def __init__(self, levels: int = 16) -> None:
        super().__init__()
        steps = torch.linspace(0, 1, levels)
        self.colors: Tensor
        self.register_buffer("colors", torch.cartesian_prod(steps, steps, steps))

    @property
    def codebook(self) -> Tensor:
        return self.colors

    def latent(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(image, self.factor)

    def pixels(self, quantized: Tensor) -> Tensor:
        return F.interpolate(quantized, scale_factor=self.factor)


class TinyClassifier(nn.Module):
    """The classifier of the recorded step (golden/dat_step.npz)."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        self.fc = nn.Linear(32, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.c2(self.c1(image).relu()).relu().mean((2, 3)))


def golden_classifier() -> TinyClassifier:
    net = TinyClassifier()
    scale = {key: 4 if value.ndim > 1 else 1 for key, value in net.state_dict().items()}
    net.load_state_dict({key: scale[key] * rule_tensor(key, v.shape) for key, v in net.state_dict().items()})
    return net


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def soft_cross_entropy(net: nn.Module, target: Tensor) -> LossFn:
    return lambda image: F.cross_entropy(net(image), target)


@functools.cache
def trained_classifier() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network that tells five shapes apart, with the 100 images (32 px) that it knows."""
    torch.manual_seed(0)
    drawn = [draw_image(0, "train", index, size=32) for index in range(200) if index % 10 < 5]
    image = torch.from_numpy(np.stack([picture.image for picture in drawn])).permute(0, 3, 1, 2).float() / 255
    label = torch.tensor([picture.shape for picture in drawn])
    net = nn.Sequential(
        *[nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()],
        *[nn.Flatten(), nn.Linear(32 * 64, 5)],
    )
    image = Mosaic().reconstruct(image)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(image), label).backward()
        optimizer.step()
    optimizer.zero_grad()
    assert (net(image).argmax(1) == label).float().mean() > 0.9
    return net, image, label


class Mixed(nn.Module):
    """A network in training, but for one frozen part with BatchNorm, and with a normalization in training."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        self.rest = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, image: Tensor) -> Tensor:
        return self.rest(self.frozen(image))
