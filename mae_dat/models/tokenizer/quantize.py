"""Nearest-code search and the vector-quantization losses (van den Oord et al. 2017, eq. 3; Esser et al. 2021, eq.
4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_AT_ONCE = 2**25  # float32 numbers: 128 MiB


def rows_at_once(codebook_KD: Tensor) -> int:
    """Return how many rows of scores over all words fit into `SCORES_AT_ONCE`."""
    return max(1, SCORES_AT_ONCE // len(codebook_KD))


def nearness(vector_MD: Tensor, codebook_KD: Tensor) -> Tensor:
    """Compute z.e - |e|^2 / 2 in float32, (M, K): the largest of a row is at the code nearest in L2, since |z - e|^2 is
    |z|^2 less twice that."""
    codebook_KD = codebook_KD.float()
    return torch.addmm(-codebook_KD.square().sum(1) / 2, vector_MD.float(), codebook_KD.T)


def nearest_words(latent_MD: Tensor, codebook_KD: Tensor) -> Tensor:
    """Return the index of the nearest code in L2 for each of M vectors, int64 (M,).

    The (M, K) matrix of distances is never in memory as a whole.
    """
    words = [nearness(chunk, codebook_KD).argmax(1) for chunk in latent_MD.split(rows_at_once(codebook_KD))]
    return torch.cat(words) if words else latent_MD.new_zeros(0, dtype=torch.int64)


def look_up(words_BHW: Tensor, codebook_KD: Tensor) -> Tensor:
    """Look up the codes of a map of words, as channels: (B, h, w) -> (B, D, h, w)."""
    return F.embedding(words_BHW, codebook_KD).permute(0, 3, 1, 2)


def straight_through(latent: Tensor, quantized: Tensor) -> Tensor:
    """Return the quantized map, with the gradient passed to `latent` as if quantization were the identity."""
    return latent + (quantized - latent).detach()


def vq_loss(latent: Tensor, quantized: Tensor, beta: float = 0.25, legacy: bool = False) -> Tensor:
    """Compute codebook loss + commitment loss, means over all elements, a scalar.

    The paper weights the commitment term (it moves the encoder) by `beta`; taming's `legacy` form weights the codebook
    term instead.
    """
    commitment = (quantized.detach() - latent).square().mean()
    codebook = (quantized - latent.detach()).square().mean()
    return commitment + beta * codebook if legacy else beta * commitment + codebook
