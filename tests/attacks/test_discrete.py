"""Discrete adversaries: the reference step, no trace left behind, and the rule of each kind."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacked_models import Mixed, Mosaic, generator, golden_classifier, soft_cross_entropy, trained_classifier
from tiny_tokenizers import golden_image, golden_vqgan
from torch import Tensor

from mae_dat.attacks.discrete import AttackConfig, DiscreteAdversary, discrete_adversary, random_start, random_words
from mae_dat.attacks.gradient import LossFn, input_gradient, project, unit
from mae_dat.config.adversaries import ATTACK_KINDS
from mae_dat.config.errors import ConfigError
from mae_dat.models.tokenizer import VisualTokenizer, load_tokenizer

Golden = Callable[[str], dict[str, np.ndarray]]


# ---- released ----


@pytest.mark.parametrize("name, eps, changed", [("ref", 0.1, 5), ("big", 4.0, 139)])
def test_the_released_step_reproduces_the_reference(golden: Golden, name: str, eps: float, changed: int) -> None:
    image, recorded = golden_image(golden("vqgan_tiny")), golden("dat_step")
    loss_fn = soft_cross_entropy(golden_classifier(), torch.from_numpy(recorded["target"]))
    found = discrete_adversary(image, loss_fn, golden_vqgan(), AttackConfig(eps=eps, random_start=0.0), generator())
    assert loss_fn(image).item() == pytest.approx(float(recorded["loss_clean"]), rel=1e-5)
    assert int((found.words != found.adversarial_words).sum()) == changed
    assert found.changed_share.item() == changed / 256
    assert loss_fn(found.adversarial).item() == pytest.approx(float(recorded[f"loss_adv_{name}"]), rel=1e-5)
    # Recorded in half precision.
    reference = torch.from_numpy(recorded[f"advrec_{name}"]).float()
    torch.testing.assert_close(found.adversarial, reference, rtol=0, atol=6e-4)


def test_the_random_start_stays_in_the_ball_and_is_drawn_per_batch() -> None:
    center, config = torch.rand(4, 3, 8, 8) * 0.5 + 0.25, AttackConfig(eps=0.3, random_start=1.0)
    start = random_start(center, config, generator())
    distance = (start - center).flatten(1).norm(dim=1)
    torch.testing.assert_close(distance, torch.full((4,), 0.3))  # far from the borders nothing is clamped
    edge = torch.ones(4, 3, 8, 8)
    assert ((random_start(edge, config, generator()) - edge).flatten(1).norm(dim=1) < 0.3).all()
    assert random_start(edge, config, generator()).max() <= 1
    moved = [
        (random_start(center, dataclasses.replace(config, random_start=0.8), generator(seed)) != center)
        .flatten(1)
        .any(1)
        for seed in range(300)
    ]
    assert all(bool(batch.all()) or not bool(batch.any()) for batch in moved)
    assert np.mean([bool(batch.all()) for batch in moved]) == pytest.approx(0.8, abs=0.08)


def test_the_adversarial_point_stays_in_the_ball() -> None:
    """With a tokenizer that changes nothing, the adversarial image is the attacked point itself."""

    class Identity(Mosaic):
        def words_of(self, latent: Tensor) -> Tensor:
            self.seen = latent
            return torch.zeros(len(latent), 4, 4, dtype=torch.int64)

        def latent(self, image: Tensor) -> Tensor:
            return image

        def decode(self, words: Tensor) -> Tensor:
            return self.seen

    image, net = torch.rand(5, 3, 16, 16) * 0.5 + 0.25, golden_classifier()
    loss_fn = soft_cross_entropy(net, torch.arange(5))
    config = AttackConfig(eps=0.25, random_start=1.0, steps=3)
    found = discrete_adversary(image, loss_fn, Identity(2), config, generator())
    distance = (found.adversarial - image).flatten(1).norm(dim=1)
    assert (distance <= 0.25 + 1e-6).all()
    assert (distance > 0.1).all()
    without = discrete_adversary(image, loss_fn, Identity(2), AttackConfig(eps=0.25, random_start=0.0), generator())
    gradient = input_gradient(image, loss_fn)
    torch.testing.assert_close(without.adversarial, image + 0.25 * unit(gradient), rtol=0, atol=1e-5)


def test_unit_and_project() -> None:
    delta = torch.randn(6, 3, 5, 5) * torch.logspace(-3, 3, 6).view(-1, 1, 1, 1)
    norms, length = unit(delta).flatten(1).norm(dim=1), delta.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(6))
    assert torch.equal(unit(torch.zeros(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2))
    projected = project(delta, 1.0)
    torch.testing.assert_close(projected.flatten(1).norm(dim=1), length.clamp(max=1.0))
    assert torch.equal(projected[length < 1], delta[length < 1])
    torch.testing.assert_close(project(projected, 1.0), projected)


# ---- no trace ----


@pytest.mark.parametrize("kind", ATTACK_KINDS)
def test_an_attack_leaves_no_trace(kind: str) -> None:
    net, tokenizer = Mixed(), Mosaic()
    net.rest[0].weight.grad = torch.full_like(net.rest[0].weight, 3.0)
    flags = {name: part.training for name, part in net.named_modules()}
    assert set(flags.values()) == {True, False}
    state = {key: value.clone() for key, value in net.state_dict().items()}
    image, before = torch.rand(4, 3, 16, 16), torch.get_rng_state()
    copy = image.clone()
    config = AttackConfig(kind=kind, eps=1.0, random_start=1.0)  # type: ignore[arg-type]
    found = discrete_adversary(image, soft_cross_entropy(net, torch.arange(4)), tokenizer, config, generator())
    assert {name: part.training for name, part in net.named_modules()} == flags
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    gradients = [name for name, weight in net.named_parameters() if weight.grad is not None]
    assert gradients == ["rest.0.weight"]
    assert (net.rest[0].weight.grad == 3).all()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(image, copy)
    assert not image.requires_grad
    parts = (found.reconstruction, found.adversarial, found.words, found.adversarial_words)
    assert not any(part.requires_grad for part in parts)


@pytest.mark.parametrize("kind", ["released", "random"])
def test_the_generator_is_the_only_source_of_chance(kind: str) -> None:
    image, config = torch.rand(3, 3, 16, 16), AttackConfig(kind=kind, eps=2.0, random_start=1.0)  # type: ignore[arg-type]
    loss_fn = soft_cross_entropy(golden_classifier(), torch.arange(3))

    def attacked(seed: int) -> Tensor:
        torch.rand(1)  # the global state moves on
        return discrete_adversary(image, loss_fn, Mosaic(), config, generator(seed)).adversarial_words

    assert torch.equal(attacked(1), attacked(1))
    assert not torch.equal(attacked(1), attacked(2))


def test_a_reconstruction_changes_no_word_and_asks_for_no_loss() -> None:
    image, tokenizer = torch.rand(2, 3, 16, 16), Mosaic()

    def never(image: Tensor) -> Tensor:
        raise AssertionError("there is no adversary")

    found = discrete_adversary(image, never, tokenizer, AttackConfig("reconstruction", share=0.5), generator())
    assert torch.equal(found.adversarial, tokenizer.reconstruct(image))
    assert torch.equal(found.adversarial_words, tokenizer.encode(image))
    assert found.changed_share == 0


def test_an_attack_works_where_gradients_are_off() -> None:
    image, config = torch.rand(2, 3, 16, 16), AttackConfig(eps=2.0)
    loss_fn = soft_cross_entropy(golden_classifier(), torch.arange(2))
    with torch.no_grad():
        found = discrete_adversary(image, loss_fn, Mosaic(), config, generator())
    assert found.changed_share > 0


@pytest.mark.parametrize("bad", [-0.01, 1.01])
def test_pixels_out_of_range_are_refused(bad: float) -> None:
    image = torch.rand(1, 3, 8, 8)
    image[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        discrete_adversary(image, lambda x: x.sum(), Mosaic(), AttackConfig(), generator())
    with pytest.raises(ConfigError, match="8 x 10 is not divisible"):
        discrete_adversary(torch.rand(1, 3, 8, 10), lambda x: x.sum(), Mosaic(), AttackConfig(), generator())


# ---- paper ----


def test_the_papers_step_is_alpha_times_each_samples_own_gradient() -> None:
    image, net, label = torch.rand(4, 3, 16, 16), golden_classifier(), torch.arange(4)
    tokenizer, config = Mosaic(), AttackConfig(kind="paper", eps=5.0)
    found = discrete_adversary(image, soft_cross_entropy(net, label), tokenizer, config, generator())
    point = tokenizer.reconstruct(image).requires_grad_()
    F.cross_entropy(net(point), label, reduction="sum").backward()
    assert point.grad is not None
    expected = tokenizer.encode((image + 5.0 * point.grad).clamp(0, 1))
    assert torch.equal(found.adversarial_words, expected)
    assert torch.equal(found.words, tokenizer.encode(image))
    assert torch.equal(found.adversarial, tokenizer.decode(expected))
    assert 0 < found.changed_share < 1
    for row in range(4):  # the size of the batch does not matter
        alone = discrete_adversary(
            image[row : row + 1], soft_cross_entropy(net, label[row : row + 1]), tokenizer, config, generator()
        )
        assert torch.equal(alone.adversarial_words[0], found.adversarial_words[row])


# ---- random ----


@pytest.mark.parametrize("share", [0.05, 0.3, 0.999])
def test_random_words_changes_exactly_the_share_in_every_image(share: float) -> None:
    words = torch.randint(0, 16, (20, 6, 10))
    changed = random_words(words, torch.zeros(16, 1), share, generator())
    assert ((changed != words).flatten(1).sum(1) == round(share * 60)).all()
    assert changed.min() >= 0
    assert changed.max() < 16
    assert torch.equal(changed, random_words(words, torch.zeros(16, 1), share, generator()))
    assert not torch.equal(changed, random_words(words, torch.zeros(16, 1), share, generator(1)))


def test_random_words_are_uniform_in_place_and_in_word() -> None:
    words = torch.full((4000, 2, 5), 3)
    changed = random_words(words, torch.zeros(8, 1), 0.2, generator())
    places = (changed != words).flatten(1).sum(0).float()
    assert (places - 800).abs().max() < 6 * math.sqrt(800 * 0.8)
    counts = torch.bincount(changed[changed != words], minlength=8).float()
    assert counts[3] == 0
    others = counts[torch.arange(8) != 3]
    assert (others - 8000 / 7).abs().max() < 6 * math.sqrt(8000 / 7)


def test_the_random_kind_decodes_what_it_changed() -> None:
    image, tokenizer = torch.rand(2, 3, 16, 16), Mosaic()
    config = AttackConfig(kind="random", share=0.25)
    found = discrete_adversary(image, lambda x: x.sum(), tokenizer, config, generator())
    assert found.changed_share.item() == 0.25
    assert torch.equal(found.adversarial, tokenizer.decode(found.adversarial_words))
    assert torch.equal(found.reconstruction, tokenizer.reconstruct(image))


# ---- strength ----


def mean_loss_of_noise(found: DiscreteAdversary, eps: float, loss_fn: LossFn, tokenizer: VisualTokenizer) -> float:
    losses = []
    for seed in range(5):
        noise = torch.randn(found.reconstruction.shape, generator=generator(seed))
        point = (found.reconstruction + eps * unit(noise)).clamp(0, 1)
        losses.append(loss_fn(tokenizer.reconstruct(point)).item())
    return float(np.mean(losses))


@pytest.mark.parametrize("kind", ["released", "paper"])
def test_an_attack_raises_the_loss_where_chance_does_not(kind: str) -> None:
    net, image, label = trained_classifier()
    loss_fn, tokenizer = soft_cross_entropy(net, label), Mosaic()
    config = AttackConfig(kind=kind, eps=2.0 if kind == "released" else 20.0, random_start=0.0)  # type: ignore[arg-type]
    found = discrete_adversary(image, loss_fn, tokenizer, config, generator())
    clean, attacked = loss_fn(found.reconstruction).item(), loss_fn(found.adversarial).item()
    assert found.changed_share > 0.005
    radius = float((found.adversarial - found.reconstruction).flatten(1).norm(dim=1).max())
    assert attacked > clean + 0.2
    assert attacked - clean > 3 * abs(mean_loss_of_noise(found, radius, loss_fn, tokenizer) - clean)
    share = AttackConfig(kind="random", share=float(found.changed_share))
    chance = discrete_adversary(image, loss_fn, tokenizer, share, generator())
    assert loss_fn(chance.adversarial).item() < attacked


def test_by_default_the_released_attack_draws_from_the_global_generator() -> None:
    image, tokenizer = torch.rand(2, 3, 32, 32), load_tokenizer()
    attack = AttackConfig("random", share=0.3)
    torch.manual_seed(5)
    first = discrete_adversary(image, lambda x: x.sum(), tokenizer, attack)
    torch.manual_seed(5)
    again = discrete_adversary(image, lambda x: x.sum(), tokenizer, attack)
    assert torch.equal(first.adversarial_words, again.adversarial_words)
    expected = discrete_adversary(image, lambda x: x.sum(), tokenizer, attack, torch.Generator().manual_seed(5))
    assert torch.equal(first.adversarial_words, expected.adversarial_words)
    torch.manual_seed(5)
    by_default = discrete_adversary(image, lambda x: x.sum(), tokenizer)
    given = AttackConfig("released", eps=0.1), torch.Generator().manual_seed(5)
    expected = discrete_adversary(image, lambda x: x.sum(), tokenizer, *given)
    assert torch.equal(by_default.adversarial, expected.adversarial)
