"""The batch size that fits: arithmetic, allocations of a known size, and real models."""

import resource
from pathlib import Path

import pytest
import torch

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.config.errors import ConfigError
from mae_dat.experiments.checks import batch_size
from mae_dat.experiments.checks.batch_size import (
    batch_plan,
    check_batch_size,
    estimate_on_cpu,
    largest_batch,
    peak_rise,
)
from mae_dat.experiments.checks.measured_training import parameters
from mae_dat.models.classifier import build_classifier

CPU = torch.device("cpu")
MB = 10**6


@pytest.mark.parametrize(
    "fits, wanted, devices, plan",
    [
        (512, 4096, 1, (512, 8)),
        (512, 1024, 8, (128, 1)),
        (64, 1024, 1, (64, 16)),
        (2048, 1024, 1, (1024, 1)),
        (256, 1024, 3, (172, 2)),  # 1,032 images
        (2, 4096, 1, (2, 2048)),
    ],
)
def test_the_effective_batch_is_reached(fits: int, wanted: int, devices: int, plan: tuple[int, int]) -> None:
    assert batch_plan(fits, wanted, devices) == plan
    batch, accum = plan
    assert wanted <= batch * accum * devices < 1.05 * wanted
    assert batch <= fits


def test_the_batch_is_doubled_until_memory_runs_out() -> None:
    """With a real limit of the address space: 1 GB more than now, and 10 MB an image."""
    size = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(size.split()[1]) + 1000 * MB, hard))
    try:
        assert largest_batch(lambda images: torch.empty(images * 10 * MB, dtype=torch.uint8), 4096) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    assert largest_batch(lambda images: None, 100) == 64


def test_gpu_errors_mean_that_a_batch_does_not_fit_and_others_are_raised() -> None:
    def update(images: int) -> None:
        if images > 8:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert largest_batch(update, 4096) == 8

    def fail(images: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        largest_batch(fail, 4096)


def test_the_peak_of_an_update_is_measured() -> None:
    rise = peak_rise(lambda images: torch.ones(images, 10 * MB, dtype=torch.uint8), 20)
    assert 195 * MB < rise < 230 * MB


def test_the_estimate_follows_from_the_memory_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 800 MB were free, of which an image takes 20. A half may be used, and a quarter while it is measured."""
    monkeypatch.setattr(batch_size, "available_memory", lambda: 800 * MB)
    measured = []

    def update(images: int) -> None:
        measured.append(images)
        torch.ones(images, 20 * MB, dtype=torch.uint8)

    fits, text = estimate_on_cpu(update)
    assert fits == 16  # the power of two below 20
    assert max(measured) <= 8
    assert text.endswith(" of 0.8 GB that are free")


def test_a_batch_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "available_memory", lambda: 30 * MB)
    fits, _ = estimate_on_cpu(lambda images: torch.ones(images, 20 * MB, dtype=torch.uint8))
    assert fits == 0


@pytest.mark.slow
def test_the_demo_model_on_a_cpu() -> None:
    config = DoctorConfig(device="cpu", input_size=(32,), dat=DatConfig(kind="released", share=0.05))
    row = check_batch_size(config)
    assert row.state == "ok", row
    assert row.text.startswith("fine-tuning vit_demo_patch8 at 32 px, --dat released: a batch of 64 images fits")
    assert row.text.endswith("MAE's effective batch of 1,024 images:\n--batch_size 64 --accum_iter 16")


def test_an_autoencoder_is_pretrained() -> None:
    row = check_batch_size(DoctorConfig(device="cpu", model="mae_vit_demo_patch8", input_size=(16, 32)))
    assert row.text.startswith("pretraining mae_vit_demo_patch8 at 16 x 32 px: a batch of ")
    assert row.text.endswith("--batch_size 64 --accum_iter 64")


def test_a_model_that_is_too_large_is_not_even_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "available_memory", lambda: 10**9)
    row = check_batch_size(DoctorConfig(device="cpu", model="vit_huge_patch14"))
    assert (row.state, row.fix) == ("warning", "give a smaller --model")
    assert "the weights alone need 10.1 of 1.0 GB" in row.text


def test_parameters_are_counted_without_memory() -> None:
    config = DoctorConfig(model="vit_demo_patch8")
    model = build_classifier("vit_demo_patch8", 1000, (64, 64))
    assert parameters(config, CPU) == sum(parameter.numel() for parameter in model.parameters())


def test_an_unknown_model_and_a_wrong_size_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean vit_base_patch16"):
        check_batch_size(DoctorConfig(device="cpu", model="vit_bse_patch16"))
    with pytest.raises(ConfigError, match="100 is not divisible"):
        check_batch_size(DoctorConfig(device="cpu", model="vit_base_patch16", input_size=(100,)))
    with pytest.raises(ConfigError, match="--input_size"):
        DoctorConfig(input_size=(1, 2, 3))


def test_the_default_model_depends_on_the_device() -> None:
    config = DoctorConfig()
    assert (config.model_on("cuda"), config.model_on("cpu")) == ("vit_base_patch16", "vit_demo_patch8")
    assert (config.size_of("vit_base_patch16"), config.size_of("vit_demo_patch8")) == ((224, 224), (64, 64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu() -> None:
    row = check_batch_size(DoctorConfig(model="mae_vit_base_patch16"))
    assert row.state == "ok", row
    assert torch.cuda.memory_allocated() < 100 * MB
