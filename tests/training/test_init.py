"""Pretraining from weights: the source's loss at rate 0, MAE's own updates, a decoder that is trained alone first."""

import argparse
import contextlib
import json
import logging
import math
import signal
from pathlib import Path

import pytest
import torch
from ranks import exit_codes, start_ranks
from tiny_runs import (
    draw_folder,
    one_thread,  # noqa: F401 - used by itself
    outcome_of,
    pretrain_in,
    verb,
)
from torch import Tensor
from whole_runs import assert_equal_states, final_state, records, signal_in_step

import mae_dat
from mae_dat.config.errors import CheckpointError, ConfigError, InterruptError
from mae_dat.config.parse import load_config
from mae_dat.config.runs import PretrainConfig
from mae_dat.data.image_set import ImageFolder, as_float
from mae_dat.data.loader import train_loader
from mae_dat.data.sampler import TrainSampler
from mae_dat.data.transforms import PretrainTransform
from mae_dat.models.mae import MaskedAutoencoder, build_mae, mask_noise, masked_mse
from mae_dat.runtime.run_log import read_log
from mae_dat.runtime.seeds import step_generator
from mae_dat.storage.weight_files import read_weights

IMAGES, BATCH, STEPS = 16, 8, 10
ENCODER = "blocks.0.attn.qkv.weight"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "images", train=IMAGES, val=10, conflict=10)


def demo_mae(seed: int = 5) -> MaskedAutoencoder:
    """The model of `pretrain_in`, with weights unlike those of a run's seed."""
    torch.manual_seed(seed)
    return build_mae("mae_vit_demo_patch8", img_size=32)


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A file as MAE's own code writes it, the decoder and the optimizer included."""
    path = tmp_path / "mae_pretrain_full.pth"
    content = {"model": demo_mae().state_dict(), "optimizer": {"state": {}}, "epoch": 799, "scaler": {}}
    torch.save({**content, "args": argparse.Namespace(lr=0.1)}, path)
    return path


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    path = tmp_path / "mae_pretrain.pth"
    state = {key: value for key, value in demo_mae().state_dict().items() if not key.startswith(("decoder", "mask_"))}
    torch.save({"model": state}, path)
    return path


def plain_loop(path: Path, images: Path, lr: float, epochs: int) -> tuple[MaskedAutoencoder, list[float]]:
    """MAE's training from `--resume`: strict loading, AdamW, a warm-up of one epoch and half a cosine."""
    model = demo_mae(0)
    model.load_state_dict(torch.load(path, weights_only=False)["model"])
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    folder = ImageFolder(images / "train", PretrainTransform((32, 32)), labeled=False)
    per_epoch = IMAGES // BATCH
    sampler = TrainSampler(IMAGES, BATCH, rank=0, world_size=1, seed=0, total_steps=per_epoch * epochs, start_step=0)
    losses = []
    for step, batch in enumerate(train_loader(folder, sampler, 0, pin_memory=False)):
        epoch = step / per_epoch
        rate = lr * epoch if epoch < 1 else lr * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / (epochs - 1)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        image: Tensor = as_float(batch["image"])
        noise = mask_noise(BATCH, model.num_patches, step_generator(0, step, 0, torch.device("cpu")), "cpu")
        prediction, mask = model(image, 0.75, noise)
        loss = masked_mse(prediction, model.target(image, norm_pix=True), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def test_the_first_ten_updates_are_those_of_mae(full: Path, images: Path, tmp_path: Path) -> None:
    flags = ["--norm_pix_loss", "--lr", "0.002", "--epochs", "5", "--warmup_epochs", "1", "--log_every", "1"]
    output = pretrain_in(tmp_path / "out", images, "--resume", str(full), "--precision", "fp32", *flags)
    model, losses = plain_loop(full, images, 0.002, epochs=5)
    assert [point["train_loss"] for point in read_log(output / "steps.jsonl")] == pytest.approx(losses, rel=1e-5)
    assert len(losses) == STEPS
    for key, value in read_weights(output / "model.safetensors").tensors.items():
        expected = model.state_dict()[key]
        if key.endswith("qkv.bias"):  # softmax cancels the keys' bias, so Adam follows the rounding of its gradient
            value, expected = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (value, expected))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_at_a_rate_of_zero_the_loss_is_that_of_the_source(full: Path, images: Path, tmp_path: Path) -> None:
    result = mae_dat.pretrain(
        init=str(full), data_path=str(images), output_dir=str(tmp_path / "out"), model="mae_vit_demo_patch8",
        input_size=32, batch_size=BATCH, epochs=1, lr=0.0, norm_pix_loss=True, num_workers=0, progress=False,
        precision="fp32",
    )  # fmt: skip
    _, losses = plain_loop(full, images, 0.0, epochs=2)
    assert result.scores["train_loss"] == pytest.approx(sum(losses[:2]) / 2, abs=1e-6)


def test_resume_with_a_weights_file_starts_at_epoch_0_and_says_so(
    full: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    output = pretrain_in(tmp_path / "out", images, "--resume", str(full), "--epochs", "2")
    assert f"--resume {full} is not a checkpoint of mae-dat: training starts at epoch 0" in caplog.text
    assert [record["epoch"] for record in read_log(output / "log.txt")] == [0, 1]
    caplog.clear()
    state = final_state(output)
    again = pretrain_in(output, images, "--resume", str(full), "--epochs", "3", "--allow_change", "epochs")
    assert "is not a checkpoint" not in caplog.text
    assert "resuming from" in caplog.text
    assert final_state(again)["step"] == 3 * state["step"] // 2


def test_the_table_and_the_inputs_name_what_is_new(encoder: Path, images: Path, tmp_path: Path) -> None:
    output = pretrain_in(tmp_path / "out", images, "--init", str(encoder), "--decoder_warmup", "1", "--epochs", "2")
    weights = json.loads((output / "inputs.json").read_text())["rows"]["weights"].split("\n")
    assert weights[0].startswith(f"{encoder} (MAE encoder, sha256 ")
    assert weights[1:] == ["new: decoder", "the decoder alone is trained in the first 1 epochs"]


def trained_encoder(output: Path, epoch: int) -> Tensor:
    state = torch.load(output / f"checkpoint-{epoch * IMAGES // BATCH:08d}.pth", weights_only=False)
    return state["model"][ENCODER]


def test_the_decoder_is_trained_alone_and_a_stopped_run_continues_across_the_switch(
    encoder: Path, images: Path, tmp_path: Path
) -> None:
    flags = ["--init", str(encoder), "--decoder_warmup", "2", "--epochs", "4", "--keep", "9"]
    whole = pretrain_in(tmp_path / "whole", images, *flags)
    source = read_weights(encoder).tensors[ENCODER]
    assert torch.equal(trained_encoder(whole, 2), source)
    assert not torch.equal(trained_encoder(whole, 3), source)
    decoders = [
        torch.load(whole / f"checkpoint-{step:08d}.pth", weights_only=False)["model"]["decoder_pred.bias"]
        for step in (2, 4)
    ]
    assert not torch.equal(*decoders)
    for step in (3, 4):
        stopped = tmp_path / f"stopped-{step}"
        with contextlib.suppress(InterruptError), signal_in_step(step, signal.SIGTERM):
            pretrain_in(stopped, images, *flags)
        pretrain_in(stopped, images, *flags)
        assert_equal_states(final_state(stopped), final_state(whole))
        assert records(stopped) == records(whole)


def one_of_two(rank: int, images: Path, encoder: Path, output: Path) -> None:
    flags = ["--init", str(encoder), "--decoder_warmup", "1", "--epochs", "3", "--batch_size", "4", "--keep", "9"]
    pretrain_in(output, images, *flags)


@pytest.mark.slow
def test_two_ranks_exchange_the_gradients_of_what_is_unfrozen(encoder: Path, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert exit_codes(start_ranks(2, one_of_two, images, encoder, output), 120) == [0, 0]
    source = read_weights(encoder).tensors[ENCODER]
    assert torch.equal(trained_encoder(output, 1), source)
    assert not torch.equal(trained_encoder(output, 2), source)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init", "x", "--decoder_warmup", "400"], "all 400 epochs"),
        (["--init", "x", "--decoder_warmup", "-1"], "0 epochs or more"),
        (["--init", "x", "--decoder_warmup", "1", "--fsdp"], "does not go with --fsdp"),
    ],
)
def test_a_warm_up_of_the_decoder_that_cannot_be(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(PretrainConfig, flags)


def test_sources_that_cannot_be_used(full: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--init x and the weights --resume .*: give one"):
        pretrain_in(tmp_path / "out", images, "--init", "x", "--resume", str(full))
    with pytest.raises(CheckpointError, match="--init: .*5 blocks of width 128.*mae_vit_demo_patch8"):
        pretrain_in(tmp_path / "out", images, "--init", str(full), "--model", "mae_vit_tiny_patch16")
    with pytest.raises(CheckpointError, match="--resume: "):
        pretrain_in(tmp_path / "out", images, "--resume", str(full), "--model", "mae_vit_tiny_patch16")


def test_a_mistyped_name_gets_suggestions(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--num_workers", "0"]
    flags += ["--model", "mae_vit_demo_patch8", "--input_size", "32"]
    outcome = outcome_of(verb("pretrain"), [*flags, "--init", "mae_vit_base_patch61"], monkeypatch, capsys)
    assert outcome.code == 66
    assert "did you mean mae_vit_base_patch16" in outcome.stderr


def test_weights_of_our_own_runs_start_another_one(images: Path, tmp_path: Path) -> None:
    first = pretrain_in(tmp_path / "first", images)
    second = pretrain_in(tmp_path / "second", images, "--init", str(first), "--lr", "0")
    one, other = (read_weights(folder / "model.safetensors").tensors for folder in (first, second))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
