"""Options that save time or memory: what they compute, and what a checkpoint shows of them."""

import dataclasses
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import one_thread
from torch import Tensor, nn
from whole_runs import (
    SIDE,
    assert_equal_states,
    data_config,
    final_state,
    folder,
    records,
    run_config,
    signal_in_step,
    surroundings,
    tokenizer,
)

from mae_dat.config.errors import ConfigError, InterruptError
from mae_dat.config.groups import AugmentConfig, ClassifierConfig, OptimConfig
from mae_dat.config.runs import FinetuneConfig
from mae_dat.models import mae
from mae_dat.models.classifier import build_classifier
from mae_dat.runtime import blocks
from mae_dat.runtime.blocks import checkpoint_blocks, choose_attention, compile_blocks, model_blocks
from mae_dat.runtime.console import Console
from mae_dat.runtime.device import amp_dtype, set_float32_precision
from mae_dat.runtime.run_log import read_log
from mae_dat.training.finetune import run_finetuning

__all__ = ["folder", "one_thread", "surroundings", "tokenizer"]

CPU = torch.device("cpu")


def train(folder: Path, output: Path, **flags: Any) -> None:
    config = FinetuneConfig(
        run=dataclasses.replace(run_config(output), **flags),
        data=data_config(folder),
        classifier=ClassifierConfig("vit_tiny", drop_path=0.3, ema_decay=0.8),
        augment=AugmentConfig(aa=None),
        optim=OptimConfig(batch_size=8, epochs=2, warmup_epochs=1, blr=0.05),
    )
    run_finetuning(config, Console(quiet=True))


# ---- attention step by step ----


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_attention_step_by_step_gives_the_same_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within what bfloat16 keeps, by which both forms differ from float32."""
    monkeypatch.setattr(blocks, "cpu_has_amx", lambda: False)
    image, found = torch.rand(2, 3, 224, 224), []
    for chosen, precision in ((False, None), (False, torch.bfloat16), (True, torch.bfloat16)):
        torch.manual_seed(0)
        model = build_classifier(name, 10, (224, 224), 0.0)
        if chosen:
            choose_attention(model, CPU, precision)
        assert {one.fused_attn for one in model.modules() if hasattr(one, "fused_attn")} == {not chosen}
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
            found.append(gradients(model, image))
    exact, fused, by_steps = found
    for key, true in exact.items():
        error = (fused[key] - true).norm() / true.norm(), (by_steps[key] - true).norm() / true.norm()
        assert error[1] < 2 * error[0] + 0.01, key


@pytest.mark.parametrize(
    "device, precision, amx", [("cpu", None, False), ("cpu", "bf16", True), ("cuda", "bf16", False)]
)
def test_elsewhere_attention_stays_fused(
    device: str, precision: str | None, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "cpu_has_amx", lambda: amx)
    model = build_classifier("vit_tiny_patch16_224", 10, (224, 224), 0.0)
    choose_attention(model, torch.device(device), torch.bfloat16 if precision else None)
    assert all(one.fused_attn for one in model.modules() if hasattr(one, "fused_attn"))


# ---- activations computed twice ----


def gradients(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(1)  # drop path
    output = model(image) if image.shape[0] == 2 else model(image, 0.5, torch.rand(3, 16))[0]
    output.float().square().mean().backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit_tiny", "mae_tiny", "convnext_atto"])
def test_checkpointed_blocks_give_the_same_gradients(name: str, precision: torch.dtype) -> None:
    kept: list[dict[str, Tensor]] = []
    for again in (False, True):
        torch.manual_seed(0)
        pretraining = name == "mae_tiny"
        model: nn.Module = (
            mae.build_mae(name, img_size=SIDE) if pretraining else build_classifier(name, 10, (SIDE, SIDE), 0.3)
        )
        keys = list(model.state_dict())
        parts, ran = list(model_blocks(model)[0].children()), []
        for part in parts if again else ():
            part.register_forward_pre_hook(lambda part, _, ran=ran: ran.append(part))
        if again:
            checkpoint_blocks(model)
        image = torch.rand(3 if pretraining else 2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            kept.append(gradients(model.train(), image))
        assert list(model.state_dict()) == keys
        assert not again or len(ran) > len(parts) > 1, "parts of the block ran once more"
    assert len(kept[0]) > 10
    assert_equal_states(*kept)


def test_batch_norm_is_not_shown_a_batch_twice() -> None:
    with pytest.raises(ConfigError, match="BatchNorm"):
        checkpoint_blocks(build_classifier("resnet18", 10, (SIDE, SIDE), 0.0))


def test_a_run_is_the_same_with_less_memory(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(folder, tmp_path / "usual")
    assert caplog.text.count("peak memory") == 1
    assert all(record["peak_memory_gb"] > 0 for record in read_log(tmp_path / "usual" / "log.txt"))
    with signal_in_step(4, signal.SIGTERM), pytest.raises(InterruptError):
        train(folder, tmp_path / "again", checkpoint_activations=True)
    train(folder, tmp_path / "again")  # which may be changed on the way
    assert records(tmp_path / "again") == records(tmp_path / "usual")
    assert_equal_states(final_state(tmp_path / "again")["model"], final_state(tmp_path / "usual")["model"])


# ---- compiled blocks ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while it traces
def test_compiled_blocks_learn_the_same(folder: Path, tmp_path: Path) -> None:
    """To 1e-3 of the loss, in float32: a fused kernel rounds otherwise. Their checkpoints fit uncompiled ones."""
    train(folder, tmp_path / "usual")
    train(folder, tmp_path / "compiled", compile=True)
    usual, compiled = records(tmp_path / "usual"), records(tmp_path / "compiled")
    assert usual != compiled, "something was compiled"
    for one, other in zip(usual, compiled, strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-3)
    assert final_state(tmp_path / "compiled")["model"].keys() == final_state(tmp_path / "usual")["model"].keys()
    with signal_in_step(4, signal.SIGTERM), pytest.raises(InterruptError):
        train(folder, tmp_path / "stopped", compile=True)
    train(folder, tmp_path / "stopped", compile=True)
    assert records(tmp_path / "stopped") == compiled
    assert_equal_states(final_state(tmp_path / "stopped")["model"], final_state(tmp_path / "compiled")["model"])
    with signal_in_step(4, signal.SIGTERM), pytest.raises(InterruptError):
        train(folder, tmp_path / "goes on", compile=True)
    train(folder, tmp_path / "goes on", allow_change=("compile",))
    assert records(tmp_path / "goes on")[1]["train_loss"] == pytest.approx(usual[1]["train_loss"], rel=1e-3)


def test_without_a_compiler_one_is_asked_for() -> None:
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(ConfigError, match="--compile needs a C\\+\\+ compiler"):
        compile_blocks(build_classifier("vit_tiny", 10, (SIDE, SIDE), 0.0))


# ---- TF32 ----


@pytest.fixture
def float32_as_before() -> Iterator[None]:
    backends = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [one.allow_tf32 for one in backends]
    yield
    for one, value in zip(backends, before, strict=True):
        one.allow_tf32 = value  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["auto", "bf16", "tf32", "fp32"])
def test_tf32_is_used_only_where_it_is_asked_for(precision: str, float32_as_before: None) -> None:
    set_float32_precision(precision)
    assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
    assert not torch.backends.cudnn.allow_tf32
    if precision in ("tf32", "fp32"):
        assert amp_dtype(precision, CPU) is None
