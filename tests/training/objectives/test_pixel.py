"""Adversarial training on pixels: in the ball, against the loss, no trace; by the command, and that it helps."""

import functools
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dat_steps import (
    CLASSES,
    IMAGES,
    SIDE,
    WIDTH,
    Products,
    SmallNet,
    batch_of,
    generator,
    gradients,
    labels,
    linear_net,
)
from safetensors.torch import load_file
from tiny_runs import draw_folder, finetune_in, save_tokenizer
from torch import Tensor, nn
from whole_runs import final_state, signal_in_step

from mae_dat.attacks.gradient import input_gradient
from mae_dat.attacks.pixel import PixelAttack
from mae_dat.config.errors import ConfigError, InterruptError
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.models.classifier import build_classifier
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.pixel import WithPixelAdversary, projected_gradient
from mae_dat.training.objectives.reconstruction import MaskedReconstruction

LINF = PixelAttack(4 / 255, 2 / 255, 3, random_start=True)
ATTACKS = {"linf": LINF, "l2": PixelAttack(0.5, 0.25, 3, "l2", random_start=True)}


def distance(one: Tensor, other: Tensor, norm: str) -> Tensor:
    gap = (one.double() - other.double()).flatten(1)
    return gap.abs().amax(1) if norm == "linf" else gap.norm(dim=1)


@pytest.mark.parametrize("norm", ATTACKS)
@pytest.mark.parametrize("kind", ["labels", "mae"])
def test_an_adversary_of_any_objective_is_in_the_ball_and_raises_its_loss(kind: str, norm: str) -> None:
    attack, batch = ATTACKS[norm], batch_of()
    torch.manual_seed(3)
    model = MaskedAutoencoder(SIDE, 4, 3, 16, 1, 2, 16, 1, 2) if kind == "mae" else SmallNet().eval()
    inner: Objective = MaskedReconstruction(0.5, True) if kind == "mae" else labels()
    objective = WithPixelAdversary(inner, attack)
    image, prepared = objective.prepare(model, batch, generator())
    found = objective.adversary(model, image, prepared, generator())
    assert float(distance(found, image, norm).max()) <= attack.eps * (1 + 1e-12)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    noise = image + found.sub(image).flip(0)  # as large, but of another image
    with torch.no_grad():
        clean, random, worse = (float(objective.loss(model, view, prepared)) for view in (image, noise, found))
    assert worse > max(clean, random) + 1e-3
    assert not gradients(model)
    assert model.training == (kind == "mae")
    assert all(weight.requires_grad for name, weight in model.named_parameters() if "pos_embed" not in name)


@pytest.mark.parametrize("norm", ATTACKS)
def test_a_step_from_the_image_goes_along_the_gradient(norm: str) -> None:
    attack = PixelAttack(0.3, 0.01, 1, ATTACKS[norm].norm)
    image, model = batch_of()["image"] * 0.8 + 0.1, SmallNet().eval()
    loss_fn = lambda x: F.cross_entropy(model(x), batch_of()["label"])  # noqa: E731
    gradient = input_gradient(image, loss_fn)
    direction = gradient.sign() if norm == "linf" else F.normalize(gradient.flatten(1)).view_as(gradient)
    found = projected_gradient(image, loss_fn, attack, generator())
    torch.testing.assert_close(found, image + 0.01 * direction)


def test_the_attack_runs_on_the_bare_network() -> None:
    """What stands for DDP, whose hooks are to see the views that are learned from and no others."""

    class Spread(nn.DataParallel):
        passes = 0

        def forward(self, image: Tensor) -> Tensor:
            self.passes += 1
            return self.module(image)

    spread = Spread(SmallNet())
    WithPixelAdversary(labels(), LINF, 1.0).step(spread, batch_of(), generator())["loss"].backward()
    assert (spread.passes, len(spread.module.seen)) == (2, 2 + LINF.steps)


@pytest.mark.parametrize(("weight", "products"), [(0.0, 3 * 6 + 8), (1.0, 8 + 3 * 6 + 8)])
def test_a_step_costs_its_passes(weight: float, products: int) -> None:
    """In units of a forward pass of one layer of three, as those of DAT: a step of the attack is a forward and a
    backward pass, without the parameters' gradient."""
    with Products() as done:
        WithPixelAdversary(labels(), LINF, weight).step(linear_net(), batch_of(), generator())["loss"].backward()
    assert done.multiplications / (IMAGES * WIDTH**2) == pytest.approx(products, abs=0.2)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_gradient_is_that_of_the_views(weight: float) -> None:
    """With dropout: the clean view, the attack's steps and the adversary draw one after the other."""
    model, batch = SmallNet(), batch_of()
    objective = WithPixelAdversary(labels(smoothing=0.1), LINF, weight)
    torch.manual_seed(5)
    parts = objective.step(model, batch, generator())
    parts["loss"].backward()
    found = gradients(model)
    assert list(parts) == ["loss", *["loss_clean"] * (weight > 0), "loss_adversarial"]
    model.zero_grad()
    torch.manual_seed(5)
    target = F.one_hot(batch["label"], CLASSES) * 0.9 + 0.02
    clean = F.cross_entropy(model(batch["image"]), target) if weight else torch.zeros(())
    image = batch["image"]
    noise = 2 * torch.rand(image.shape, generator=generator()) - 1
    point = (image + LINF.eps * noise).clamp(0, 1)
    for _ in range(LINF.steps):
        point.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), target), point)
        point = (point.detach() + LINF.step * gradient.sign()).clamp(image - LINF.eps, image + LINF.eps).clamp(0, 1)
    loss = weight * clean + F.cross_entropy(model(point), target)
    loss.backward()
    torch.testing.assert_close(parts["loss"], loss)
    for name, expected in gradients(model).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_an_adversarially_trained_network_is_the_more_robust() -> None:
    """Two classes that differ strongly in a few pixels, and in all others by less than eps: that is the more of what is
    to be learned, and all of it can be turned over."""
    source, eps = torch.Generator().manual_seed(0), 0.05
    difference = 0.04 * (2.0 * torch.randint(2, (3, SIDE, SIDE), generator=source) - 1)
    difference[:, :2, :2] = 0.2

    def pictures(count: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(2, (count,), generator=source)
        noise = 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=source)
        return (0.5 + (2 * label - 1).view(-1, 1, 1, 1) * difference + noise).clamp(0, 1), label

    def right(model: nn.Module, steps: int) -> float:
        image, label = pictures(200)
        loss_fn = lambda x: F.cross_entropy(model(x), label)  # noqa: E731
        found = projected_gradient(image, loss_fn, PixelAttack(eps, eps / 4, steps), generator()) if steps else image
        return float((model(found).argmax(1) == label).float().mean())

    plain = labels(smoothing=0.0)
    hardened = WithPixelAdversary(plain, PixelAttack(eps, eps / 2, 3, random_start=True))
    accuracies = []
    for objective in (plain, hardened):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, CLASSES))
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(200):
            image, label = pictures(32)
            batch: Any = {**batch_of(32), "image": image, "label": label}
            objective.step(model, batch, generator())["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        accuracies.append((right(model, 0), right(model, 10)))
    (clean, attacked), (clean_hardened, attacked_hardened) = accuracies
    assert min(clean, clean_hardened) > 0.95
    assert attacked < 0.5
    assert attacked_hardened > 0.9


# ---- by the command ----

RUNS = {
    "pgd": "--at pgd --at_steps 2",
    "l2": "--at pgd --at_norm l2 --at_clean_weight 0.5 --at_steps 1",
    "advprop": "--at advprop --at_steps 1 --ema_decay 0.9",
    "advprop, BatchNorm": "--at advprop --at_steps 1 --model resnet10t --layer_decay 1 --clip_grad 1",
    "DAT, split": "--dat --dat_eps 3 --dat_at image --split_norms --accum_iter 2 --batch_size 4",
    "AugMix": "--jsd 12 --aa augmix-m3-w3 --num_workers 1",
    "DAT, JSD": "--dat --dat_eps 3 --dat_jsd 12 --dat_batch_share 0.5 --mixup 0.8",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("pictures")
    return draw_folder(root / "data", val=10, conflict=10), ["--tokenizer", str(save_tokenizer(root / "t.safetensors"))]


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_same_bits_and_exports_an_ordinary_network(
    name: str, folders: tuple[Path, list[str]], tmp_path: Path
) -> None:
    data, tokenizer = folders
    flags = [*RUNS[name].split(), *tokenizer, "--epochs", "1", "--precision", "fp32", "--save_minutes", "0"]
    finetune_in(tmp_path / "whole", data, *flags)
    with signal_in_step(1, signal.SIGTERM), pytest.raises(InterruptError):
        finetune_in(tmp_path / "stopped", data, *flags)
    finetune_in(tmp_path / "stopped", data, *flags)
    whole, stopped = (final_state(tmp_path / run)["model"] for run in ("whole", "stopped"))
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    assert any(".auxiliary." in key for key in whole) == ("advprop" in name or "split" in name)
    whole, stopped = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
    model = "resnet10t" if "BatchNorm" in name else "vit_demo_patch8"
    ordinary = build_classifier(model, 10, 32).net.state_dict()
    assert {key: one.shape for key, one in stopped.items()} == {key: one.shape for key, one in ordinary.items()}


REFUSED = {
    "--at pgd --dat": "--at pgd and --dat released: give one of them",
    "--at advprop --at_clean_weight 0": "leave out --at_clean_weight 0, or give --at pgd",
    "--at pgd --at_eps 0": "--at_eps must be above 0, got 0",
    "--at pgd --at_steps 0": "--at_steps must be above 0",
    "--jsd -1": "--jsd must be 0 or more",
    "--split_norms": "--split_norms is an extension of --dat",
    "--dat_jsd 12": "--dat_jsd 12 is an extension of --dat",
    "--dat --dat_free --dat_jsd 12": "--dat_jsd 12 does not go with --dat_free",
    "--dat --dat_free --split_norms": "--split_norms does not go with --dat_free",
    "--dat paper --split_norms": "norms of the clean view, and --dat paper has no clean view",
    "--at advprop --fsdp": "--at advprop does not go with --fsdp",
    "--at advprop --checkpoint_activations": "--at advprop does not go with --checkpoint_activations",
    "--at advprop --linear_probe": "--at advprop does not go with --linear_probe",
    "--at pgd --remode pixel_raw": "--at pgd takes pixels in [0, 1], and --remode pixel_raw erases with N(0, 1)",
    "--dat --remode pixel_raw": "--dat released takes pixels in [0, 1]",
    "--jsd 12 --aa None": "--jsd 12 compares views of single, clean images: give --aa",
    "--jsd 12 --mixup 0.8": "leave out --mixup",
    "--jsd 12 --dat": "leave out --mixup, --cutmix, --cutmix_minmax, --dat and --at",
    "--jsd 12 --at pgd": "leave out --mixup",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_does_not_go_together_is_refused(flags: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(REFUSED[flags])):
        load_config(FinetuneConfig, flags.split())


def test_defaults_are_those_of_the_kind() -> None:
    own = functools.partial(load_config, FinetuneConfig)
    pgd, advprop, l2 = (own(f"--at {flags}".split()).baselines for flags in ("pgd", "advprop", "pgd --at_norm l2"))
    assert (pgd.eps, pgd.clean_weight, pgd.splits_norms) == (4 / 255, 0, False)
    assert pgd.step == pytest.approx(8 / 3 / 255)
    assert (advprop.clean_weight, advprop.splits_norms) == (1, True)
    assert l2.eps == 0.5
