"""Batches, gradients and a counting tokenizer for tests of DAT steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mae_dat.config.groups import AugmentConfig
from mae_dat.data.image_set import Batch
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.training.objectives.classification import Classification

SIDE, CLASSES, IMAGES = 16, 5, 16


WIDTH = 3 * SIDE * SIDE


class CountedTokenizer(LightTokenizer):
    """Counts the images that it encodes, and those that it decodes."""

    encoded = decoded = 0

    def latent(self, image: Tensor) -> Tensor:
        self.encoded += len(image)
        return super().latent(image)

    def pixels(self, quantized: Tensor) -> Tensor:
        self.decoded += len(quantized)
        return super().pixels(quantized)


@pytest.fixture
def tokenizer() -> CountedTokenizer:
    torch.manual_seed(0)
    return CountedTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)).freeze()


def batch_of(count: int = IMAGES, seed: int = 0) -> Batch:
    source = torch.Generator().manual_seed(seed)
    return {
        "image": torch.rand(count, 3, SIDE, SIDE, generator=source),
        "label": torch.randint(CLASSES, (count,), generator=source),
        "index": torch.arange(count),
        "skipped": torch.zeros(count, dtype=torch.int64),
    }


def linear_net() -> nn.Module:
    """Three products of the same size and a small one: a unit of work is easy to count."""
    torch.manual_seed(1)
    layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH), nn.GELU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(WIDTH, CLASSES, bias=False))


class SmallNet(nn.Module):
    """Keeps the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv, self.drop, self.head = nn.Conv2d(3, 8, 3, 2), nn.Dropout(0.3), nn.Linear(8 * 49, CLASSES)
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image.detach().clone())
        return self.head(self.drop(self.conv(image).relu()).flatten(1))


def labels(**changes: Any) -> Classification:
    return Classification(AugmentConfig(**changes), CLASSES)


def generator(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


class Products(TorchDispatchMode):
    """Counts the multiplications of all matrix products."""

    multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            rows, columns = args[-2:]
            self.multiplications += rows.numel() * columns.shape[1]
        return func(*args, **(kwargs or {}))
