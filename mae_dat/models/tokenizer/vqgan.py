"""VQGANs with the published weights' key names: taming-transformers, latent-diffusion, and DAT's own (easyrobust).

The configuration is derived from the shapes in the checkpoint, so a file is enough; `VQGAN_PRESETS` lists the published
ones.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.models.tokenizer.blocks import Decoder, Encoder, Upsample
from mae_dat.storage.weight_files import check_keys

# taming's configurations place attention by resolution, relative to 256 px in all published models.
_REFERENCE_RESOLUTION = 256
# Tensors of the training: losses, averages, and the colors in which taming draws segmentations.
_TRAINING_KEYS = ("loss.", "model_ema.", "colorize")


@dataclasses.dataclass(frozen=True)
class VQGANConfig:
    """Architecture of a VQGAN. The default is the tokenizer of DAT's experiments, latent-diffusion's vq-f8 (67.7 M
    parameters)."""

    num_words: int = 16384
    word_dim: int = 4
    z_channels: int = 4
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (32,)
    in_chans: int = 3
    gumbel: bool = False
    """The quantizer scores words by a 1 x 1 convolution instead of by distance; we take its argmax, never a sample."""

    @property
    def factor(self) -> int:
        """Pixels per word along a side."""
        return int(2 ** (len(self.ch_mult) - 1))


VQGAN_PRESETS: dict[str, VQGANConfig] = {
    "vq-f8": VQGANConfig(),
    "vq-f8-n256": VQGANConfig(num_words=256),
    "gumbel-f8": VQGANConfig(8192, 256, 256, ch_mult=(1, 1, 2, 4), gumbel=True),
    "imagenet-f16-1024": VQGANConfig(1024, 256, 256, ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,)),
    "imagenet-f16-16384": VQGANConfig(16384, 256, 256, ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,)),
    "vq-f16": VQGANConfig(16384, 8, 8, ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,)),
}


class NearestQuantizer(nn.Module):
    """Holds the codebook under the published key `quantize.embedding.weight`."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_words, config.word_dim)


class GumbelQuantizer(nn.Module):
    """Holds `quantize.proj` (word scores from the latent) and `quantize.embed.weight` of taming's Gumbel models."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.z_channels, config.num_words, 1)
        self.embed = nn.Embedding(config.num_words, config.word_dim)


class VQGAN(VisualTokenizer):
    """The paper's tokenizer. It scales pixels to [-1, 1] and back itself, and has no position embedding, so every image
    size divisible by the factor works."""

    def __init__(self, config: VQGANConfig = VQGANConfig()) -> None:
        super().__init__()
        self.config = config
        self.factor, self.in_chans = config.factor, config.in_chans
        levels = [
            (config.ch * mult, _REFERENCE_RESOLUTION >> level in config.attn_resolutions)
            for level, mult in enumerate(config.ch_mult)
        ]
        self.encoder = Encoder(
            config.in_chans, config.ch, levels, num_blocks=config.num_res_blocks, z_channels=config.z_channels
        )
        self.decoder = Decoder(config.in_chans, levels, config.num_res_blocks, config.z_channels)
        self.quantize = GumbelQuantizer(config) if config.gumbel else NearestQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels if config.gumbel else config.word_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.word_dim, config.z_channels, 1)

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, D)."""
        if isinstance(self.quantize, GumbelQuantizer):
            return self.quantize.embed.weight
        assert isinstance(self.quantize, NearestQuantizer)
        return self.quantize.embedding.weight

    def latent(self, image: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [0, 1] to a pre-quantization map (B, D, h, w)."""
        return self.quant_conv(self.encoder(2 * image - 1))

    def words_of(self, latent: Tensor) -> Tensor:
        """Return the words (B, h, w) of a map (B, D, h, w): nearest codes, or the argmax of a Gumbel model's scores."""
        if isinstance(self.quantize, GumbelQuantizer):
            # One image at a time: the K score maps of a batch would take gigabytes.
            return torch.cat([self.quantize.proj(sample).argmax(1) for sample in latent.split(1)])
        return super().words_of(latent)

    def pixels(self, quantized: Tensor) -> Tensor:
        """Decode a map of codes (B, D, h, w) to images (B, C, H, W), roughly in [0, 1]."""
        return (self.decoder(self.post_quant_conv(quantized)) + 1) / 2

    def reducible(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return all layers between the first and the last convolution; of the encoder without the last norm."""
        names = ["encoder.down", "encoder.mid"], ["decoder.mid", "decoder.up", "decoder.norm_out"]
        encoder, decoder = ([self.get_submodule(name) for name in part] for part in names)
        return encoder, decoder

    def prepare(self, *arguments: Any, **options: Any) -> Self:
        """Prepare as the base class does, and fold the kernels of the upsampling layers once."""
        for module in self.modules():
            if isinstance(module, Upsample):
                module.freeze()
        return super().prepare(*arguments, **options)

    @classmethod
    def from_state_dict(cls, path: Path | str, tensors: Mapping[str, Tensor]) -> Self:
        """Build the model from the shapes of the tensors, and load them; every key has to match.

        `loss.*` (the training losses), `model_ema.*` and `colorize` are ignored. Raises CheckpointError with the
        missing and unexpected keys.
        """
        weights = {key: value for key, value in tensors.items() if not key.startswith(_TRAINING_KEYS)}
        config = read_config(path, weights)
        with torch.device("meta"):
            expected = cls(config).state_dict()
        check_keys(path, expected, weights, "use a VQGAN of taming-transformers, latent-diffusion or easyrobust")
        model = cls(config)
        model.load_state_dict(weights)
        return model


def read_config(path: Path | str, tensors: Mapping[str, Tensor]) -> VQGANConfig:
    """Derive the architecture from keys and shapes. Raises CheckpointError if they are not those of a VQGAN."""
    gumbel = "quantize.proj.weight" in tensors
    codebook_key = "quantize.embed.weight" if gumbel else "quantize.embedding.weight"
    required = [codebook_key, "encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_out.weight"]
    absent = [key for key in required if key not in tensors]
    if absent:
        first_keys = ", ".join(list(tensors)[:6])
        raise CheckpointError(
            f"{path} is not a VQGAN: it lacks {', '.join(absent)} and contains {first_keys}, ... Use a VQGAN of "
            "taming-transformers, latent-diffusion or easyrobust."
        )
    ch, in_chans = tensors["encoder.conv_in.weight"].shape[:2]
    levels = 1 + max(_numbers(tensors, r"encoder\.down\.(\d+)\."))
    widths = [tensors.get(f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)]
    if any(width is None for width in widths):
        raise CheckpointError(f"{path}: the encoder's levels are incomplete (encoder.down.N.block.0.conv1.weight).")
    return VQGANConfig(
        num_words=tensors[codebook_key].shape[0],
        word_dim=tensors[codebook_key].shape[1],
        z_channels=tensors["encoder.conv_out.weight"].shape[0],
        ch=ch,
        ch_mult=tuple(width.shape[0] // ch for width in widths if width is not None),
        num_res_blocks=1 + max(_numbers(tensors, r"encoder\.down\.0\.block\.(\d+)\.")),
        attn_resolutions=tuple(
            _REFERENCE_RESOLUTION >> level for level in sorted(_numbers(tensors, r"encoder\.down\.(\d+)\.attn\."))
        ),
        in_chans=in_chans,
        gumbel=gumbel,
    )


def _numbers(tensors: Mapping[str, Tensor], pattern: str) -> set[int]:
    numbers = {int(match[1]) for key in tensors if (match := re.match(pattern, key))}
    return numbers or ({0} if "attn" not in pattern else set())
