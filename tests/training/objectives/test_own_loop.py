"""`WithDAT` in a training loop that is not ours: the trainer's numbers, any model, any criterion, one warning."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dat_steps import (
    CLASSES,
    IMAGES,
    SIDE,
    CountedTokenizer,
    SmallNet,
    batch_of,
    generator,
    gradients,
    labels,
    linear_net,
    tokenizer,
)
from ranks import exit_codes, start_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_dat.config.adversaries import PUBLISHED_SHARE, AttackConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import OptimConfig, RunConfig
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.models.tokenizer import LightConfig, LightTokenizer, VisualTokenizer, load_tokenizer
from mae_dat.runtime.console import Console
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.seeds import seed_everything, step_generator, step_seed
from mae_dat.runtime.world import World, process_group
from mae_dat.training.context import RunContext
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.objectives.reconstruction import MaskedReconstruction
from mae_dat.training.optim import learning_rate
from mae_dat.training.setup import Reporting, TrainingSetup
from mae_dat.training.state import TrainingState

__all__ = ["tokenizer"]  # fixtures

CPU = torch.device("cpu")
STEPS = 4
ATTACKS = {
    "eps": AttackConfig(eps=3.0),
    "share": AttackConfig(share=0.2),
    "free, half of the batch": AttackConfig(eps=3.0, free=True, batch_share=0.5),
    "paper": AttackConfig("paper", share=0.2),
    "symbolic": AttackConfig("symbolic", share=0.2),
    "warm-up": AttackConfig(share=0.2, ramp_epochs=1.0),
}


class GradientRecorder(Trainer):
    """Keeps the gradient of every step."""

    recorded: list[dict[str, Tensor]]

    def clip_gradient(self) -> Tensor:
        self.recorded.append(gradients(self.state.model))
        return super().clip_gradient()


def trainers_steps(objective: WithDAT, model: nn.Module) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """The gradients and the metrics of the trainer's steps."""
    setup = TrainingSetup(
        context=RunContext(RunConfig(seed=5), World(), CPU, None, Console(quiet=True)),
        optim=OptimConfig(IMAGES, 2, lr=1e-2, warmup_epochs=0),
        loader=[batch_of(seed=step) for step in range(STEPS)],
        steps_per_epoch=2,
        log=RunLog(Path(), enabled=False),
        reporting=Reporting("train"),
    )
    trainer = GradientRecorder(TrainingState(model, torch.optim.SGD(model.parameters(), 1e-2), objective), setup)
    trainer.recorded, metrics = [], []
    for _ in range(STEPS):
        trainer.train_step()
        trainer.read_reports(0)
        metrics.append(trainer.state.delayed_metrics[-1][1])
    return trainer.recorded, metrics


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("form", ["indices", "probabilities"])
def test_a_step_is_bit_for_bit_the_trainers(name: str, form: str, tokenizer: CountedTokenizer) -> None:
    smoothed = labels(smoothing=0.1)
    model = SmallNet()
    expected, their_metrics = trainers_steps(WithDAT(tokenizer, ATTACKS[name], smoothed), model)
    model.zero_grad()

    model = SmallNet().train()
    dat = WithDAT(tokenizer, ATTACKS[name], smoothed) if form == "indices" else WithDAT(tokenizer, ATTACKS[name])
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(STEPS):
        batch = batch_of(seed=step)
        targets = batch["label"] if form == "indices" else smoothed.prepare(model, batch, generator())[1]
        seed_everything(step_seed(5, step, 0))
        draws = step_generator(5, step, 0, CPU)
        loss = dat(model, batch["image"], targets, generator=draws, epoch=step / 2)
        loss.backward()
        assert dat.metrics == their_metrics[step]
        assert loss.item() == dat.metrics["loss"]
        mine = gradients(model)
        assert mine.keys() == expected[step].keys()
        assert all(torch.equal(mine[weight], expected[step][weight]) for weight in mine)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / 2, lr=1e-2, min_lr=0.0, warmup_epochs=0, epochs=2, warmup_lr=0.0)
        optimizer.step()
        optimizer.zero_grad()
    assert dat.metrics["changed_words"] > 0


def test_class_indices_and_one_hot_probabilities_give_the_same_loss(tokenizer: CountedTokenizer) -> None:
    batch, losses = batch_of(), []
    for targets in (batch["label"], batch["label"].int(), F.one_hot(batch["label"], CLASSES).float()):
        dat = WithDAT(tokenizer, AttackConfig(eps=3.0))
        losses.append(dat(linear_net(), batch["image"], targets, generator=generator()).item())
    assert losses[0] == losses[1]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_share_is_found_and_held_without_a_call_of_observe(tokenizer: CountedTokenizer) -> None:
    torch.manual_seed(0)
    model, dat = linear_net(), WithDAT(tokenizer, AttackConfig(share=0.2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert dat.metrics == {}
    shares, strengths = [], []
    for step in range(12):
        batch = batch_of(seed=step)
        dat(model, batch["image"], batch["label"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(dat.metrics["changed_words"])
        strengths.append(dat.metrics["eps"])
    assert sum(shares) / len(shares) == pytest.approx(0.2, abs=0.05)
    assert len(set(strengths)) == 12, "eps follows every step"
    assert dat.metrics["loss"] == pytest.approx(dat.metrics["loss_clean"] + dat.metrics["loss_adversarial"])
    assert dat.last_adversary is not None
    assert dat.last_adversary.adversarial.shape == batch["image"].shape
    assert 0 <= float(dat.last_adversary.adversarial.min()) <= float(dat.last_adversary.adversarial.max()) <= 1


def test_the_default_is_the_published_share() -> None:
    assert WithDAT(load_tokenizer()).attack == AttackConfig(share=PUBLISHED_SHARE)


def test_the_global_seed_repeats_a_run(tokenizer: CountedTokenizer) -> None:
    batch, model, losses = batch_of(), linear_net(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        dat = WithDAT(tokenizer, AttackConfig(eps=3.0, random_start=1.0))
        losses.append(dat(model, batch["image"], batch["label"]).item())
    assert losses[0] == losses[1] != losses[2]


def test_the_state_continues_a_loop_exactly(tokenizer: CountedTokenizer, tmp_path: Path) -> None:
    """Also the last call, whose share of words was not observed yet when the state was saved."""
    model, dat = linear_net(), WithDAT(tokenizer, AttackConfig(share=0.2))
    for step in range(3):
        batch = batch_of(seed=step)
        dat(model, batch["image"], batch["label"], generator=generator(step))
    torch.save(dat.state_dict(), tmp_path / "dat.pt")
    restored = WithDAT(tokenizer, AttackConfig(share=0.2))
    restored.load_state_dict(torch.load(tmp_path / "dat.pt", weights_only=True))
    assert restored.state_dict() == dat.state_dict()
    for step in range(3, 5):
        batch = batch_of(seed=step)
        for one in (dat, restored):
            one(model, batch["image"], batch["label"], generator=generator(step))
        assert restored.metrics == dat.metrics
    assert restored.state_dict() == dat.state_dict()


# ---- any model, any criterion ----


def test_a_criterion_takes_the_place_of_cross_entropy(tokenizer: CountedTokenizer) -> None:
    batch, model = batch_of(), linear_net()
    smoothed = WithDAT(tokenizer, AttackConfig(eps=3.0), nn.CrossEntropyLoss(label_smoothing=0.1))
    ours = WithDAT(tokenizer, AttackConfig(eps=3.0), labels(smoothing=0.1))
    losses = [one(model, batch["image"], batch["label"], generator=generator()).item() for one in (smoothed, ours)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    several = F.one_hot(batch["label"], CLASSES).float()
    multi_label = WithDAT(tokenizer, AttackConfig(eps=3.0), nn.BCEWithLogitsLoss())
    assert multi_label(model, batch["image"], several).item() > 0
    with pytest.raises(ValueError, match=r"must return a scalar \(reduction='mean'\), got shape \(16,\)"):
        WithDAT(tokenizer, None, nn.CrossEntropyLoss(reduction="none"))(model, batch["image"], batch["label"])


def test_a_function_of_images_is_a_model(tokenizer: CountedTokenizer) -> None:
    batch, model = batch_of(), linear_net()
    results = []
    for network in (model, lambda images: model(images)):
        dat = WithDAT(tokenizer, AttackConfig(eps=3.0))
        dat(network, batch["image"], batch["label"], generator=generator()).backward()
        results.append(gradients(model))
        model.zero_grad()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert len(results[1]) == 7
    with pytest.raises(ConfigError, match="needs the model's parameters: pass an nn.Module"):
        WithDAT(tokenizer, AttackConfig(free=True))(lambda images: model(images), batch["image"], batch["label"])


def test_autocast_of_the_loop_reaches_the_model_but_not_the_words(tokenizer: CountedTokenizer) -> None:
    batch, model = batch_of(), linear_net()
    dat = WithDAT(tokenizer, AttackConfig(eps=3.0))
    exact = dat(model, batch["image"], batch["label"], generator=generator()).item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = dat(model, batch["image"], batch["label"], generator=generator())
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.02)
    assert loss.item() != exact


def test_an_autoencoder_needs_no_labels(tokenizer: CountedTokenizer) -> None:
    torch.manual_seed(3)
    model = MaskedAutoencoder(SIDE, 4, 3, 16, 1, 2, 16, 1, 2)
    dat = WithDAT(tokenizer, AttackConfig(share=0.2), MaskedReconstruction(0.5, True))
    dat(model, batch_of()["image"]).backward()
    assert dat.metrics["changed_words"] == pytest.approx(0.2, abs=0.1)
    assert gradients(model)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: (255 * image).byte(), r"must be float \(B, C, H, W\) with pixels in \[0, 1\], got torch.uint8"),
        (lambda image: image[0], r"must be float \(B, C, H, W\) .*, got torch.float32 \(3, 16, 16\)"),
        (lambda image: image[:3], "there are 3 images and 16 labels"),
        (lambda image: 2 * image - 1, r"takes pixels in \[0, 1\], got \[-0.99.*normalize inside the model"),
        (lambda image: image[:, :, :15], "image size 15 x 16 is not divisible by the tokenizer's factor 4"),
    ],
)
def test_images_of_another_form_are_rejected(
    change: Callable[[Tensor], Tensor], message: str, tokenizer: CountedTokenizer
) -> None:
    batch = batch_of()
    model = nn.Sequential(nn.AdaptiveAvgPool2d(SIDE), linear_net())
    with pytest.raises((ValueError, ConfigError), match=message):
        WithDAT(tokenizer)(model, change(batch["image"]), batch["label"])


def test_a_warm_up_needs_the_epoch(tokenizer: CountedTokenizer) -> None:
    batch, dat = batch_of(), WithDAT(tokenizer, AttackConfig(eps=3.0, ramp_epochs=2.0))
    with pytest.raises(ConfigError, match=r"hold_epochs or ramp_epochs needs the epoch: dat\(..., epoch=0.5\)"):
        dat(linear_net(), batch["image"], batch["label"])
    dat(linear_net(), batch["image"], batch["label"], epoch=1.0)
    assert dat.metrics["eps"] == 1.5
    assert dat.metrics["adversary_ramp"] == 0.5


def test_the_default_eps_of_an_attack_is_warned_about_at_64_pixels(caplog: pytest.LogCaptureFixture) -> None:
    """0.1 was chosen for another tokenizer at 224 px; with the embedded one at 64 px it changes almost no words."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, CLASSES))
    images = F.interpolate(torch.rand(4, 3, 8, 8), size=(64, 64), mode="bilinear")
    weak, strong = WithDAT(load_tokenizer(), AttackConfig()), WithDAT(load_tokenizer())
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            strong(model, images, torch.arange(4))
        assert not caplog.records
        for _ in range(6):
            weak(model, images, torch.arange(4))
    assert len(caplog.records) == 1
    assert "% of the visual words in the last 3 steps: eps 0.1 is too small" in caplog.text
    assert "AttackConfig(share=0.038)" in caplog.text
    assert weak.metrics["changed_words"] < 0.005 < 0.02 < strong.metrics["changed_words"]


# ---- two processes ----


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, CLASSES))


def small_tokenizer() -> VisualTokenizer:
    torch.manual_seed(1)
    return LightTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)).freeze()


def own_loop_of_a_rank(rank: int, folder: Path) -> None:
    """Three steps of a loop with DistributedDataParallel as torch sets it up, BatchNorm's buffers included."""
    with process_group(World(rank, 2, rank), CPU):
        model = DistributedDataParallel(small_network())
        dat, found = WithDAT(small_tokenizer(), AttackConfig(share=0.2)), []
        for step in range(3):
            batch = batch_of(seed=10 * step + rank)
            model.zero_grad()
            dat(model, batch["image"], batch["label"], generator=generator(rank)).backward()
            found.append((gradients(model.module), dat.metrics))
        torch.save(found, folder / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_ranks_share_gradient_and_strength(tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, own_loop_of_a_rank, tmp_path), 60) == [0, 0]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for (mine, my_metrics), (theirs, their_metrics) in zip(first, second, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        assert my_metrics["eps"] == their_metrics["eps"]
        assert my_metrics["changed_words"] == their_metrics["changed_words"]
        assert my_metrics["loss"] != their_metrics["loss"]
