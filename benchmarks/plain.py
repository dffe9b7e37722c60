"""The baselines: the same work as the papers' released code does it, operation by operation.

Full patch embedding of which the kept patches are then gathered, attention by an explicit softmax, AdamW with torch's
defaults, the loss read back and the device waited for in every step; float16 autocast with a gradient scaler on a GPU,
float32 on a CPU. In DAT, tokenizer and attack are float32, the attack fills the gradients of all parameters, a forward
is thrown away, and the quantizer builds the whole matrix of distances. Shapes as in mae_dat/models/mae.py.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from mae_dat.attacks.gradient import project, unit
from mae_dat.models.mae import MaskedAutoencoder, masked_mse
from mae_dat.models.tokenizer import VQGAN_PRESETS, VQGANConfig

VQ_F8 = VQGAN_PRESETS["vq-f8"]


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """TF32 as torch sets it, for convolutions only, and cuDNN's search for algorithms, which the released code turns
    on; whatever our own code has set meanwhile comes back."""
    cudnn = torch.backends.cudnn
    wanted = ((cudnn, "allow_tf32", True), (torch.backends.cuda.matmul, "allow_tf32", False))
    settings: list[tuple[Any, str, Any]] = [*wanted, (cudnn, "benchmark", True)]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def explicit_attention(model: nn.Module) -> None:
    """Switches timm's attention layers from the fused kernel to softmax(q k^T) v, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False


class Trainer:
    """Updates of a model as the released code makes them."""

    def __init__(self, model: nn.Module, fused_attention: bool = False) -> None:
        if not fused_attention:
            explicit_attention(model)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.device.type == "cuda")

    def autocast(self) -> torch.autocast:
        """float16 on a GPU, nothing on a CPU."""
        return torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")

    def update(self, loss: Tensor) -> float:
        """Backward and update with the gradient's norm; the loss as a number."""
        value = loss.item()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.stack([parameter.grad.norm() for parameter in self.parameters if parameter.grad is not None]).norm()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return value


def mae_loss(model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor) -> Tensor:
    """The MAE loss with all patches embedded by the convolution before most are dropped."""
    tokens = model.patch_embed(model.normalize(image)) + model.pos_embed[:, 1:]
    keep = int(model.num_patches * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept = tokens.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, tokens.shape[-1]))
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(image), -1, -1)
    latent = model.norm(model.blocks(torch.cat([cls_token.to(kept.dtype), kept], dim=1)))
    mask = (ids_restore >= keep).float()
    return masked_mse(decode(model, latent, ids_restore), model.target(image, norm_pix=False), mask)


def decode(model: MaskedAutoencoder, latent: Tensor, ids_restore: Tensor) -> Tensor:
    """Prediction (B, N, P) from a latent (B, 1 + K, D)."""
    tokens = model.decoder_embed(latent)
    removed = model.num_patches + 1 - tokens.shape[1]
    filled = torch.cat([tokens[:, 1:], model.mask_token.to(tokens.dtype).repeat(len(tokens), removed, 1)], dim=1)
    patches = filled.gather(1, ids_restore.unsqueeze(-1).repeat(1, 1, filled.shape[-1]))
    tokens = torch.cat([tokens[:, :1], patches], dim=1) + model.decoder_pos_embed
    return model.decoder_pred(model.decoder_norm(model.decoder_blocks(tokens)))[:, 1:]


@torch_defaults()
def mae_step(model: MaskedAutoencoder, trainer: Trainer, image: Tensor, noise: Tensor) -> float:
    """One pretraining step, mask ratio 0.75."""
    with trainer.autocast():
        loss = mae_loss(model, image, 0.75, noise)
    return trainer.update(loss)


@torch_defaults()
def finetuning_step(model: nn.Module, trainer: Trainer, image: Tensor, target: Tensor) -> float:
    """One fine-tuning step with soft targets (B, classes)."""
    with trainer.autocast():
        loss = F.cross_entropy(model(image), target)
    return trainer.update(loss)


class ReleasedVQGAN(nn.Module):
    """A VQGAN from taming-transformers' own encoder and decoder, frozen; keys as in the published weights.

    Maps images (B, 3, H, W) in [0, 1] to their reconstruction in eager float32 and NCHW, with the full matrix.
    """

    def __init__(self, config: VQGANConfig = VQ_F8) -> None:
        from taming.modules.diffusionmodules.model import Decoder, Encoder

        super().__init__()
        shape = {"z_channels": config.z_channels, "ch": config.ch, "ch_mult": config.ch_mult, "resolution": 256}
        shape |= {"num_res_blocks": config.num_res_blocks, "attn_resolutions": config.attn_resolutions}
        with contextlib.redirect_stdout(io.StringIO()):  # the Decoder prints its shape
            self.encoder = Encoder(in_channels=3, out_ch=3, double_z=False, **shape)
            self.decoder = Decoder(in_channels=3, out_ch=3, **shape)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(config.num_words, config.word_dim)})
        self.quant_conv = nn.Conv2d(config.z_channels, config.word_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.word_dim, config.z_channels, 1)
        self.eval().requires_grad_(False)

    @torch_defaults()
    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        codebook = self.quantize["embedding"].weight
        latent = self.quant_conv(self.encoder(2 * image - 1))
        quantized = F.embedding(full_matrix_words(latent, codebook), codebook).permute(0, 3, 1, 2).contiguous()
        return ((self.decoder(self.post_quant_conv(quantized)) + 1) / 2).clamp(0, 1)


def full_matrix_words(latent: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codes by the (M, K) matrix of squared distances, whole in memory; (B, D, h, w) -> (B, h, w)."""
    batch, dim, height, width = latent.shape
    flat = latent.permute(0, 2, 3, 1).reshape(-1, dim)
    distance = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
    return distance.argmin(1).view(batch, height, width)


@torch_defaults()
def dat_step(
    model: nn.Module,
    trainer: Trainer,
    tokenizer: Callable[[Tensor], Tensor],
    image: Tensor,
    target: Tensor,
    noise: Tensor,
    eps: float = 0.1,
) -> float:
    """One released DAT step with its wasted work: the attack fills every parameter's gradient, and a forward follows it
    for nothing. `tokenizer` maps images to reconstructions; `noise`, shaped as the image, is the random start's."""
    with trainer.autocast():
        clean_loss = F.cross_entropy(model(image), target)
    center = tokenizer(image)
    point = (center + eps * unit(noise)).clamp(0, 1).requires_grad_()
    F.cross_entropy(model(point), target).backward()
    assert point.grad is not None
    delta = project(point.detach() + eps * unit(point.grad) - center, eps)
    attacked = (center + delta).clamp(0, 1)
    model(attacked)  # thrown away
    adversarial = tokenizer(attacked)
    with trainer.autocast():
        loss = clean_loss + F.cross_entropy(model(adversarial), target)
    return trainer.update(loss)
