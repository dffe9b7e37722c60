"""Encoder and decoder of a VQGAN: the keys and the function of taming-transformers, but faster.

Only the order of rounding differs: swish is one operation, attention is PyTorch's fused one, and upsampling by 2
followed by a 3 x 3 convolution is one transposed convolution of 4 x 4, which needs 4 multiplications per output instead
of 9. No level's feature map is stored for later.

Precision: `conv_in` stays in float32 when other layers are cast, because bfloat16 would round away a DAT step (a
fraction of a gray level); the encoder's last norm and convolution too, because their rounding would change words.
Shapes: maps are (B, C, H, W).
"""

import torch.nn.functional as F
from torch import Tensor, nn


def _group_norm(width: int) -> nn.GroupNorm:
    """Return the norm in front of every convolution and attention."""
    return nn.GroupNorm(32, width, eps=1e-6)


class ResidualBlock(nn.Module):
    """shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))), 3 x 3; the shortcut is 1 x 1 if the width changes."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _group_norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2, self.conv2 = _group_norm(width), nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, width, H, W) of x (B, width_in, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """x + attention over all positions, with one head as wide as the map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of x (B, width, H, W)."""
        h = self.norm(x)
        # (B, C, H, W) -> (B, 1, H * W, C): one head
        q, k, v = (part(h).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)
        return x + self.proj_out(h.reshape(x.shape))


class Downsample(nn.Module):
    """A 3 x 3 convolution of stride 2, padded on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, width, H / 2, W / 2) of x (B, width, H, W)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by 2 and a 3 x 3 convolution, as one transposed convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.kernel: Tensor | None
        self.register_buffer("kernel", None, persistent=False)

    def freeze(self) -> None:
        """Fold the kernel once for all calls; the weights must not change afterwards."""
        self.kernel = _fold_kernel(self.conv.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, width, 2 H, 2 W) of x (B, width, H, W)."""
        kernel = _fold_kernel(self.conv.weight) if self.kernel is None else self.kernel
        return F.conv_transpose2d(x, kernel, self.conv.bias, stride=2, padding=1)


def _fold_kernel(kernel: Tensor) -> Tensor:
    """Return the kernel (C_in, C_out, 4, 4) of a transposed convolution that upsamples by 2 and applies `kernel`
    (C_out, C_in, 3, 3)."""
    # Upsampling is itself a transposed convolution with 2 x 2 ones; the two kernels are convolved with each other.
    mirrored = kernel.float().flip(2, 3).transpose(0, 1)
    return F.avg_pool2d(F.pad(mirrored, (1, 1, 1, 1)), 2, stride=1, divisor_override=1).to(kernel.dtype)


class Level(nn.Module):
    """The blocks at one resolution, each followed by attention if `attention`, and the step to the next resolution."""

    def __init__(self, width_in: int, width: int, num_blocks: int, attention: bool, step: dict[str, nn.Module]) -> None:
        super().__init__()
        widths = [width_in, *[width] * (num_blocks - 1)]
        self.block = nn.ModuleList(ResidualBlock(before, width) for before in widths)
        self.attn = nn.ModuleList(AttentionBlock(width) for _ in widths if attention)
        for name, module in step.items():
            self.add_module(name, module)
        self.step = tuple(step)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (B, width, ...) of x (B, width_in, H, W), at the next resolution if there is a step."""
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in self.step:
            x = self.get_submodule(name)(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResidualBlock(width, width), ResidualBlock(width, width)
        self.attn_1 = AttentionBlock(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the shape of x (B, width, H, W)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """(B, in_chans, H, W) in [-1, 1] -> (B, z_channels, H / factor, W / factor).

    `levels` holds for each resolution, from the highest to the lowest, the width and whether it has attention.
    """

    def __init__(
        self, in_chans: int, stem: int, levels: list[tuple[int, bool]], num_blocks: int, z_channels: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_chans, stem, 3, padding=1)
        self.down = nn.ModuleList()
        before = stem
        for index, (width, attention) in enumerate(levels):
            step: dict[str, nn.Module] = {"downsample": Downsample(width)} if index < len(levels) - 1 else {}
            self.down.append(Level(before, width, num_blocks, attention=attention, step=step))
            before = width
        self.mid = Middle(before)
        self.norm_out = _group_norm(before)
        self.conv_out = nn.Conv2d(before, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the latent (B, z_channels, H / factor, W / factor) of pixels x in [-1, 1]."""
        h = self.conv_in(x).to(self.mid.block_1.conv1.weight.dtype)
        for level in self.down:
            h = level(h)
        h = self.mid(h).to(self.conv_out.weight.dtype)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, out_chans, h * factor, w * factor), about [-1, 1]. `levels` as the encoder's."""

    def __init__(self, out_chans: int, levels: list[tuple[int, bool]], num_blocks: int, z_channels: int) -> None:
        super().__init__()
        before = levels[-1][0]
        self.conv_in = nn.Conv2d(z_channels, before, 3, padding=1)
        self.mid = Middle(before)
        self.up = nn.ModuleList()
        for index, (width, attention) in reversed(list(enumerate(levels))):
            step: dict[str, nn.Module] = {"upsample": Upsample(width)} if index else {}
            self.up.insert(0, Level(before, width, num_blocks + 1, attention=attention, step=step))
            before = width
        self.norm_out = _group_norm(before)
        self.conv_out = nn.Conv2d(before, out_chans, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Return pixels (B, out_chans, h * factor, w * factor) of the latent z."""
        h = self.mid(self.conv_in(z).to(self.mid.block_1.conv1.weight.dtype))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)).to(self.conv_out.weight.dtype))
