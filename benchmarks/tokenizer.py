"""VQ-f8 reconstructions (row 4 of the goals), and the search for the nearest words; random weights, which cost what
trained ones do."""

from functools import partial

import torch

from benchmarks.ours import make_batch
from benchmarks.plain import ReleasedVQGAN, full_matrix_words
from benchmarks.timing import Case, Step
from mae_dat.tokenizer import VQGAN
from mae_dat.tokenizer.quantize import nearest_words

RECONSTRUCTION = 532.0
"""GFLOP of an image at 224 px."""
WORDS, CODES, DIM = 784, 16384, 4


def ours(batch: int, device: torch.device) -> Step:
    """Builds our reconstruction, as an attack runs it."""
    tokenizer, image = VQGAN().freeze().to(device), make_batch(batch, 224, device)["image"]
    return torch.no_grad()(lambda: tokenizer.reconstruct(image))


def released(batch: int, device: torch.device) -> Step:
    """Builds that of taming-transformers, eager and in float32."""
    tokenizer, image = ReleasedVQGAN().to(device), make_batch(batch, 224, device)["image"]
    return lambda: tokenizer(image)


def search(batch: int, device: torch.device) -> Step:
    """Builds our search, which holds a part of the distances at a time."""
    latent, codebook = torch.randn(batch * WORDS, DIM, device=device), torch.randn(CODES, DIM, device=device)
    return lambda: nearest_words(latent, codebook)


def full_search(batch: int, device: torch.device) -> Step:
    """Builds the search in the whole matrix of distances."""
    latent, codebook = torch.randn(batch, DIM, 28, 28, device=device), torch.randn(CODES, DIM, device=device)
    return lambda: full_matrix_words(latent, codebook)


def cases(quick: bool, device: torch.device) -> list[Case]:
    """Reconstruction and search, on a CPU with less at once: 128 pictures' whole matrix is 6.6 GB, thrice alive."""
    gpu = device.type == "cuda"
    pictures, searched = (64, 128) if gpu else (1, 16)
    builds = [partial(build, pictures, device) for build in (ours, released)]
    searches = [partial(build, searched, device) for build in (search, full_search)]
    goals = {"goal": 4, "at_least": 2.5 if gpu else 8.0, "gflop": RECONSTRUCTION}
    return [
        Case("VQ-f8 reconstruction", *builds, "eager fp32, NCHW", batch=pictures, **goals),
        Case("nearest of 16,384 words", *searches, "the full matrix", batch=searched),
    ]
