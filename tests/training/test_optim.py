"""Learning rates and parameter groups against the reference, and a step of the optimizer itself."""

import copy
import json
import logging
from typing import Any

import pytest
import timm
import torch
from paths import GOLDEN
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.models.classifier import Classifier, build_classifier, build_vit
from mae_dat.models.mae import MaskedAutoencoder, ViTSize
from mae_dat.training.optim import build_optimizer, effective_lr, inner_module, learning_rate, parameter_groups, set_lr

TINY = ViTSize(64, 8, 48, 4, 4)


def named(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "params": [name for name, _ in group["params"]]} for group in groups]


def tiny(pool: bool = True) -> Classifier:
    return Classifier(build_vit(TINY, 10, global_pool=pool), (0.5,) * 3, (0.5,) * 3)


def test_the_schedule_reproduces_the_reference() -> None:
    table = json.loads((GOLDEN / "lr_sched.json").read_text())
    for epoch, expected in table["values"]:
        assert learning_rate(epoch, **table["args"]) == pytest.approx(expected, rel=1e-9, abs=1e-20)


def test_the_schedules_ends() -> None:
    settings = {"lr": 1.0, "min_lr": 0.1, "warmup_epochs": 2, "epochs": 10}
    assert learning_rate(0, **settings) == 0.0
    assert learning_rate(1, **settings) == 0.5
    assert learning_rate(6, **settings) == pytest.approx(0.55)
    assert learning_rate(10, **settings) == learning_rate(12, **settings) == pytest.approx(0.1)
    assert learning_rate(5, **{**settings, "warmup_epochs": 5, "epochs": 5}) == 1.0
    assert learning_rate(0, **{**settings, "warmup_epochs": 0}) == 1.0


def test_effective_rate_scales_linearly_unless_given() -> None:
    assert effective_lr(None, 1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert effective_lr(1e-3, 1.5e-4, 4096) == 1e-3
    assert effective_lr(0.0, 1.5e-4, 4096) == 0.0


@pytest.mark.parametrize("wrapped", [True, False])
def test_layer_decay_groups_reproduce_the_reference(wrapped: bool) -> None:
    model = tiny() if wrapped else tiny().net
    assert named(parameter_groups(model, 0.05, 0.65)) == json.loads((GOLDEN / "lrd_groups.json").read_text())


def test_the_last_norm_of_class_token_pooling_is_not_decayed_with_the_last_block() -> None:
    groups = named(parameter_groups(tiny(pool=False), 0.05, 0.65))
    assert [group["lr_scale"] for group in groups if "norm.weight" in group["params"]] == [1.0]


def test_pretraining_decays_the_tokens_but_no_vector_and_no_fixed_embedding() -> None:
    model = MaskedAutoencoder(64, 8, 3, 48, 2, 4, 32, 1, 4)
    decay_of = {
        name: group["weight_decay"] for group in named(parameter_groups(model, 0.05, None)) for name in group["params"]
    }
    assert {decay_of["cls_token"], decay_of["mask_token"], decay_of["decoder_pred.weight"]} == {0.05}
    assert {decay_of["norm.weight"], decay_of["patch_embed.proj.bias"]} == {0.0}
    assert set(decay_of) == set(dict(model.named_parameters())) - {"pos_embed", "decoder_pos_embed"}


def test_without_layer_decay_all_scales_are_one_and_tokens_are_spared() -> None:
    groups = named(parameter_groups(tiny(), 0.05, None))
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1.0, 0.0), (1.0, 0.05)]
    assert {"cls_token", "pos_embed"} <= set(groups[0]["params"])
    assert groups == named(parameter_groups(tiny(), 0.05, 1.0))


def test_optimizer_covers_every_parameter_once_and_names_them() -> None:
    model = tiny()
    optimizer = build_optimizer(model, 1e-3, 0.05, 0.65, (0.9, 0.95))
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    assert [name for group in optimizer.param_groups for name in group["param_names"]].count("head.weight") == 1
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


def test_the_scale_multiplies_the_rate_from_the_first_step() -> None:
    optimizer = build_optimizer(tiny(), 1e-3, 0.05, 0.65)
    for lr in (1e-3, 4e-4):
        set_lr(optimizer, lr)
        assert all(group["lr"] == lr * group["lr_scale"] for group in optimizer.param_groups)
    fresh = build_optimizer(tiny(), 1e-3, 0.05, 0.65)
    assert min(group["lr"] for group in fresh.param_groups) == pytest.approx(1e-3 * 0.65**5)


def test_fused_step_equals_the_plain_one() -> None:
    linear = nn.Linear(5, 3)
    twin = nn.Linear(5, 3)
    twin.load_state_dict(linear.state_dict())
    optimizer = build_optimizer(linear, 1e-2, 0.05)
    plain = torch.optim.AdamW(
        [{"params": [twin.weight], "weight_decay": 0.05}, {"params": [twin.bias], "weight_decay": 0.0}], lr=1e-2
    )
    assert optimizer.defaults["fused"]
    for step in range(3):
        x = torch.randn(4, 5)
        for model, optim in ((linear, optimizer), (twin, plain)):
            set_lr(optim, 1e-2 / (step + 1))
            optim.zero_grad()
            model(x).square().sum().backward()
            optim.step()
    torch.testing.assert_close(linear.weight, twin.weight)
    torch.testing.assert_close(linear.bias, twin.bias)


def test_optimizer_state_survives_saving() -> None:
    optimizers = []
    model = tiny()
    for _ in range(2):
        optimizers.append(build_optimizer(model, 1e-3, 0.05, 0.65))
    model(torch.rand(2, 3, 64, 64)).sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert [group["lr_scale"] for group in optimizers[1].param_groups] == [
        group["lr_scale"] for group in optimizers[0].param_groups
    ]
    head = model.net.head.weight
    assert torch.equal(optimizers[1].state[head]["exp_avg"], optimizers[0].state[head]["exp_avg"])


def test_convolutional_timm_models_use_timms_layers() -> None:
    groups = named(parameter_groups(build_classifier("resnet18", 3), 0.05, 0.5))
    scale_of = {name: group["lr_scale"] for group in groups for name in group["params"]}
    assert scale_of["fc.weight"] == 1.0
    assert scale_of["conv1.weight"] < scale_of["layer1.0.conv1.weight"] < scale_of["layer4.1.conv2.weight"] < 1.0


def test_a_network_without_layers_says_that_the_decay_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        groups = parameter_groups(nn.Sequential(nn.Linear(2, 2)), 0.05, 0.5)
    assert {group["lr_scale"] for group in groups} == {1.0}
    assert any("layer decay" in message and "0.5" in message for message in caplog.messages)


def test_unwrap_finds_the_network() -> None:
    model = tiny()
    assert inner_module(torch.compile(model, backend="eager")) is model.net
    assert inner_module(model.net) is model.net


def test_impossible_settings_are_refused() -> None:
    for decay in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match=f"layer decay {decay}"):
            build_optimizer(tiny(), 1e-3, 0.05, decay)
    with pytest.raises(ConfigError, match="no trainable"):
        build_optimizer(tiny().requires_grad_(False), 1e-3, 0.05)


def test_the_warm_up_may_start_above_zero() -> None:
    settings = {"lr": 1e-3, "min_lr": 1e-6, "warmup_epochs": 5, "epochs": 300, "warmup_lr": 1e-6}
    assert learning_rate(0, **settings) == 1e-6
    assert learning_rate(2.5, **settings) == pytest.approx((1e-6 + 1e-3) / 2)
    assert learning_rate(5, **settings) == pytest.approx(1e-3)
    assert learning_rate(305, **settings) == pytest.approx(1e-6)


@pytest.mark.parametrize("warmup_epochs", [0, 5])
def test_the_schedule_by_epoch_is_timms(warmup_epochs: int) -> None:
    """As in the released run: constant within an epoch, and a cosine over all epochs, then the cool-down."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, 300, lr_min=1e-6, warmup_t=warmup_epochs, warmup_lr_init=1e-6)
    for epoch in range(310):
        scheduler.step(epoch)
        expected = optimizer.param_groups[0]["lr"]
        for part in (0.0, 0.5, 0.999):
            rate = learning_rate(
                epoch + part, 1e-3, 1e-6, warmup_epochs=warmup_epochs, epochs=300, warmup_lr=1e-6, schedule="epoch"
            )
            assert rate == pytest.approx(expected, rel=1e-9)


def test_the_recipe_of_dat_from_scratch_is_that_of_the_released_run() -> None:
    config = load_config(FinetuneConfig, ["--config", "dat_scratch_vit_base"])
    model = build_classifier(config.classifier.model, 10, 32, global_pool=config.classifier.mean_pool)
    timms = timm.create_model("vit_base_patch16_224", num_classes=10, img_size=32)
    assert model.net.state_dict().keys() == timms.state_dict().keys()
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert (config.optim.lr_schedule, config.optim.epochs, config.optim.cooldown_epochs) == ("epoch", 300, 10)
    assert config.augment.train_interpolation == "random"


def test_sgd_has_nesterov_momentum_as_timms() -> None:
    """The same weights after three steps as timm's `--opt sgd`, which the released ResNet50 script uses."""
    torch.manual_seed(0)
    ours = nn.Linear(5, 3)
    theirs = copy.deepcopy(ours)
    optimizer = build_optimizer(ours, 0.1, 1e-4, opt="sgd")
    assert [(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.9, 1e-4), (0.9, 0.0)]
    timms = create_optimizer_v2(theirs, "sgd", lr=0.1, weight_decay=1e-4, momentum=0.9)
    for images in torch.randn(3, 4, 5):
        for model, step in ((ours, optimizer), (theirs, timms)):
            step.zero_grad()
            model(images).square().sum().backward()
            step.step()
    assert torch.allclose(ours.weight, theirs.weight, rtol=1e-5)
    assert torch.allclose(ours.bias, theirs.bias, rtol=1e-5)
