"""The baselines: the same training steps written plainly, in eager float32, as the papers' released code does them.

Full patch embedding of which the kept patches are then gathered, attention by explicit softmax, an unfused AdamW, the
loss read back in every step; in DAT, parameter gradients filled during the attack, a forward that is thrown away, and
the whole matrix of distances in the quantizer. Shapes as in mae_dat/mae.py.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from mae_dat.attack import project, unit
from mae_dat.mae import MaskedAutoencoder, masked_mse
from mae_dat.tokenizer import VisualTokenizer


def explicit_attention(model: nn.Module) -> None:
    """Switches timm's attention layers from the fused kernel to softmax(q k^T) v, in place."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False


def unfused_adamw(model: nn.Module) -> torch.optim.AdamW:
    """AdamW as a loop over tensors."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, foreach=False, fused=False)


def mae_loss(model: MaskedAutoencoder, image: Tensor, mask_ratio: float, noise: Tensor) -> Tensor:
    """The MAE loss with all patches embedded by the convolution before most are dropped."""
    tokens = model.patch_embed(model.normalize(image)) + model.pos_embed[:, 1:]
    keep = int(model.num_patches * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)
    ids_restore = ids_shuffle.argsort(dim=1)
    kept = tokens.gather(1, ids_shuffle[:, :keep, None].expand(-1, -1, tokens.shape[-1]))
    cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(len(image), -1, -1)
    latent = model.norm(model.blocks(torch.cat([cls_token, kept], dim=1)))
    mask = (ids_restore >= keep).float()
    return masked_mse(model.decode(latent, ids_restore), model.target(image, norm_pix=False), mask)


def mae_step(model: MaskedAutoencoder, optimizer: torch.optim.Optimizer, image: Tensor, noise: Tensor) -> float:
    """One plain pretraining step."""
    loss = mae_loss(model, image, 0.75, noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def full_matrix_words(latent: Tensor, codebook: Tensor) -> Tensor:
    """Nearest codes by the (M, K) matrix of squared distances, whole in memory; (B, D, h, w) -> (B, h, w)."""
    batch, dim, height, width = latent.shape
    flat = latent.permute(0, 2, 3, 1).reshape(-1, dim)
    distance = flat.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * flat @ codebook.T
    return distance.argmin(1).view(batch, height, width)


@torch.no_grad()
def reconstruct(tokenizer: VisualTokenizer, image: Tensor) -> Tensor:
    """Q(x) with the full matrix."""
    return tokenizer.decode(full_matrix_words(tokenizer.latent(image), tokenizer.codebook))


def dat_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: VisualTokenizer,
    image: Tensor,
    target: Tensor,
    eps: float = 0.1,
) -> float:
    """One released DAT step with its wasted work: the attack fills every parameter's gradient, and a forward follows it
    for nothing."""
    clean_loss = F.cross_entropy(model(image), target)
    center = reconstruct(tokenizer, image)
    point = (center + eps * unit(torch.randn_like(center))).clamp(0, 1).requires_grad_()
    F.cross_entropy(model(point), target).backward()
    assert point.grad is not None
    delta = project(point.detach() + eps * unit(point.grad) - center, eps)
    attacked = (center + delta).clamp(0, 1)
    model(attacked)  # thrown away
    adversarial = reconstruct(tokenizer, attacked)
    loss = clean_loss + F.cross_entropy(model(adversarial), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
