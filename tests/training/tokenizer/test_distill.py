"""A tokenizer's student: it learns the teacher's words and drawings, keeps the codebook, resumes."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from single_steps import SingleSteps
from tiny_tokenizers import pictures

from mae_dat.config.commands.tokenizer import DistillConfig
from mae_dat.config.errors import NumericsError
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.models.tokenizer import VQGAN, LightTokenizer, VQGANConfig, load_tokenizer, share_changed
from mae_dat.runtime.console import Console
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.storage.files import sha256_of
from mae_dat.training.tokenizer.distill import Distillation, StudentTrainer, train_student

CPU = torch.device("cpu")
TINY = DistillConfig(input_size=(32,), width=16, decoder_blocks=1, steps=6, batch_size=8)
TINY = dataclasses.replace(TINY, num_workers=0, save_every=3, device="cpu", precision="fp32")


def student(**overrides: object) -> SingleSteps:
    return SingleSteps(Distillation(dataclasses.replace(TINY, **overrides), CPU), StudentTrainer)  # type: ignore[arg-type]


def test_a_student_learns_words_and_drawings() -> None:
    image, training = pictures(24, size=32), student(steps=400, lr=1e-2)
    teacher_words = training.objective.teacher.encode(image)
    chance = teacher_words.flatten().bincount().max().item() / teacher_words.numel()  # always the commonest word
    facts = [training.step(step, image[step % 3 * 8 :][:8]) for step in range(90)]
    words = training.objective.tokenizer.eval().encode(image)
    assert 1 - share_changed(words, teacher_words).item() > max(3 * chance, 0.15)
    assert facts[-1]["psnr"] > facts[0]["psnr"] + 5
    assert torch.equal(training.objective.tokenizer.codes, training.objective.teacher.codebook)
    # Words are interchangeable: the student draws what the teacher draws of the teacher's words.
    with torch.no_grad():
        error = training.objective.tokenizer.decode(teacher_words) - training.objective.teacher.decode(teacher_words)
    assert -10 * error.square().mean().log10() > 15


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DistillConfig:
    folder = write_image_folder(tmp_path_factory.mktemp("images") / "demo", FolderSettings(20, 10, 0, 0, size=32))
    return dataclasses.replace(TINY, data_path=(str(folder),), val_path=(str(folder / "val"),))


def trained(config: DistillConfig, output: Path) -> Path:
    config = dataclasses.replace(config, output_dir=str(output))
    return train_student(config, Console(quiet=True))


def test_the_card_tells_what_a_student_is_and_a_resumed_run_is_bitwise_the_same(
    config: DistillConfig, tmp_path: Path
) -> None:
    path = trained(config, tmp_path / "whole")
    loaded = load_tokenizer(path)
    assert isinstance(loaded, LightTokenizer)
    assert torch.equal(loaded.codebook, load_tokenizer().codebook)
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["command"].startswith("mae-dat")
    assert (card["sha256"], card["settings"]["teacher"]) == (sha256_of(path), "embedded")
    (facts,) = card["held_out"].values()
    image = pictures(10, size=32)
    agreement = 1 - share_changed(loaded.encode(image), load_tokenizer().encode(image)).item()
    assert facts["word_agreement"] == pytest.approx(agreement, abs=1e-3)
    assert facts["pictures"] == 10
    assert facts["gflop"] < facts["teacher_gflop"] / 4
    assert {"psnr_to_teacher_db", "psnr_db", "teacher_psnr_db", "times_as_fast"} < facts.keys()
    (tmp_path / "half").mkdir()
    for part in (tmp_path / "whole").glob("checkpoint-00000003.*"):
        shutil.copy(part, tmp_path / "half")
    found = newest_checkpoint(tmp_path / "half")
    assert found is not None
    assert sha256_of(trained(config, tmp_path / "half")) == sha256_of(path)


@pytest.mark.parametrize("gumbel", [False, True])
def test_students_of_vqgans(gumbel: bool, tmp_path: Path) -> None:
    config = VQGANConfig(32, 5, 8, 32, (1, 2), 1, (128,), gumbel=gumbel)
    torch.save(VQGAN(config).state_dict(), tmp_path / "vqgan.pth")
    training = student(teacher=str(tmp_path / "vqgan.pth"), steps=400, lr=1e-2)
    image = pictures(8, size=32)
    losses = [training.step(step, image)["loss"] for step in range(12)]
    assert losses[-1] < losses[0]
    words = training.objective.tokenizer.eval().encode(image)
    assert words.shape == training.objective.teacher.encode(image).shape
    assert training.objective.tokenizer.num_words == 32


def test_a_loss_that_is_not_finite_changes_no_weight() -> None:
    training, image = student(), pictures(8, size=32)
    before = {key: value.clone() for key, value in training.objective.tokenizer.state_dict().items()}
    image[0, 0, 0, 0] = math.nan
    with pytest.raises(NumericsError, match=r"not finite at step 0 .*loss nan.*Lower --lr"):
        training.step(0, image)
    assert all(torch.equal(before[key], value) for key, value in training.objective.tokenizer.state_dict().items())
