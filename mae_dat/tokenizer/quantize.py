"""Nearest-code search and the vector-quantization losses (van den Oord et al. 2017, eq. 3; Esser et al. 2021, eq.
4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores alive at once: 2 ** 25 floats are 128 MiB, whatever the batch and the codebook.
_SCORES_AT_ONCE = 2**25


def nearest_words(latent_MD: Tensor, codebook_KD: Tensor) -> Tensor:
    """Index of the nearest code in L2 for each of M vectors, int64 (M,).

    argmin |z - e|^2 = argmax z.e - |e|^2 / 2, computed in float32 over chunks of rows: the (M, K) matrix never exists
    as a whole.
    """
    latent_MD, codebook_KD = latent_MD.float(), codebook_KD.float()
    half_norm_K = codebook_KD.square().sum(1) / 2
    rows = max(1, _SCORES_AT_ONCE // codebook_KD.shape[0])
    words = [torch.addmm(-half_norm_K, chunk, codebook_KD.T).argmax(1) for chunk in latent_MD.split(rows)]
    return torch.cat(words) if words else latent_MD.new_zeros(0, dtype=torch.int64)


def look_up(words_BHW: Tensor, codebook_KD: Tensor) -> Tensor:
    """Codes of a map of words, as channels: (B, h, w) -> (B, D, h, w)."""
    return F.embedding(words_BHW, codebook_KD).permute(0, 3, 1, 2)


def straight_through(latent: Tensor, quantized: Tensor) -> Tensor:
    """The quantized map, with the gradient passed to `latent` as if quantization were the identity."""
    return latent + (quantized - latent).detach()


def vq_loss(latent: Tensor, quantized: Tensor, beta: float = 0.25, legacy: bool = False) -> Tensor:
    """Codebook loss + commitment loss, means over all elements.

    The paper weights the commitment term (it moves the encoder) by `beta`; taming's `legacy` form weights the codebook
    term instead.
    """
    commitment = (quantized.detach() - latent).square().mean()
    codebook = (quantized - latent.detach()).square().mean()
    return commitment + beta * codebook if legacy else beta * commitment + codebook
