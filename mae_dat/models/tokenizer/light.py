"""The light tokenizer: residual blocks after a space-to-depth stem, for small images and small machines.

All convolutions run at 1 / factor of the resolution, so a 64 px reconstruction costs 0.3 GFLOP, a thousandth of VQ-f8's
at 224 px.
"""

import dataclasses
import json
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.storage.weight_files import WeightsFile, check_keys, write_weights


@dataclasses.dataclass(frozen=True)
class LightConfig:
    """Size of a light tokenizer. The defaults are the embedded one: 2.0 MB of weights, factor 4, 512 words."""

    factor: int = 4
    """Pixels per word along a side."""
    width: int = 64
    """Channels of the residual blocks."""
    encoder_blocks: int = 2
    decoder_blocks: int = 4
    num_words: int = 512
    """Size of the codebook."""
    word_dim: int = 8
    """Dimension of a code."""
    in_chans: int = 3


_LARGEST = {
    "factor": 64,
    "width": 4096,
    "encoder_blocks": 256,
    "decoder_blocks": 256,
    "num_words": 1_000_000,
    "word_dim": 4096,
    "in_chans": 1024,
}


class LightBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))), 3 x 3, same width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block: (B, width, h, w) to the same shape."""
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class MixedPrecisionLayers(nn.Sequential):
    """Layers one after the other, each computed in the type of its own weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers to a map (B, C, H, W)."""
        for layer in self:
            weight = next(layer.parameters(), None)
            x = layer(x if weight is None else x.to(weight.dtype))
        return x


class LightTokenizer(VisualTokenizer):
    """VisualTokenizer of a few hundred thousand parameters. Works on any height and width divisible by the factor."""

    def __init__(self, config: LightConfig = LightConfig()) -> None:
        super().__init__()
        self.config = config
        self.factor, self.in_chans = config.factor, config.in_chans
        width, pixels = config.width, config.in_chans * config.factor**2
        self.encoder = MixedPrecisionLayers(
            nn.PixelUnshuffle(config.factor),
            nn.Conv2d(pixels, width, 3, padding=1),
            *[LightBlock(width) for _ in range(config.encoder_blocks)],
            nn.Conv2d(width, config.word_dim, 1),
        )
        self.decoder = MixedPrecisionLayers(
            nn.Conv2d(config.word_dim, width, 3, padding=1),
            *[LightBlock(width) for _ in range(config.decoder_blocks)],
            nn.Conv2d(width, pixels, 3, padding=1),
            nn.PixelShuffle(config.factor),
        )
        self.codes = nn.Parameter(torch.randn(config.num_words, config.word_dim))

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, D)."""
        return self.codes

    def latent(self, image: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [0, 1] to a pre-quantization map (B, D, h, w)."""
        return self.encoder(2 * image - 1)

    def pixels(self, quantized: Tensor) -> Tensor:
        """Decode a map of codes (B, D, h, w) to images (B, C, H, W), roughly in [0, 1]."""
        return (self.decoder(quantized) + 1) / 2

    def reducible(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the residual blocks."""
        return [*self.encoder][2:-1], [*self.decoder][1:-2]

    def save(self, path: Path) -> None:
        """Write a safetensors file with the configuration, so that the file is enough to rebuild the tokenizer."""
        write_weights(path, dict(self.state_dict()), self.metadata)

    @property
    def metadata(self) -> dict[str, str]:
        """What a safetensors file needs besides the tensors to rebuild the tokenizer."""
        return {"tokenizer": "light", "config": json.dumps(dataclasses.asdict(self.config))}

    @classmethod
    def from_file(cls, path: Path, file: WeightsFile) -> Self:
        """Rebuild a saved tokenizer. Raises CheckpointError if the file is not one."""
        try:
            config = LightConfig(**json.loads(file.metadata["config"]))
            _check_config(config)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is not a light tokenizer: {error}. Train one with mae-dat tokenizer train."
            ) from error
        with torch.device("meta"):  # nothing is allocated before the shapes are known to agree
            expected = cls(config).state_dict()
        check_keys(
            path,
            expected,
            file.tensors,
            "its configuration and weights disagree: train it again with mae-dat tokenizer train",
        )
        tokenizer = cls(config)
        tokenizer.load_state_dict(file.tensors)
        return tokenizer


def _check_config(config: LightConfig) -> None:
    """Raise ValueError for a configuration from a file with another type, or far from those of real tokenizers."""
    for name, value in dataclasses.asdict(config).items():
        least = 0 if name.endswith("_blocks") else 1
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST[name]:
            raise ValueError(f"{name} must be a whole number from {least} to {_LARGEST[name]:,}")
