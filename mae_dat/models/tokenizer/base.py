"""The interface of all tokenizers: from images to visual words and back."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError, InputSizeError
from mae_dat.models.tokenizer.quantize import look_up, nearest_words
from mae_dat.runtime.device import require_compiler


class VisualTokenizer(nn.Module, ABC):
    """Discretizes images into visual words. Shapes: image (B, C, H, W) in [0, 1]; words (B, H / factor, W / factor),
    int64.

    `load_tokenizer` loads one. A subclass sets `factor`, `in_chans`, the modules `encoder` and `decoder` and `codebook`
    (K, D), and maps pixels to latents and quantized latents to pixels.

    Examples:
        >>> import mae_dat, torch
        >>> tokenizer = mae_dat.load_tokenizer()
        >>> isinstance(tokenizer, mae_dat.VisualTokenizer), tokenizer.factor, tokenizer.num_words
        (True, 4, 512)
        >>> words = tokenizer.encode(torch.rand(1, 3, 64, 64))
        >>> words.shape, tokenizer.decode(words).shape
        (torch.Size([1, 16, 16]), torch.Size([1, 3, 64, 64]))
    """

    factor: int
    in_chans: int = 3

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """The codes, (K, D)."""

    @abstractmethod
    def latent(self, image: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [0, 1] to a pre-quantization map (B, D, h, w)."""

    @abstractmethod
    def pixels(self, quantized: Tensor) -> Tensor:
        """Decode a map of codes (B, D, h, w) to images (B, C, H, W), *not yet clamped* to [0, 1]."""

    @property
    def num_words(self) -> int:
        """K, the size of the vocabulary."""
        return self.codebook.shape[0]

    def words_of(self, latent: Tensor) -> Tensor:
        """Return the nearest word at each position of a latent map: (B, D, h, w) -> (B, h, w)."""
        batch, dim, height, width = latent.shape
        flat = latent.permute(0, 2, 3, 1).reshape(-1, dim)
        return nearest_words(flat, self.codebook).view(batch, height, width)

    def encode(self, image: Tensor) -> Tensor:
        """Return the visual words (B, h, w) of images (B, C, H, W) in [0, 1]. Raises the errors of `check`."""
        self.check(image)
        with exact_float32():
            return self.words_of(self.latent(image))

    def decode(self, words: Tensor) -> Tensor:
        """Return the images (B, C, H, W) in [0, 1] of visual words (B, h, w)."""
        with exact_float32():
            return self.pixels(look_up(words, self.codebook)).clamp(0, 1)

    def reconstruct(self, image: Tensor) -> Tensor:
        """Compute Q(x) = decode(encode(x)), images (B, C, H, W) in [0, 1]."""
        return self.decode(self.encode(image))

    def check(self, image: Tensor) -> None:
        """Raise ConfigError unless `image` is (B, in_chans, H, W), InputSizeError unless `factor` divides H and W."""
        if image.ndim != 4 or image.shape[1] != self.in_chans:
            raise ConfigError(
                f"the tokenizer takes images (B, {self.in_chans}, H, W), got {tuple(image.shape)}: for other channels, "
                "train one with mae-dat tokenizer train."
            )
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            fitting = [max(side // self.factor, 1) * self.factor for side in (height, width)]
            raise InputSizeError(
                f"image size {height} x {width} is not divisible by the tokenizer's factor {self.factor}: "
                f"use --input_size {fitting[0]} {fitting[1]} or other multiples of {self.factor}."
            )

    def freeze(self) -> Self:
        """Set evaluation mode and exclude parameters from gradients, for all uses except training a tokenizer."""
        return self.eval().requires_grad_(False)

    def reducible(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Return the layers of the encoder and of the decoder that may compute in 16 bits.

        They exclude the first convolution, where bfloat16 would round away a DAT step (a fraction of a gray level), and
        the last layers, whose rounding would change words and pixels.
        """
        return [], []

    def prepare(
        self,
        device: torch.device,
        encoder: torch.dtype = torch.float32,
        decoder: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> Self:
        """Move a frozen tokenizer to its device in the form that is fastest there.

        The form: channels last, the `reducible` layers in these types, and, with `compiled`, norm and activation fused
        by torch.compile. Raises ConfigError without a C++ compiler.
        """
        self.to(device)
        self.to(memory_format=torch.channels_last)
        for layers, dtype in zip(self.reducible(), (encoder, decoder), strict=True):
            for layer in layers:
                layer.to(dtype)
        if compiled:
            require_compiler("--tokenizer_compile")
            self.get_submodule("encoder").compile()
            self.get_submodule("decoder").compile()
        return self


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Disable TF32 on NVIDIA GPUs inside the block, even if the run has enabled it.

    With TF32, words would differ from those of other machines.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = False
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def share_changed(words: Tensor, other: Tensor) -> Tensor:
    """Return the share of words that differ, a float32 scalar in [0, 1]."""
    return (words != other).to(torch.float32).mean()
