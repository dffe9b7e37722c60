"""VQ-f8 reconstructions (row 4 of the goals), and the search for the nearest words; random weights, which cost what
trained ones do.

What 16 bits do to the words is another question (docs/explanation/dat.md): a row that meets its goal is an option only
where they agree with float32's.
"""

from functools import partial

import torch

from benchmarks.ours import make_batch
from benchmarks.plain import ReleasedVQGAN, full_matrix_words
from benchmarks.timing import Case, Step
from mae_dat.models.tokenizer import VQGAN, in_precision
from mae_dat.models.tokenizer.quantize import nearest_words

RECONSTRUCTION = 532.0
"""GFLOP of an image at 224 px."""
WORDS, CODES, DIM = 784, 16384, 4


def ours(batch: int, device: torch.device, precision: str, compiled: bool) -> Step:
    """Builds our reconstruction, as an attack runs it."""
    tokenizer = in_precision(VQGAN().freeze(), device, precision, compiled)
    image = make_batch(batch, 224, device)["image"]
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
    """Reconstructions by precision, with `quick` compiled on a GPU alone; and the search, on a CPU with less at once:
    the whole matrix of 128 images is 6.6 GB, thrice alive."""
    gpu = device.type == "cuda"
    pictures, searched = (64, 128) if gpu else (1, 16)
    goals = {"goal": 4, "at_least": 2.5 if gpu else 8.0, "gflop": RECONSTRUCTION, "batch": pictures}
    found = []
    for precision in (*(["fp16"] if gpu else []), "fp32", "bf16_decoder", "bf16"):
        for compiled in (gpu,) if quick else (False, True):
            builds = partial(ours, pictures, device, precision, compiled), partial(released, pictures, device)
            name = f"VQ-f8 reconstruction, {precision}{', compiled' if compiled else ''}"
            found.append(Case(name, *builds, "eager fp32, NCHW", **goals))  # type: ignore[arg-type]
    searches = [partial(build, searched, device) for build in (search, full_search)]
    return [*found, Case("nearest of 16,384 words", *searches, "the full matrix", batch=searched)]
