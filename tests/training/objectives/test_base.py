"""Objectives: what is shared by the views of a batch, what the parts add up to, and that an attack leaves no trace."""

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.config.adversaries import ATTACK_KINDS, AttackConfig
from mae_dat.config.groups import AugmentConfig
from mae_dat.data.image_set import Batch
from mae_dat.models.mae import MaskedAutoencoder, masked_mse
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.runtime.seeds import seed_everything
from mae_dat.training.objectives.base import Objective, Parts
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.objectives.reconstruction import MaskedReconstruction

SIDE, CLASSES = 16, 5


@pytest.fixture
def tokenizer() -> LightTokenizer:
    config = LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)
    return LightTokenizer(config).freeze()


@pytest.fixture
def batch() -> Batch:
    return {
        "image": torch.rand(4, 3, SIDE, SIDE),
        "label": torch.tensor([0, 3, 1, 4]),
        "index": torch.arange(4),
        "skipped": torch.zeros(4, dtype=torch.int64),
    }


class RecordingMae(MaskedAutoencoder):
    """Keeps the arguments of every forward."""

    def __init__(self) -> None:
        super().__init__(SIDE, 4, 3, 16, 1, 2, 16, 1, 2)
        self.seen: list[tuple[Tensor, float, Tensor]] = []

    def forward(self, image: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append((image.detach().clone(), mask_ratio, noise.clone()))
        return super().forward(image, mask_ratio, noise)


class SmallNet(nn.Module):
    """A classifier that keeps the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Linear(8, CLASSES)
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image.detach().clone())
        return self.head(self.norm(self.conv(image)).relu().mean((2, 3)))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def run(objective: Objective, model: nn.Module, batch: Batch) -> Parts:
    """One step, as the engine does it: mixup draws from the global state, and the objective is told its parts."""
    seed_everything(3)
    parts = objective.step(model, batch, generator())
    objective.observe({name: float(value.detach()) for name, value in parts.items()})
    return parts


def plain_labels(**changes: Any) -> Classification:
    return Classification(AugmentConfig(**changes), CLASSES)


# ---- masked reconstruction ----


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_is_the_error_at_the_removed_patches(norm_pix: bool, batch: Batch) -> None:
    model = RecordingMae()
    loss = run(MaskedReconstruction(0.5, norm_pix), model, batch)["loss"]
    image, ratio, noise = model.seen[0]
    prediction, mask = model(image, ratio, noise)
    assert ratio == 0.5
    assert torch.equal(image, batch["image"])
    assert torch.equal(loss, masked_mse(prediction, model.target(image, norm_pix), mask))
    assert loss > 0.1


def test_the_mask_is_a_function_of_the_generator(batch: Batch) -> None:
    model, objective = RecordingMae(), MaskedReconstruction(0.5, True)
    for seed in (1, 1, 2):
        objective.step(model, batch, torch.Generator().manual_seed(seed))
    (_, _, one), (_, _, same), (_, _, other) = model.seen
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", ATTACK_KINDS)
def test_both_views_of_an_image_share_mask_and_target(kind: str, batch: Batch, tokenizer: LightTokenizer) -> None:
    model = RecordingMae()
    objective = WithDAT(tokenizer, AttackConfig(kind, eps=3.0), MaskedReconstruction(0.5, True))  # type: ignore[arg-type]
    parts = run(objective, model, batch)
    noises = [noise for _, _, noise in model.seen]
    assert all(torch.equal(noise, noises[0]) for noise in noises)
    adversarial, ratio, noise = model.seen[-1]
    assert not torch.equal(adversarial, batch["image"])
    prediction, mask = model(adversarial, ratio, noise)
    to_clean = masked_mse(prediction, model.target(batch["image"], True), mask)
    to_itself = masked_mse(prediction, model.target(adversarial, True), mask)
    assert torch.equal(parts["loss_adversarial"], to_clean), "the target is the clean image"
    assert not torch.equal(to_clean, to_itself)


# ---- classification ----


def test_soft_targets_are_label_smoothing(batch: Batch) -> None:
    model = SmallNet().eval()
    for smoothing in (0.0, 0.1, 0.3):
        loss = run(plain_labels(smoothing=smoothing), model, batch)["loss"]
        expected = F.cross_entropy(model(batch["image"]), batch["label"], label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected)
    _, targets = plain_labels(smoothing=0.1).prepare(model, batch, generator())
    assert targets.sum(1).tolist() == pytest.approx([1] * 4)
    assert targets[1].tolist() == pytest.approx([0.02, 0.02, 0.02, 0.92, 0.02])


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"cutmix_minmax": (0.3, 0.6)}])
def test_mixing_makes_other_images_and_targets(settings: dict[str, Any], batch: Batch) -> None:
    before = batch["image"].clone()
    seed_everything(3)
    image, targets = plain_labels(smoothing=0.0, **settings).prepare(SmallNet(), batch, generator())
    assert torch.equal(batch["image"], before), "the batch is not changed in place"
    assert not torch.equal(image, before)
    assert targets.sum(1).tolist() == pytest.approx([1] * 4, abs=1e-5)
    assert all(int((row > 0).sum()) == 2 for row in targets)
    assert image.min() >= 0
    assert image.max() <= 1


def test_both_views_are_made_from_the_mixed_image_and_its_targets(batch: Batch, tokenizer: LightTokenizer) -> None:
    model, inner = SmallNet().eval(), plain_labels(mixup=0.8, smoothing=0.1)
    seed_everything(3)
    mixed, targets = inner.prepare(model, batch, generator())
    model.seen.clear()
    parts = run(WithDAT(tokenizer, AttackConfig("released", eps=2.0, random_start=0.0), inner), model, batch)
    torch.testing.assert_close(model.seen[0], mixed)
    clean, adversarial = F.cross_entropy(model(model.seen[0]), targets), F.cross_entropy(model(model.seen[2]), targets)
    torch.testing.assert_close(parts["loss_clean"], clean)
    torch.testing.assert_close(parts["loss_adversarial"], adversarial)
    torch.testing.assert_close(model.seen[1], tokenizer.reconstruct(mixed), msg="the attack starts from the mixed Q(x)")


# ---- DAT ----


def test_the_released_loss_is_clean_plus_adversarial(batch: Batch, tokenizer: LightTokenizer) -> None:
    parts = run(WithDAT(tokenizer, AttackConfig(eps=2.0), plain_labels()), SmallNet(), batch)
    assert set(parts) == {"loss", "loss_clean", "loss_adversarial", "changed_words", "eps"}
    torch.testing.assert_close(parts["loss"], parts["loss_clean"] + parts["loss_adversarial"])
    assert parts["loss_clean"] > 0
    assert parts["loss_clean"] != parts["loss_adversarial"]
    assert 0 < parts["changed_words"] <= 1
    assert float(parts["eps"]) == 2.0
    assert parts["loss"].requires_grad


def test_the_papers_loss_is_adversarial_only(batch: Batch, tokenizer: LightTokenizer) -> None:
    model = SmallNet()
    parts = run(WithDAT(tokenizer, AttackConfig("paper", eps=50.0), plain_labels()), model, batch)
    assert set(parts) == {"loss", "loss_adversarial", "changed_words", "eps"}
    assert torch.equal(parts["loss"], parts["loss_adversarial"])
    assert not any(torch.equal(seen, batch["image"]) for seen in model.seen), "no clean view, no wasted forward"


@pytest.mark.parametrize("kind", ATTACK_KINDS)
def test_the_attack_leaves_no_gradient_and_no_flag(kind: str, batch: Batch, tokenizer: LightTokenizer) -> None:
    model = SmallNet()
    model.norm.eval()
    objective = WithDAT(tokenizer, AttackConfig(kind, eps=2.0), plain_labels())  # type: ignore[arg-type]
    parts = run(objective, model, batch)
    assert all(p.grad is None for p in [*model.parameters(), *tokenizer.parameters()])
    assert [module.training for module in (model, model.conv, model.norm)] == [True, True, False]
    parts["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in tokenizer.parameters())


def test_reconstructions_are_meant_to_change_nothing(
    batch: Batch, tokenizer: LightTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    objective = WithDAT(tokenizer, AttackConfig("reconstruction", share=0.05), plain_labels())
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            parts = run(objective, SmallNet(), batch)
            assert parts["changed_words"] == 0
            assert parts["loss"] == parts["loss_clean"] + parts["loss_adversarial"]
    assert not caplog.records


def test_an_attack_that_changes_nothing_is_warned_about(
    batch: Batch, tokenizer: LightTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    objective = WithDAT(tokenizer, AttackConfig(eps=1e-7), plain_labels())
    model = SmallNet()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert run(objective, model, batch)["changed_words"] == 0
        assert not caplog.records
        run(objective, model, batch)
        assert "changed 0 % of the visual words in the last 3 steps: eps 1e-07 is too small" in caplog.text
        assert "AttackConfig(share=0.038), on the command line --dat_share 0.038" in caplog.text
        run(objective, model, batch)
        assert len(caplog.records) == 1, "once, not in every step"


def test_a_share_below_half_a_percent_is_weak_unless_it_was_asked_for(
    tokenizer: LightTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    for attack, shares, warns in (
        (AttackConfig(), [0.0, 0.006, 0.0], True),
        (AttackConfig(), [0.003, 0.003, 0.003], True),
        (AttackConfig(), [0.0, 0.01, 0.01], False),
        (AttackConfig(share=0.002), [0.002, 0.002, 0.002], False),
        (AttackConfig(share=0.002), [0.0, 0.0, 0.0], True),
        (AttackConfig(ramp_epochs=3.0), [0.0, 0.0, 0.0], False),
    ):
        objective = WithDAT(tokenizer, attack)
        ramp = {"adversary_ramp": 0.2} if attack.has_schedule else {}
        for share in shares:
            objective.observe({"changed_words": share, **ramp})
        assert bool(caplog.records) == warns, (attack, shares)
        caplog.clear()


def test_the_strength_is_found_once_and_then_followed(batch: Batch, tokenizer: LightTokenizer) -> None:
    objective = WithDAT(tokenizer, AttackConfig(eps=0.01, share=0.25, random_start=0.0), plain_labels())
    model = SmallNet()
    assert not objective.strength_is_known
    shares = [float(run(objective, model, batch)["changed_words"]) for _ in range(5)]
    assert objective.strength_is_known
    assert shares == pytest.approx([0.25] * 5, abs=0.1)
    assert objective.strength().eps != 0.01
    searched = len(model.seen)
    run(objective, model, batch)
    assert len(model.seen) - searched == 3, "clean, attack, adversarial: no search any more"


def test_the_controllers_state_survives_a_checkpoint(batch: Batch, tokenizer: LightTokenizer) -> None:
    def fresh() -> WithDAT:
        return WithDAT(tokenizer, AttackConfig(share=0.2), plain_labels())

    objective, model = fresh(), SmallNet().eval()
    untouched = fresh()
    untouched.load_state_dict(objective.state_dict())
    assert not untouched.strength_is_known, "a strength that was never found is not restored"
    for _ in range(3):
        run(objective, model, batch)
    restored = fresh()
    restored.load_state_dict(objective.state_dict())
    assert restored.strength_is_known
    assert restored.strength() == objective.strength()
    one, other = run(objective, model, batch), run(restored, model, batch)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert restored.state_dict() == objective.state_dict()


def test_random_words_need_no_controller(batch: Batch, tokenizer: LightTokenizer) -> None:
    objective = WithDAT(tokenizer, AttackConfig("random", share=0.25), plain_labels())
    assert objective.strength_is_known
    assert float(run(objective, SmallNet(), batch)["changed_words"]) == 0.25
