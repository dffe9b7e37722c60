"""AutoAttack: no weaker than PGD, no trace left, and a clear message without its package."""

import pytest
import torch
from attack_generators import generators
from attacked_models import golden_classifier, trained_classifier

from mae_dat.attacks.auto_attack import auto_attack
from mae_dat.attacks.pixel import PixelAttack, pixel_adversary
from mae_dat.config.errors import MissingInputError


def test_autoattack_says_what_to_install() -> None:
    try:
        import torchattacks  # noqa: F401
    except ImportError:
        with pytest.raises(MissingInputError, match=r'pip install "mae-dat\[autoattack\]"'):
            auto_attack(golden_classifier(), torch.rand(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("levels", [8, pytest.param(2, marks=pytest.mark.slow)])  # only few survive 8: quickly done
def test_autoattack_is_no_weaker_than_pgd_and_leaves_no_trace(levels: int) -> None:
    pytest.importorskip("torchattacks")
    net, image, label = trained_classifier()
    image, label, eps = image[:16], label[:16], levels / 255
    net.train()
    attack = PixelAttack(eps, eps / 4, 10)
    weaker = int((net(pixel_adversary(net, image, label, attack, generators(16))).argmax(1) == label).sum())
    before = torch.get_rng_state()
    found = auto_attack(net, image, label, eps)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(auto_attack(net, image, label, eps), found)
    assert all(part.training for part in net.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in net.parameters())
    assert (found - image).abs().max() <= eps + 1e-6
    assert int((net(found).argmax(1) == label).sum()) <= weaker < 16
