"""Training a tokenizer: the whole command at toy size, convergence, exact resuming, restarted codes, bad losses."""

import copy
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from taming.modules.discriminator.model import NLayerDiscriminator
from test_tokenizer import pictures
from torch import Tensor

from golden_rule import fill_by_rule
from mae_dat.config.errors import InterruptError, MissingInputError, NumericsError
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.models.tokenizer import LightTokenizer, load_tokenizer
from mae_dat.runtime.console import Console
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.storage.files import sha256_of
from mae_dat.training.tokenizer.train import TokenizerConfig, TokenizerTrainer, cosine, train_tokenizer

TINY = TokenizerConfig(
    input_size=(32,), width=16, encoder_blocks=1, decoder_blocks=1, num_words=64, steps=12, batch_size=8
)
TINY = dataclasses.replace(TINY, num_workers=0, save_every=6, device="cpu", precision="fp32", restart_every=4)


def test_the_discriminator_is_that_of_the_reference(golden: Callable[[str], dict[str, np.ndarray]]) -> None:
    discriminator = NLayerDiscriminator(3, ndf=16, n_layers=2).eval()
    discriminator.load_state_dict(fill_by_rule(discriminator))
    image = torch.from_numpy(golden("mae_tiny")["images_u8"]).permute(0, 3, 1, 2).float() / 255
    expected = torch.from_numpy(golden("discriminator")["out"])
    torch.testing.assert_close(discriminator(2 * image - 1), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images") / "demo", FolderSettings(20, 10, 0, 0, size=32))


@pytest.fixture(scope="module")
def config(images: Path) -> TokenizerConfig:
    """Twelve steps on 20 generated pictures; the last third with the discriminator."""
    return dataclasses.replace(TINY, data_path=(str(images),), val_path=(str(images / "val"),))


@pytest.fixture(scope="module")
def trained(config: TokenizerConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an uninterrupted run."""
    torch.manual_seed(5)
    output = tmp_path_factory.mktemp("trained")
    train_tokenizer(dataclasses.replace(config, output_dir=str(output)), Console(quiet=True))
    return output


def weights(tokenizer: LightTokenizer) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in tokenizer.state_dict().items()}


# ---- the whole command ----


def test_a_run_leaves_a_tokenizer_and_its_card(trained: Path) -> None:
    path = trained / "tokenizer.safetensors"
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, LightTokenizer)
    assert (tokenizer.factor, tokenizer.num_words, tokenizer.config.width) == (4, 64, 16)
    card = json.loads((trained / "tokenizer.json").read_text())
    assert card["sha256"] == sha256_of(path)
    assert card["settings"]["steps"] == 12
    assert card["command"].startswith("python -m mae_dat train_tokenizer")
    (facts,) = card["held_out"].values()
    assert list(card["held_out"]) == ["demo/val"]
    assert facts["pictures"] == 10
    assert 0 < facts["codebook_in_use"] <= 1


def test_the_held_out_figures_are_what_the_saved_tokenizer_does(trained: Path) -> None:
    tokenizer = load_tokenizer(trained / "tokenizer.safetensors")
    image = pictures(10, size=32)  # the validation pictures of the folder
    error = tokenizer.reconstruct(image) - image
    psnr = (-10 * error.square().mean((1, 2, 3)).log10()).mean().item()
    (facts,) = json.loads((trained / "tokenizer.json").read_text())["held_out"].values()
    assert psnr == pytest.approx(facts["psnr_db"], abs=0.01)
    assert error.abs().mean().item() == pytest.approx(facts["l1"], rel=1e-3)


def test_a_resumed_run_ends_bitwise_where_an_uninterrupted_one_does(
    trained: Path, config: TokenizerConfig, tmp_path: Path
) -> None:
    for half in trained.glob("checkpoint-00000006.*"):
        shutil.copy(half, tmp_path)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 6
    train_tokenizer(dataclasses.replace(config, output_dir=str(tmp_path)), Console(quiet=True))
    name = "tokenizer.safetensors"
    assert sha256_of(tmp_path / name) == sha256_of(trained / name)


def test_a_signalled_run_saves_and_ends_bitwise_the_same(
    trained: Path, config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TokenizerTrainer.step

    def interrupted(self: TokenizerTrainer, step: int, image: torch.Tensor) -> dict[str, float]:
        if step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, step, image)

    short = dataclasses.replace(config, output_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTrainer, "step", interrupted)
        with pytest.raises(InterruptError, match="stopped at step 5") as stopped:
            train_tokenizer(short, Console(quiet=True))
    assert stopped.value.exit_code == 75
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 5
    train_tokenizer(short, Console(quiet=True))
    name = "tokenizer.safetensors"
    assert sha256_of(tmp_path / name) == sha256_of(trained / name)


def test_a_finished_run_is_not_trained_again(trained: Path, config: TokenizerConfig, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    train_tokenizer(dataclasses.replace(config, output_dir=str(tmp_path)), Console(quiet=True))
    name = "tokenizer.safetensors"
    assert sha256_of(tmp_path / name) == sha256_of(trained / name)


def test_another_seed_gives_another_tokenizer(trained: Path, config: TokenizerConfig, tmp_path: Path) -> None:
    short = dataclasses.replace(config, output_dir=str(tmp_path), val_path=(), seed=1)
    train_tokenizer(short, Console(quiet=True))
    name = "tokenizer.safetensors"
    assert sha256_of(tmp_path / name) != sha256_of(trained / name)


def test_folders_that_do_not_exist(config: TokenizerConfig, tmp_path: Path) -> None:
    wrong = dataclasses.replace(config, data_path=(str(tmp_path / "absent"),), output_dir=str(tmp_path / "out"))
    with pytest.raises(MissingInputError, match="absent"):
        train_tokenizer(wrong, Console(quiet=True))


def test_help_names_the_settings() -> None:
    command = [sys.executable, "-m", "mae_dat", "train_tokenizer", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for flag in ("--data_path", "--val_path", "--output_dir", "--factor", "--num_words", "--steps"):
        assert flag in done.stdout


# ---- one step ----


def trainer(**overrides: object) -> TokenizerTrainer:
    return TokenizerTrainer(dataclasses.replace(TINY, **overrides), torch.device("cpu"))  # type: ignore[arg-type]


def test_training_converges() -> None:
    image, training = pictures(8, size=32), trainer(steps=400, gan_start=1.0, restart_every=20, lr=1e-2)
    psnr = [training.step(step, image)["psnr"] for step in range(60)]
    assert sum(psnr[-5:]) / 5 > sum(psnr[:5]) / 5 + 3


def test_the_discriminator_joins_at_its_step_and_learns() -> None:
    image, training = pictures(8, size=32), trainer(steps=10, gan_start=0.5)
    judge = training.discriminator
    before = [weight.clone() for weight in judge.parameters()]

    def moved() -> bool:
        return any(not torch.equal(old, new) for old, new in zip(before, judge.parameters(), strict=True))

    training.step(4, image)
    assert not moved()
    training.step(5, image)
    assert moved()


@pytest.mark.parametrize("step", [0, 1])
def test_a_loss_that_is_not_finite_changes_no_weight(step: int) -> None:
    image, training = pictures(8, size=32), trainer()
    if step:
        training.step(0, image)
    before = weights(training.tokenizer)
    image[0, 0, 0, 0] = math.nan
    with pytest.raises(NumericsError, match=rf"nan at step {step}: lower --lr"):
        training.step(step, image)
    after = training.tokenizer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_codes_out_of_use_are_restarted_on_current_latents() -> None:
    training, latent = trainer(steps=100), torch.randn(2, 8, 4, 4)
    places = {tuple(vector) for vector in latent.permute(0, 2, 3, 1).flatten(0, 2).tolist()}
    training.uses_K = torch.arange(64.0) % 4
    before = training.tokenizer.codes.detach().clone()
    training.restart_codes(3, latent)  # not a step of restarts
    training.restart_codes(84, latent)  # too near the end
    assert torch.equal(training.tokenizer.codes, before)
    assert training.uses_K.sum() > 0
    training.restart_codes(8, latent)
    codes = training.tokenizer.codes.detach()
    unused = torch.arange(64) % 4 == 0
    assert all(tuple(code) in places for code in codes[unused].tolist())
    assert torch.equal(codes[~unused], before[~unused])
    assert training.uses_K.sum() == 0


def test_a_dead_codebook_comes_to_life() -> None:
    image, training = pictures(8, size=32), trainer(steps=100, gan_start=1.0, restart_every=4)
    for step in range(1, 4):
        training.step(step, image)
    with torch.no_grad():
        training.tokenizer.codes[1:] = 1e4  # far from all that is seen
    assert training.tokenizer.encode(image).unique().numel() == 1
    training.uses_K.zero_()
    for step in range(5, 10):
        training.step(step, image)
    assert training.tokenizer.encode(image).unique().numel() > 16


def test_state_holds_all_that_the_next_step_needs() -> None:
    image, one, other = pictures(8, size=32), trainer(gan_start=0.0), trainer(gan_start=0.0, seed=9)
    for step in range(3):
        one.step(step, image)
    other.load_state(copy.deepcopy(one.state()))  # as from a file: an optimizer takes the tensors themselves
    other.config = one.config
    assert one.step(3, image) == other.step(3, image)
    first, second = weights(one.tokenizer), weights(other.tokenizer)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_warm_up_and_cosine() -> None:
    assert cosine(0, 1000, 2.0) == pytest.approx(2.0 / 200)
    assert cosine(199, 1000, 2.0) == pytest.approx(2.0)
    assert cosine(600, 1000, 2.0) == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert cosine(1000, 1000, 2.0) == pytest.approx(0.02)
