"""The share controller: it finds the target share of changed words, follows it, and resumes exactly."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from attacked_models import (
    Mosaic,
    generator,
    golden_classifier,
    soft_cross_entropy,
)
from tiny_tokenizers import pictures

from mae_dat.attacks.discrete import AttackConfig, discrete_adversary
from mae_dat.attacks.share_controller import ShareController
from mae_dat.config.errors import ConfigError
from mae_dat.models.tokenizer import load_tokenizer


@pytest.mark.parametrize("first", [1e-3, 0.1, 50.0])
@pytest.mark.parametrize("target", [0.01, 0.04, 0.3])
def test_find_reaches_the_target(first: float, target: float) -> None:
    controller = ShareController(AttackConfig(eps=first, share=target))

    def share_at(eps: float) -> float:
        return eps**1.5 / (eps**1.5 + 3)

    controller.find(share_at)
    assert share_at(controller.eps) == pytest.approx(target, rel=0.05)
    assert controller.apply(AttackConfig(share=target)).eps == controller.eps


def test_find_reaches_the_target_on_the_embedded_tokenizer() -> None:
    tokenizer, image, target = load_tokenizer(), pictures(6), 0.04
    loss_fn = soft_cross_entropy(golden_classifier(), torch.arange(6))
    config = AttackConfig(share=target)
    controller = ShareController(config)

    def share_at(eps: float) -> float:
        attack = dataclasses.replace(config, eps=eps)
        return discrete_adversary(image, loss_fn, tokenizer, attack, generator()).changed_share.item()

    controller.find(share_at)
    assert share_at(controller.eps) == pytest.approx(target, rel=0.25)


def test_a_strength_far_from_the_first_is_found(caplog: pytest.LogCaptureFixture) -> None:
    for far in (1e7, 1e-7):
        controller = ShareController(AttackConfig(share=0.05))

        def share_at(eps: float, far: float = far) -> float:
            return eps / (eps + 19 * far)

        controller.find(share_at)
        assert controller.eps == pytest.approx(far, rel=0.05)
    assert not caplog.records


@pytest.mark.parametrize(("most", "nearest"), [(0.0, 0.1), (0.02, 0.4)])
def test_a_share_out_of_reach_is_warned_about(most: float, nearest: float, caplog: pytest.LogCaptureFixture) -> None:
    controller = ShareController(AttackConfig("paper", share=0.05))
    controller.find(lambda eps: min(most, eps / 20))
    assert controller.eps == pytest.approx(nearest), "the smallest of those that come nearest"
    assert "changes 5.0 % of the words" in caplog.text
    assert f"which changes {100 * most:.2f} %" in caplog.text


@pytest.mark.parametrize("kind", ["released", "paper"])
def test_one_attack_refuses_a_share_that_it_cannot_hold(kind: str) -> None:
    config = AttackConfig(kind, share=0.05)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="set eps, or use WithDAT"):
        discrete_adversary(torch.rand(1, 3, 8, 8), lambda x: x.sum(), Mosaic(), config, generator())
    assert ShareController(config).apply(config).eps == AttackConfig(kind).eps == 0.1  # type: ignore[arg-type]


def test_observe_holds_the_share_of_a_network_that_hardens() -> None:
    controller = ShareController(AttackConfig(eps=1.0, share=0.05))
    noise = torch.rand(600, generator=generator()) * 0.4 + 0.8
    shares = []
    for step in range(600):
        strength = 0.05 / (1 + step / 200)  # what one eps changes becomes less and less
        shares.append(min(1.0, strength * controller.eps * noise[step].item()))
        controller.observe(shares[-1])
    assert np.mean(shares[-100:]) == pytest.approx(0.05, rel=0.1)
    assert controller.eps > 3


def test_no_share_at_all_raises_the_strength_at_once_but_never_without_bound() -> None:
    controller = ShareController(AttackConfig(eps=1.0, share=0.05))
    controller.observe(0.0)
    assert 1 < controller.eps <= 2
    for _ in range(2000):
        controller.observe(0.0)
    assert 10 < controller.eps < math.inf


def test_the_controller_goes_on_where_it_stood() -> None:
    one, other = (ShareController(AttackConfig(eps=0.3, share=0.04)) for _ in range(2))
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == {"eps": 0.3, "average": None}
    one.observe(0.01)
    other.load_state_dict(one.state_dict())
    for controller in (one, other):
        controller.observe(0.02)
    assert one.state_dict() == other.state_dict()
