"""Images of any size, for tokenizers that need multiples of their factor."""

import torch.nn.functional as F
from torch import Tensor

from mae_dat.models.tokenizer.base import VisualTokenizer


class PaddedTokenizer(VisualTokenizer):
    """A tokenizer for images of one size (height, width), which its factor need not divide.

    The right and bottom edges are repeated up to multiples of the factor, and decoded images are cropped back, so
    pixels and boxes do not move. Words are (B, ceil(height / factor), ceil(width / factor)).
    """

    def __init__(self, tokenizer: VisualTokenizer, size: tuple[int, int]) -> None:
        super().__init__()
        self.tokenizer, self.size = tokenizer, size
        self.factor, self.in_chans = tokenizer.factor, tokenizer.in_chans

    @property
    def codebook(self) -> Tensor:
        """The codes, (K, D)."""
        return self.tokenizer.codebook

    def latent(self, image: Tensor) -> Tensor:
        """Encode the padded image."""
        below, right = (-side % self.factor for side in self.size)
        return self.tokenizer.latent(F.pad(image, (0, right, 0, below), mode="replicate"))

    def pixels(self, quantized: Tensor) -> Tensor:
        """Decode, and crop to the size of the image."""
        height, width = self.size
        return self.tokenizer.pixels(quantized)[..., :height, :width]

    def check(self, image: Tensor) -> None:
        """Raise ConfigError unless `image` has the tokenizer's channels, ValueError unless it has the size."""
        self.tokenizer.check(image[..., : self.factor, : self.factor])
        if tuple(image.shape[-2:]) != self.size:
            raise ValueError(f"built for images of {self.size}, got {tuple(image.shape[-2:])}")
