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
from single_steps import SingleSteps
from taming.modules.discriminator.model import NLayerDiscriminator
from tiny_tokenizers import pictures
from torch import Tensor

from golden_rule import fill_by_rule
from mae_dat.config.commands.tokenizer import TokenizerConfig
from mae_dat.config.errors import ConfigError, InterruptError, MissingInputError, NumericsError
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.models.tokenizer import LightTokenizer, load_tokenizer
from mae_dat.runtime.console import Console
from mae_dat.storage.checkpoint import newest_checkpoint, save_checkpoint
from mae_dat.storage.files import sha256_of
from mae_dat.training.tokenizer.train import VQReconstruction, train_tokenizer
from mae_dat.training.tokenizer.trainer import TokenizerTrainer, cosine

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
    """Twelve steps on 20 generated images; the last third with the discriminator."""
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
    assert card["command"].startswith("mae-dat")
    (facts,) = card["held_out"].values()
    assert list(card["held_out"]) == ["demo/val"]
    assert facts["pictures"] == 10
    assert 0 < facts["codebook_in_use"] <= 1


def test_the_held_out_figures_are_what_the_saved_tokenizer_does(trained: Path) -> None:
    tokenizer = load_tokenizer(trained / "tokenizer.safetensors")
    image = pictures(10, size=32)  # the validation images of the folder
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
    real = TokenizerTrainer.train_step

    def interrupted(trainer: TokenizerTrainer) -> None:
        if trainer.state.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        real(trainer)

    short = dataclasses.replace(config, output_dir=str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTrainer, "train_step", interrupted)
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
    command = [sys.executable, "-m", "mae_dat", "tokenizer", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for flag in ("--data_path", "--val_path", "--output_dir", "--factor", "--num_words", "--steps"):
        assert flag in done.stdout


# ---- one step ----


def training(**overrides: object) -> SingleSteps:
    return SingleSteps(VQReconstruction(dataclasses.replace(TINY, **overrides), torch.device("cpu")))  # type: ignore[arg-type]


def test_training_converges() -> None:
    image, steps = pictures(8, size=32), training(steps=400, gan_start=1.0, restart_every=20, lr=1e-2)
    psnr = [steps.step(step, image)["psnr"] for step in range(60)]
    assert sum(psnr[-5:]) / 5 > sum(psnr[:5]) / 5 + 3


def test_the_discriminator_joins_at_its_step_and_learns() -> None:
    image, steps = pictures(8, size=32), training(steps=10, gan_start=0.5)
    discriminator = steps.objective.discriminator
    before = [weight.clone() for weight in discriminator.parameters()]

    def moved() -> bool:
        return any(not torch.equal(old, new) for old, new in zip(before, discriminator.parameters(), strict=True))

    steps.step(4, image)
    assert not moved()
    steps.step(5, image)
    assert moved()


@pytest.mark.parametrize("step", [0, 1])
def test_a_loss_that_is_not_finite_changes_no_weight(step: int) -> None:
    image, steps = pictures(8, size=32), training()
    if step:
        steps.step(0, image)
    before = weights(steps.objective.tokenizer)
    image[0, 0, 0, 0] = math.nan
    with pytest.raises(NumericsError, match=rf"not finite at step {step} .*loss nan.*Lower --lr"):
        steps.step(step, image)
    after = steps.objective.tokenizer.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_loss_that_is_not_finite_leaves_the_discriminator() -> None:
    image, steps = pictures(8, size=32), training(gan_start=0.0)
    steps.step(0, image)
    before = {key: value.clone() for key, value in steps.objective.discriminator.state_dict().items()}
    image[0, 0, 0, 0] = math.nan
    with pytest.raises(NumericsError):
        steps.step(1, image)
    after = steps.objective.discriminator.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_codes_out_of_use_are_restarted_on_current_latents() -> None:
    objective, latent = training(steps=100).objective, torch.randn(2, 8, 4, 4)
    places = {tuple(vector) for vector in latent.permute(0, 2, 3, 1).flatten(0, 2).tolist()}
    objective.uses_K = torch.arange(64.0) % 4
    before = objective.tokenizer.codes.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for step in (3, 84):  # not a step of restarts, and too near the end
        objective.begin(step)
        objective.restart_codes(latent, generator)
    assert torch.equal(objective.tokenizer.codes, before)
    assert objective.uses_K.sum() > 0
    objective.begin(8)
    objective.restart_codes(latent, generator)
    codes = objective.tokenizer.codes.detach()
    unused = torch.arange(64) % 4 == 0
    assert all(tuple(code) in places for code in codes[unused].tolist())
    assert torch.equal(codes[~unused], before[~unused])
    assert objective.uses_K.sum() == 0


def test_a_dead_codebook_comes_to_life() -> None:
    image, steps = pictures(8, size=32), training(steps=100, gan_start=1.0, restart_every=4)
    tokenizer = steps.objective.tokenizer
    for step in range(1, 4):
        steps.step(step, image)
    with torch.no_grad():
        tokenizer.codes[1:] = 1e4  # far from all that is seen
    assert tokenizer.encode(image).unique().numel() == 1
    steps.objective.uses_K.zero_()
    for step in range(5, 10):
        steps.step(step, image)
    assert tokenizer.encode(image).unique().numel() > 16


def test_state_holds_all_that_the_next_step_needs() -> None:
    image, one, other = pictures(8, size=32), training(gan_start=0.0), training(gan_start=0.0, seed=9)
    for step in range(3):
        one.step(step, image)
    other.state.load_state_dict(copy.deepcopy(one.state.state_dict()))  # as from a file: optimizers take the tensors
    other.objective.config = one.objective.config
    assert one.step(3, image) == other.step(3, image)
    first, second = weights(one.objective.tokenizer), weights(other.objective.tokenizer)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_checkpoint_of_the_tokenizers_own_loop_is_resumed(
    trained: Path, config: TokenizerConfig, tmp_path: Path
) -> None:
    """As mae_dat wrote it before tokenizers were trained by the common loop: other keys, and no settings."""
    (path,) = trained.glob("checkpoint-00000006.pth")
    state = torch.load(path, weights_only=True)
    old = {"tokenizer": state["model"], "optimizer": state["optimizer"], **state["objective"]}
    assert old.keys() == {"tokenizer", "discriminator", "optimizer", "judge", "uses"}
    save_checkpoint(tmp_path, 6, old)
    train_tokenizer(dataclasses.replace(config, output_dir=str(tmp_path)), Console(quiet=True))
    name = "tokenizer.safetensors"
    assert sha256_of(tmp_path / name) == sha256_of(trained / name)


def test_changed_settings_are_refused_unless_they_are_allowed(
    trained: Path, config: TokenizerConfig, tmp_path: Path
) -> None:
    for half in trained.glob("checkpoint-00000006.*"):
        shutil.copy(half, tmp_path)
    changed = dataclasses.replace(config, output_dir=str(tmp_path), lr=1e-3)
    with pytest.raises(
        ConfigError, match=r"(?s)--lr: 0.002 before, 0.001 now  \(changes the result\).*--allow_change lr"
    ):
        train_tokenizer(changed, Console(quiet=True))
    train_tokenizer(dataclasses.replace(changed, allow_change=("lr",)), Console(quiet=True))
    card = json.loads((tmp_path / "tokenizer.json").read_text())
    assert card["changes"] == [{"step": 6, "setting": "lr", "before": 0.002, "now": 0.001}]
    assert card["settings"]["lr"] == 0.001
    # Nothing is trained any more, so another setting does not get into the card.
    again = dataclasses.replace(changed, lr=5e-4, allow_change=("lr",))
    train_tokenizer(again, Console(quiet=True))
    repeated = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (repeated["changes"], repeated["settings"]) == (card["changes"], card["settings"])


def test_one_process_trains_a_tokenizer(config: TokenizerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="trained by one process"):
        train_tokenizer(config, Console(quiet=True))


def test_warm_up_and_cosine() -> None:
    assert cosine(0, 1000, 2.0) == pytest.approx(2.0 / 200)
    assert cosine(199, 1000, 2.0) == pytest.approx(2.0)
    assert cosine(600, 1000, 2.0) == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert cosine(1000, 1000, 2.0) == pytest.approx(0.02)
