"""AdvProp's two sets of norms: who sees what, whose keys are whose, and that nothing else changes."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from dat_steps import CLASSES, CountedTokenizer, batch_of, generator, gradients, labels
from ranks import exit_codes, start_ranks
from timm.layers.grn import GlobalResponseNorm
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mae_dat.attacks.discrete import AttackConfig
from mae_dat.attacks.pixel import PixelAttack
from mae_dat.config.errors import ConfigError
from mae_dat.data.image_set import Batch
from mae_dat.models.classifier import build_classifier
from mae_dat.models.split_norms import NORMS, SplitNorm, auxiliary_norms, main_norms, split_norms
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.models.weights.load import load_classifier
from mae_dat.runtime.sharding import no_gradient_sync
from mae_dat.runtime.world import World, process_group
from mae_dat.training.finetune import draw_validation_adversary
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.objectives.pixel import WithPixelAdversary
from mae_dat.training.optim import update_average

tokenizer = pytest.fixture(lambda: light_tokenizer())
ATTACK = PixelAttack(0.1, 0.05, 2, random_start=True)


def light_tokenizer() -> CountedTokenizer:
    torch.manual_seed(0)
    return CountedTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)).freeze()


def conv_net() -> nn.Module:
    """Two BatchNorms, one of timm's with its activation inside, and no dropout."""
    torch.manual_seed(4)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2)),
        timm.layers.BatchNormAct2d(8),
        *(nn.Flatten(), nn.Linear(72, CLASSES)),
    )


def split(net: nn.Module) -> nn.Module:
    split_norms(net)
    return net


def advprop() -> WithPixelAdversary:
    return WithPixelAdversary(labels(), ATTACK, 1.0)


def step(model: nn.Module, objective: Objective, batch: Batch | None = None) -> dict[str, Tensor]:
    torch.manual_seed(5)
    parts = objective.step(model, batch or batch_of(), generator())
    parts["loss"].backward()
    return parts


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "convnext_atto", "resnetv2_50"])
def test_a_split_network_is_the_network_that_it_was(name: str) -> None:
    """Outputs, keys and their tensors; the copies come on top and are equal to begin with."""
    torch.manual_seed(0)
    net = build_classifier(name, CLASSES, 32).eval()
    image, before = torch.rand(2, 3, 32, 32), {key: value.clone() for key, value in net.state_dict().items()}
    expected, norms = net(image), sum(isinstance(part, NORMS) for part in net.modules())
    split_norms(net)
    assert sum(isinstance(part, SplitNorm) for part in net.modules()) == norms > 4
    kept = main_norms(net.state_dict())
    assert list(kept) == list(before)
    assert all(torch.equal(kept[key], before[key]) for key in before)
    assert torch.equal(net(image), expected)
    with auxiliary_norms(net):
        assert torch.equal(net(image), expected)
        for key, value in net.state_dict().items():
            if ".auxiliary." in key and value.is_floating_point():
                value.add_(0.5)
        assert not torch.allclose(net(image), expected, atol=1e-3)
    assert torch.equal(net(image), expected)
    load_classifier(build_classifier(name, CLASSES, 32), {**net.net.state_dict()})  # a checkpoint holds both


TIMMS = (
    *("RmsNorm", "RmsNorm2d", "RmsNormFp32", "RmsNorm2dFp32", "RmsNormAct2d", "LayerNorm2dFp32", "GroupNorm1"),
    *("SimpleNorm", "SimpleNorm2d", "SimpleNormFp32", "SimpleNorm2dFp32", "EvoNorm2dB0", "EvoNorm2dS0a"),
    *("EvoNorm2dS1", "FilterResponseNormAct2d", "FilterResponseNormTlu2d"),
)


@pytest.mark.parametrize("name", TIMMS)
def test_every_norm_of_timm_is_split(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """In a network that has another one too: in part would be silent."""
    if not hasattr(timm.layers, name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    own = getattr(timm.layers, name)(32)
    flat = name in ("SimpleNorm", "SimpleNormFp32", "RmsNorm", "RmsNormFp32")
    image = torch.rand(2, 3, 32) if flat else torch.rand(2, 32, 4, 4)
    net = nn.ModuleList([nn.BatchNorm2d(3), own]).eval()
    expected = own(image)
    split_norms(net)
    assert all(isinstance(part, SplitNorm) for part in net)
    assert not caplog.records
    for value in own.auxiliary.parameters():
        value.data += 0.5
    assert torch.equal(own(image), expected)
    with auxiliary_norms(net):
        assert not torch.allclose(own(image), expected, atol=1e-3)


def test_a_norm_by_its_name_alone_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    split_norms(nn.ModuleList([nn.LayerNorm(4), GlobalResponseNorm(4)]))
    assert "not split, but shared by both views: GlobalResponseNorm" in caplog.text


def test_the_adversary_that_is_drawn_is_the_one_that_is_trained_on(tokenizer: CountedTokenizer) -> None:
    """After an epoch, too, it attacks the auxiliary norms."""
    net, batch = split(conv_net()), batch_of(4)
    objective = WithDAT(tokenizer, AttackConfig(eps=3.0), labels())
    passed: list[bool] = []
    for norm in splits(net):
        norm.register_forward_pre_hook(lambda one, _: passed.append(one.uses_auxiliary))  # type: ignore[func-returns-value]
    samples = [{"image": batch["image"][row], "label": int(batch["label"][row])} for row in range(4)]
    assert draw_validation_adversary(net, objective, samples, 0, torch.device("cpu"))["adversary"].ndim == 3
    assert passed
    assert all(passed)
    assert not any(norm.uses_auxiliary for norm in splits(net))


def test_the_way_back_is_found_after_an_error() -> None:
    net = split(conv_net())
    with pytest.raises(ValueError, match="not today"), auxiliary_norms(net):
        raise ValueError("not today")
    assert not any(part.uses_auxiliary for part in net.modules() if isinstance(part, SplitNorm))


def test_a_network_without_norms_is_refused() -> None:
    with pytest.raises(ConfigError, match="no norms to split: remove --split_norms"):
        split_norms(nn.Linear(3, 3))


@pytest.mark.parametrize("kind", ["advprop", "dat"])
def test_main_norms_see_clean_images_alone(kind: str, tokenizer: CountedTokenizer) -> None:
    """Statistics and gradients of the main norms are those of a plain step, to the bit for the statistics."""
    plain, net = conv_net(), split(conv_net())
    objective = advprop() if kind == "advprop" else WithDAT(tokenizer, AttackConfig(eps=3.0), labels())
    step(plain, labels())
    parts = step(net, objective)
    for one, other in zip((part for part in plain.modules() if isinstance(part, NORMS)), splits(net), strict=True):
        assert torch.equal(one.running_mean, other.running_mean)
        assert torch.equal(one.running_var, other.running_var)
        assert int(other.num_batches_tracked) == 1
        assert int(other.auxiliary.num_batches_tracked) == (3 if kind == "advprop" else 2)  # attack steps, and the loss
        torch.testing.assert_close(one.weight.grad, other.weight.grad)
        assert float(other.auxiliary.weight.grad.abs().sum()) > 0
        assert not torch.equal(other.running_mean, other.auxiliary.running_mean)
    torch.testing.assert_close(parts["loss"], parts["loss_clean"] + parts["loss_adversarial"])


def splits(net: nn.Module) -> list[SplitNorm]:
    return [part for part in net.modules() if isinstance(part, SplitNorm)]


def test_an_average_follows_both_and_answers_by_the_main_ones() -> None:
    net = split(conv_net())
    ema = ModelEmaV3(net, decay=0.5)
    before = copy.deepcopy(ema.module)
    with torch.no_grad():
        for norm in splits(net):
            norm.weight.add_(1.0)
            norm.auxiliary.weight.add_(3.0)
    update_average(ema, net, 10, torch.tensor(0.0))
    for old, new in zip(splits(before), splits(ema.module), strict=True):
        torch.testing.assert_close(new.weight, old.weight + 0.5)
        torch.testing.assert_close(new.auxiliary.weight, old.auxiliary.weight + 1.5)
    with auxiliary_norms(net):
        assert not any(norm.uses_auxiliary for norm in splits(ema.module))


# ---- two processes ----


def one_of_two(rank: int, folder: Path) -> None:
    """Two micro-batches of a rank, and the gradient of both ranks: each norm is unused in one of two passes."""
    with process_group(World(rank, 2, rank), torch.device("cpu")):
        torch.save([gradients(net) for net in trained(rank)], folder / f"rank{rank}.pt")


def trained(rank: int) -> list[nn.Module]:
    nets = []
    for objective in objectives():
        net = split(conv_net())
        spread = DistributedDataParallel(net, broadcast_buffers=False)
        with no_gradient_sync(spread):
            step(spread, objective, batch_of(seed=rank))
        step(spread, objective, batch_of(seed=rank + 2))
        nets.append(net)
    return nets


def objectives() -> tuple[Objective, Objective]:
    source = LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)
    torch.manual_seed(0)
    return advprop(), WithDAT(LightTokenizer(source).freeze(), AttackConfig(eps=3.0), labels())


@pytest.mark.slow
def test_two_ranks_have_the_mean_of_their_gradients(tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, one_of_two, tmp_path), 60) == [0, 0]
    found = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for number, objective in enumerate(objectives()):
        net = split(conv_net())
        for seed in (0, 1, 2, 3):
            step(net, objective, batch_of(seed=seed))
        for name, expected in gradients(net).items():
            for one in found:
                torch.testing.assert_close(one[number][name], expected / 2)
