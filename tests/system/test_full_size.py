"""At full size on a CPU, with weights by the golden rule in the published formats: a forward of MAE ViT-B and a VQ-f8
reconstruction of one 224 px image."""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golden_rule import fill_by_rule
from mae_dat.models.mae import build_mae, mask_noise, masked_mse
from mae_dat.models.tokenizer import load_tokenizer
from mae_dat.models.tokenizer.vqgan import VQGAN, VQGAN_PRESETS
from mae_dat.models.weights.load import load_autoencoder

LIMIT_KB = 24 * 1024**2
ROOT = Path(__file__).parents[2]


def mae_forward(folder: Path) -> None:
    """A checkpoint as the reference writes it, loaded, and the loss of one image."""
    model = build_mae("mae_vit_base_patch16")
    skip = ("pos_embed", "decoder_pos_embed")
    path = folder / "checkpoint-799.pth"
    content = {"model": fill_by_rule(model, skip), "epoch": 799, "args": argparse.Namespace(mask_ratio=0.75)}
    torch.save(content, path)
    report = load_autoencoder(model, path)
    assert report.loaded == len(model.state_dict())
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prediction, mask = model(image, 0.75, mask_noise(1, 196, torch.Generator().manual_seed(0), "cpu"))
        loss = masked_mse(prediction, model.target(image, True), mask)
    assert prediction.shape == (1, 196, 768)
    assert mask.sum() == 147
    assert loss.isfinite()


def vqgan_reconstruction(folder: Path) -> None:
    """DAT's tokenizer as latent-diffusion stores it: 784 words of 16,384."""
    path = folder / "vq-f8.ckpt"
    torch.save({"state_dict": fill_by_rule(VQGAN(VQGAN_PRESETS["vq-f8"]))}, path)
    tokenizer = load_tokenizer(path)
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        words = tokenizer.encode(image)
        again = tokenizer.decode(words)
    assert words.shape == (1, 28, 28)
    assert words.max() < 16384
    assert again.shape == image.shape
    assert 0 <= again.min() <= again.max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae_forward", "vqgan_reconstruction"])
def test_full_size_fits_in_24_gib(name: str, tmp_path: Path) -> None:
    # In a process of its own: the peak is the process's, and pytest's own is not in it.
    start = "import sys; sys.path[:0] = ['tests/system', 'tests/support', '.']"
    code = f"{start}; import test_full_size as t; t.measured(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 100 * 1024 < int(done.stdout) < LIMIT_KB


def measured(name: str, folder: str) -> None:
    """Runs one of the above and prints the process's peak memory in KiB."""
    {"mae_forward": mae_forward, "vqgan_reconstruction": vqgan_reconstruction}[name](Path(folder))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
