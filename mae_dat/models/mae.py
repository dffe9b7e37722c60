"""Masked autoencoder for images (He et al. 2021, arXiv 2111.06377) and its named sizes.

Shapes: B images, C channels, H x W pixels, p pixel patch side, N = H/p * W/p patches in row-major order, K kept
patches, P = p * p * C pixels of a patch in (row, column, channel) order, D width of the encoder.

Pixels are floats in [0, 1]; the model normalizes them itself. The mask's noise is an argument, and the loss is a
function outside of the model, so that two views of an image, a figure or a test can share one mask.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError, unknown_name
from mae_dat.models.word_head import WordHead

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
NORM_PIX_EPSILON = 1e-6
layer_norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class ViTSize:
    """A vision transformer's size: image and patch side in pixels, width, blocks, attention heads, MLP width ratio."""

    img_size: int | tuple[int, int]
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


@dataclass(frozen=True)
class MaeSize:
    """An encoder and the width, blocks and heads of its decoder."""

    encoder: ViTSize
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16


VIT_SIZES: dict[str, ViTSize] = {
    "vit_tiny_patch16": ViTSize(224, 16, 192, 12, 3),
    "vit_small_patch16": ViTSize(224, 16, 384, 12, 6),
    "vit_base_patch16": ViTSize(224, 16, 768, 12, 12),
    "vit_large_patch16": ViTSize(224, 16, 1024, 24, 16),
    "vit_huge_patch14": ViTSize(224, 14, 1280, 32, 16),
    "vit_demo_patch8": ViTSize(64, 8, 128, 5, 4),
}
MAE_MODELS: dict[str, MaeSize] = {
    # Not in the paper: decoders with MAE's proportion to the encoder's width, and heads of 32 channels as MAE's.
    "mae_vit_tiny_patch16": MaeSize(VIT_SIZES["vit_tiny_patch16"], 128, 8, 4),
    "mae_vit_small_patch16": MaeSize(VIT_SIZES["vit_small_patch16"], 256, 8, 8),
    "mae_vit_base_patch16": MaeSize(VIT_SIZES["vit_base_patch16"]),
    "mae_vit_large_patch16": MaeSize(VIT_SIZES["vit_large_patch16"]),
    "mae_vit_huge_patch14": MaeSize(VIT_SIZES["vit_huge_patch14"]),
    "mae_vit_demo_patch8": MaeSize(VIT_SIZES["vit_demo_patch8"], 64, 1, 4),
}


def check_image_size(img_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return (H, W) in pixels. Raises ConfigError with the nearest valid sizes if the patch does not divide a side."""
    sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sides) != 2 or patch_size < 1:
        raise ConfigError(
            f"image size {img_size} with patch {patch_size}: give one side, or height and width, in pixels."
        )
    for side in sides:
        if side < patch_size or side % patch_size:
            below, above = side // patch_size * patch_size, (side // patch_size + 1) * patch_size
            valid = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"image size {sides[0]} x {sides[1]}: {side} is not divisible by patch size {patch_size}: use {valid}."
            )
    return sides[0], sides[1]


def pixel_statistics(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the default mean and deviation per channel of pixels in [0, 1]: ImageNet's for 3 channels, else 0.5."""
    if in_chans == 3:
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * in_chans, (0.5,) * in_chans


def _check_width(name: str, width: int, heads: int) -> None:
    if width % heads or width % 4:
        raise ConfigError(
            f"{name} {width} must be divisible by its {heads} heads and by 4 (sine-cosine position embedding)."
        )


def sincos_position_embedding(dim: int, grid_hw: tuple[int, int]) -> Tensor:
    """Compute the fixed 2-D sine-cosine embedding, float32 (1, 1 + h*w, dim), with a zero row for the class token.

    The first half of the width encodes x (the column), the second half y; each half holds the sines, then cosines, of
    position / 10000^(i / (dim/4)), computed in float64 (section "implementation details" of the paper's appendix).
    """
    assert dim % 4 == 0, "two axes, sine and cosine each"
    height, width = grid_hw
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    angles = [position.reshape(-1, 1) * frequency for position in (columns, rows)]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), patches]).unsqueeze(0).float()


def masked_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Compute the mean squared error of the masked patches (the paper's section 3, "reconstruction target"), a scalar.

    `prediction` and `target` (B, N, P), `mask` (B, N) with 1 for masked: the mean over a patch's pixels, then
    sum(loss * mask) / sum(mask). nan if nothing is masked.
    """
    loss = (prediction - target).square().mean(dim=-1)
    return (loss * mask).sum() / mask.sum()


def _transformer(size: ViTSize, in_chans: int) -> VisionTransformer:
    """Build timm's transformer of this size as a source of parts: no class token, no head, uninitialized weights."""
    return VisionTransformer(
        img_size=size.img_size,
        patch_size=size.patch_size,
        in_chans=in_chans,
        num_classes=0,
        global_pool="",
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=size.mlp_ratio,
        class_token=False,
        norm_layer=layer_norm,
        weight_init="skip",
    )


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class MaskedAutoencoder(nn.Module):
    """Encoder of the visible patches and a light decoder that predicts every patch; keys as in MAE's weights.

    `img_size` is a side or (H, W). `mean` and `std` (one value per channel, of pixels in [0, 1]) are by default
    ImageNet's for 3 channels, else 0.5. Raises ConfigError if `patch_size` does not divide `img_size`, or the heads do
    not divide a width.

    Examples:
        >>> import mae_dat, torch
        >>> model = mae_dat.MaskedAutoencoder(img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=4)
        >>> images = torch.rand(2, 3, 64, 64)
        >>> prediction, mask = model(images, 0.75, noise=torch.rand(2, model.num_patches))
        >>> prediction.shape, mask.mean()
        (torch.Size([2, 64, 192]), tensor(0.7500))
        >>> model.features(images).shape  # the class token and every patch
        torch.Size([2, 65, 48])
    """

    mean: Tensor
    std: Tensor
    classes: tuple[str, ...] | None = None
    """None: a masked autoencoder has no classes."""
    blocks: nn.Sequential
    decoder_blocks: nn.Sequential

    def __init__(  # noqa: PLR0913 - the sizes by their usual names
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.img_size = self.input_size = check_image_size(img_size, patch_size)
        _check_width("embed_dim", embed_dim, num_heads)
        _check_width("decoder_embed_dim", decoder_embed_dim, decoder_num_heads)
        self.patch_size, self.in_chans = patch_size, in_chans
        self.decoder_words: WordHead | None = None
        self.grid = (self.img_size[0] // patch_size, self.img_size[1] // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        default_mean, default_std = pixel_statistics(in_chans)
        self.register_buffer("mean", torch.tensor(mean or default_mean).view(in_chans, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std or default_std).view(in_chans, 1, 1), persistent=False)
        encoder = ViTSize(
            self.img_size, patch_size, embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio
        )
        self._build_encoder(encoder)
        decoder = dataclasses.replace(
            encoder, embed_dim=decoder_embed_dim, depth=decoder_depth, num_heads=decoder_num_heads
        )
        self._build_decoder(decoder)
        self._initialize_weights()

    def _build_encoder(self, size: ViTSize) -> None:
        parts = _transformer(size, self.in_chans)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.embed_dim))
        self.pos_embed = nn.Parameter(sincos_position_embedding(size.embed_dim, self.grid), requires_grad=False)
        self.patch_embed = parts.patch_embed
        self.blocks, self.norm = parts.blocks, parts.norm
        self.embed_dim = size.embed_dim

    def _build_decoder(self, size: ViTSize) -> None:
        parts = _transformer(size, self.in_chans)
        self.decoder_embed = nn.Linear(self.embed_dim, size.embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size.embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_position_embedding(size.embed_dim, self.grid), requires_grad=False)
        self.decoder_blocks, self.decoder_norm = parts.blocks, parts.norm
        self.decoder_pred = nn.Linear(size.embed_dim, self.patch_size**2 * self.in_chans)

    def _initialize_weights(self) -> None:
        self.apply(_initialize)
        # As in MAE: the patch projection is initialized as a linear layer; its bias keeps the convolution's default.
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def add_word_head(self, factor: int, num_words: int, pixels: bool = True) -> None:
        """Add a head that predicts the visual words of each patch: one for `factor` x `factor` pixels, of `num_words`.

        Without `pixels` only the words are predicted. Raises ConfigError if a patch is not divisible by the word size.
        """
        if self.patch_size % factor:
            raise ConfigError(
                f"a patch of {self.patch_size} pixels is not divisible into words of {factor} pixels: use a --model "
                "whose patch side is a multiple of the tokenizer's factor, another --tokenizer, or --target pixels."
            )
        per_patch = (self.patch_size // factor) ** 2
        self.decoder_words = WordHead(self.decoder_pred.in_features, per_patch, num_words)
        self.decoder_words.apply(_initialize)
        # DistributedDataParallel expects a gradient of every parameter that requires one.
        self.decoder_pred.requires_grad_(pixels)

    def patch_words(self, words: Tensor) -> Tensor:
        """Group visual words (B, h, w) by patch: (B, N, n), patches and the words of each row by row."""
        rows, columns = self.grid
        return rearrange(words, "b (h i) (w j) -> b (h w) (i j)", h=rows, w=columns)

    def normalize(self, image: Tensor) -> Tensor:
        """Normalize pixels in [0, 1], (B, C, H, W), to zero mean and unit deviation."""
        return (image - self.mean) / self.std

    def denormalize(self, image: Tensor) -> Tensor:
        """Invert `normalize`, without clipping: predictions may leave [0, 1]."""
        return image * self.std + self.mean

    def patchify(self, image: Tensor) -> Tensor:
        """Cut (B, C, H, W) into patches (B, N, P), row by row; pixels of a patch in (row, column, channel) order."""
        return rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch_size, q=self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Invert `patchify`: (B, N, P) to (B, C, H, W)."""
        height, width = self.grid
        side = self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=height, w=width, p=side, q=side)

    def target(self, image: Tensor, norm_pix: bool) -> Tensor:
        """Compute the prediction target (B, N, P) of images (B, C, H, W) in [0, 1].

        With `norm_pix` each patch has zero mean and unit (unbiased) variance: the paper's table 1d, "pixel (w/ norm)".
        """
        patches = self.patchify(self.normalize(image))
        if not norm_pix:
            return patches
        mean, deviation = self._patch_statistics(patches)
        return (patches - mean) / deviation

    def prediction_to_image(self, prediction: Tensor, image: Tensor, norm_pix: bool) -> Tensor:
        """Turn predicted patches (B, N, P) into unclipped pixels (B, C, H, W).

        With `norm_pix` the normalization is undone by the statistics of the true patches of `image`.
        """
        if norm_pix:
            mean, deviation = self._patch_statistics(self.patchify(self.normalize(image)))
            prediction = prediction * deviation + mean
        return self.denormalize(self.unpatchify(prediction))

    @staticmethod
    def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(patches, dim=-1, correction=1, keepdim=True)
        return mean, (variance + NORM_PIX_EPSILON).sqrt()

    def forward(
        self, image: Tensor, mask_ratio: float, noise: Tensor, words: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Predict every patch, (B, N, P) in the scale of `target`, and return the mask (B, N), 1 for masked patches.

        With visual words (B, N, n) return also the word head's results at the R masked patches of each image, in the
        order of their noise: negative log-likelihood and whether each word is the most probable one, both (B, R, n).
        """
        latent, mask, ids_restore = self.encode(image, mask_ratio, noise)
        features = self.decode(latent, ids_restore)
        prediction = self.decoder_pred(features)
        if words is None:
            return prediction, mask
        assert self.decoder_words is not None, "call add_word_head first"
        masked = ids_restore.argsort(dim=1)[:, latent.shape[1] - 1 :, None]
        features = features.gather(1, masked.expand(-1, -1, features.shape[-1]))
        words = words.gather(1, masked.expand(-1, -1, words.shape[-1]))
        return prediction, mask, *self.decoder_words(features, words)

    def encode(self, image: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the visible patches: latent (B, 1 + K, D) with the class token, mask (B, N), and ids_restore (B, N).

        The K = int(N * (1 - mask_ratio)) patches with the smallest `noise` (B, N) are visible, in that order; patch n
        of the image has index ids_restore[n] in the shuffled order. Raises ConfigError for a ratio that masks
        everything, ValueError for noise or an image of another shape.
        """
        self._check_shapes(image, noise)
        keep = int(self.num_patches * (1 - mask_ratio))
        if not 1 <= keep <= self.num_patches:
            raise ConfigError(f"mask ratio {mask_ratio} keeps {keep} of {self.num_patches} patches; use one in [0, 1).")
        ids_shuffle = noise.argsort(dim=1, stable=True)
        ids_restore = ids_shuffle.argsort(dim=1)
        mask = (ids_restore >= keep).to(image.dtype)
        return self._encode_patches(image, ids_shuffle[:, :keep]), mask, ids_restore

    def features(self, image: Tensor) -> Tensor:
        """Encode all patches: latent (B, 1 + N, D) of the class token and of the patches in row-major order."""
        every = torch.arange(self.num_patches, device=image.device).expand(image.shape[0], -1)
        return self._encode_patches(image, every)

    def _encode_patches(self, image: Tensor, visible: Tensor) -> Tensor:
        tokens = self.embed_patches(image, visible) + self.pos_embed[0, 1:][visible]
        # image.shape[0], not len(image), which would fix the batch size in an exported graph.
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(image.shape[0], -1, -1)
        return self.norm(self.blocks(torch.cat([cls_token, tokens], dim=1)))

    def embed_patches(self, image: Tensor, visible: Tensor) -> Tensor:
        """Embed only the patches with index `visible` (B, K): (B, K, D).

        Equal to the convolution `patch_embed.proj` followed by the selection, at K / N of its cost.
        """
        patches = self.patchify(self.normalize(image))
        patches = patches.gather(1, visible.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        weight = rearrange(self.patch_embed.proj.weight, "d c p q -> d (p q c)")
        return F.linear(patches, weight, self.patch_embed.proj.bias)

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Decode a latent (B, 1 + K, D) to features (B, N, decoder's width); mask tokens replace masked patches."""
        tokens = self.decoder_embed(latent)
        masked = self.num_patches + 1 - tokens.shape[1]
        mask_tokens = self.mask_token.expand(len(tokens), masked, -1)
        shuffled = torch.cat([tokens[:, 1:], mask_tokens], dim=1)
        patches = shuffled.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, shuffled.shape[-1]))
        tokens = torch.cat([tokens[:, :1], patches], dim=1) + self.decoder_pos_embed
        return self.decoder_norm(self.decoder_blocks(tokens))[:, 1:]

    def _check_shapes(self, image: Tensor, noise: Tensor) -> None:
        expected = (self.in_chans, *self.img_size)
        if image.ndim != 4 or tuple(image.shape[1:]) != expected:
            raise ValueError(
                f"image of shape {tuple(image.shape)}; this model takes (B, {', '.join(map(str, expected))})"
            )
        if tuple(noise.shape) != (len(image), self.num_patches):
            raise ValueError(f"mask noise of shape {tuple(noise.shape)}; expected {(len(image), self.num_patches)}")


def mae_arguments(name: str) -> dict[str, Any]:
    """Return the constructor arguments of the registered model `name`. Raises ConfigError, with the nearest names."""
    if name not in MAE_MODELS:
        raise unknown_name("MAE model", name, MAE_MODELS)
    size = MAE_MODELS[name]
    return {**vars(size.encoder), **{key: value for key, value in vars(size).items() if key != "encoder"}}


def build_mae(name: str, **overrides: Any) -> MaskedAutoencoder:
    """Build the registered model `name`; `overrides` replace constructor arguments (img_size, in_chans, depth, ...).

    Raises ConfigError, with the nearest names, for an unknown model.
    """
    return MaskedAutoencoder(**{**mae_arguments(name), **overrides})


def mask_noise(batch: int, num_patches: int, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """Draw uniform noise (B, N) that orders the patches of each image; pass a generator to make it reproducible."""
    return torch.rand(batch, num_patches, generator=generator, device=device)
