"""The cheaper forms of the DAT step: what each costs in passes, which loss and gradient it has, and how they go
together."""

import dataclasses
import functools
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
    CountedTokenizer,
    Products,
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
from torch.utils._python_dispatch import TorchDispatchMode

import mae_dat.attacks.discrete
from mae_dat.attacks.discrete import AttackConfig, discrete_adversary
from mae_dat.attacks.gradient import input_gradient
from mae_dat.config.adversaries import DatConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import AugmentConfig, LaunchConfig
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.models.modes import frozen_parameters
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.runtime.sharding import no_gradient_sync
from mae_dat.runtime.world import World, process_group
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT, first_rows
from mae_dat.training.objectives.free_gradient import loss_and_gradient
from mae_dat.training.objectives.reconstruction import MaskedReconstruction

__all__ = ["tokenizer"]  # fixtures

# ---- cost ----


# Products of the network an image, in units of a forward pass of one layer of three: forward 3, the parameters'
# gradient 3, the input's 2, and 3 where it goes on to the pixels. Then images encoded and decoded, in batches.
COUNTED = 4 / IMAGES
PASSES = {
    "released": (AttackConfig(), 8 + 6 + 8, 2 + COUNTED, 2),
    "at image": (AttackConfig(at="image"), 8 + 6 + 8, 1 + COUNTED, 1),
    "free": (AttackConfig(free=True), 9 + 8, 2 + COUNTED, 2),
    "free, at image": (AttackConfig(free=True, at="image"), 9 + 8, 1 + COUNTED, 1),
    "fourth pass": (AttackConfig(fourth_pass=True), 8 + 6 + 3 + 8, 2 + COUNTED, 2),
    "half": (AttackConfig(batch_share=0.5), 8 + 7, 1 + COUNTED / 2, 1),
    "half, free, at image": (AttackConfig(batch_share=0.5, free=True, at="image"), 9 + 4, 0.5 + COUNTED / 2, 0.5),
    "paper": (AttackConfig("paper"), 6 + 8, 2, 2),
    "symbolic": (AttackConfig("symbolic"), 8 + 6 + 8, 1, 2),
    "random": (AttackConfig("random"), 8 + 8, 1, 1),
    "reconstruction": (AttackConfig("reconstruction"), 8 + 8, 1, 1),
}


@pytest.mark.parametrize("name", PASSES)
def test_a_step_costs_the_passes_of_its_form(name: str, tokenizer: CountedTokenizer) -> None:
    attack, products, encoded, decoded = PASSES[name]
    model, objective = linear_net(), WithDAT(tokenizer, attack, labels())
    with Products() as done:
        objective.step(model, batch_of(), generator())["loss"].backward()
    assert done.multiplications / (IMAGES * WIDTH**2) == pytest.approx(products, abs=0.1)
    assert (tokenizer.encoded / IMAGES, tokenizer.decoded / IMAGES) == (encoded, decoded)


@pytest.mark.parametrize("attack", [one[0] for one in PASSES.values()], ids=list(PASSES))
def test_a_step_never_waits_for_the_device(
    attack: AttackConfig, tokenizer: CountedTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
            return func(*args, **(kwargs or {}))

    model, objective = SmallNet(), WithDAT(tokenizer, attack, labels())
    prepared = objective.prepare(model, batch_of(), generator())  # whose one_hot looks at its labels, on a CPU alone
    monkeypatch.setattr(objective, "prepare", lambda *_: prepared)
    with pytest.raises(AssertionError, match="the host reads"), NoReading():
        objective.step(model, batch_of(), generator())  # the pixels of the first batch are checked
    monkeypatch.setattr(mae_dat.attacks.discrete, "require_pixels", lambda image: None)  # as on a GPU from then on
    with NoReading():
        objective.step(model, batch_of(), generator())["loss"].backward()


def test_the_attack_sees_parameters_that_need_no_gradient(tokenizer: CountedTokenizer) -> None:
    """Compiled, the network would compute it; the clean view's graph and a frozen layer are left alone."""
    model, batch, asked = SmallNet(), batch_of(), []
    model.conv.bias.requires_grad_(False)
    model.head.register_forward_pre_hook(lambda *_: asked.append([one.requires_grad for one in model.parameters()]))
    WithDAT(tokenizer, AttackConfig(), labels()).step(model, batch, generator())["loss"].backward()
    learning = [True, False, True, True]
    assert asked == [learning, [False] * 4, learning]
    assert [weight.grad is not None for weight in model.parameters()] == learning
    with pytest.raises(ValueError, match="not today"), frozen_parameters(model):
        raise ValueError("not today")
    assert [weight.requires_grad for weight in model.parameters()] == learning


# ---- what is attacked ----


def test_at_the_image_the_step_goes_from_the_image(tokenizer: CountedTokenizer) -> None:
    image, model = batch_of()["image"], linear_net()
    loss_fn = lambda x: F.cross_entropy(model(x), batch_of()["label"])  # noqa: E731
    found = discrete_adversary(
        image, loss_fn, tokenizer, AttackConfig(eps=2.0, random_start=0.0, at="image"), generator()
    )
    gradient = input_gradient(image, loss_fn)
    length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    expected = tokenizer.encode((image + 2.0 * gradient / length).clamp(0, 1))
    assert torch.equal(found.adversarial_words, expected)
    assert torch.equal(found.words, tokenizer.encode(image))
    assert torch.equal(found.reconstruction, tokenizer.reconstruct(image))
    assert torch.equal(found.adversarial, tokenizer.decode(expected))
    assert 0 < found.changed_share < 1
    assert torch.equal(found.changed_share_in_first(4), (found.words != expected)[:4].float().mean())


# ---- free ----


def test_free_attacks_with_the_clean_passes_gradient(tokenizer: CountedTokenizer) -> None:
    """Dropout is drawn once: the attack sees the network that the clean view saw."""
    model, batch, attack = SmallNet(), batch_of(), AttackConfig(eps=3.0, free=True)
    torch.manual_seed(5)
    objective = WithDAT(tokenizer, attack, labels(smoothing=0.1))
    objective.step(model, batch, generator())
    torch.manual_seed(5)
    image, prepared = objective.prepare(model, batch, generator())
    gradient = input_gradient(image, lambda x: objective.loss(model, x, prepared))
    found = discrete_adversary(image, _never, tokenizer, attack, generator(), gradient)
    assert torch.equal(model.seen[1], found.adversarial)
    assert found.changed_share > 0


def _never(image: Tensor) -> Tensor:
    raise AssertionError("the attack has its gradient already")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["labels", "mae"])
def test_frees_gradient_is_that_of_both_losses(kind: str, precision: str, tokenizer: CountedTokenizer) -> None:
    torch.manual_seed(3)
    mae, batch = kind == "mae", batch_of()
    model = MaskedAutoencoder(SIDE, 4, 3, 16, 1, 2, 16, 1, 2) if mae else SmallNet()
    inner = MaskedReconstruction(0.5, True) if mae else labels()
    objective = WithDAT(tokenizer, AttackConfig(eps=3.0, free=True), inner)
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16")
    torch.manual_seed(5)
    with autocast():
        parts = objective.step(model, batch, generator())
    assert not gradients(model)
    (parts["loss"] / 4).backward()
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(5)
    source = generator()
    with autocast():
        image, prepared = objective.prepare(model, batch, source)
        gradient = input_gradient(image, lambda x: objective.loss(model, x, prepared))
        torch.manual_seed(5)
        clean = objective.loss(model, image, prepared)
        adversary = objective.adversary(model, image, prepared, source, gradient)
        loss = clean + objective.loss(model, adversary.adversarial, prepared)
    (loss / 4).backward()
    assert torch.equal(parts["loss"], loss)
    assert found.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, expected in gradients(model).items():
        # bfloat16's own sum of both passes is rounded, ours is not.
        close = {"rtol": 1e-5, "atol": 1e-7} if precision == "fp32" else {"rtol": 2e-2, "atol": 1e-4}
        torch.testing.assert_close(found[name], expected, **close)


def test_a_known_gradient_is_handed_on_times_its_factor_and_once() -> None:
    model, batch = SmallNet().eval(), batch_of()
    model.conv.requires_grad_(False)
    loss, gradient = loss_and_gradient(lambda x: F.cross_entropy(model(x), batch["label"]), batch["image"], model)
    assert gradient.shape == batch["image"].shape
    assert not batch["image"].requires_grad
    (3 * loss).backward()
    found = gradients(model)
    model.zero_grad()
    F.cross_entropy(model(batch["image"]), batch["label"]).backward()
    assert found.keys() == gradients(model).keys() == {"head.weight", "head.bias"}
    for name, expected in gradients(model).items():
        torch.testing.assert_close(found[name], 3 * expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


# ---- a share of the batch ----


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
def test_a_share_of_the_batch_is_attacked(share: float, tokenizer: CountedTokenizer) -> None:
    model, batch, attack = SmallNet().eval(), batch_of(), AttackConfig(eps=3.0, batch_share=share)
    count = max(1, round(share * IMAGES))
    objective = WithDAT(tokenizer, attack, labels())
    parts = objective.step(model, batch, generator())
    assert [len(seen) for seen in model.seen] == [IMAGES, count, count]
    _, target = objective.prepare(model, batch, generator())
    adversarial = F.cross_entropy(model(model.seen[2]), target[:count])
    torch.testing.assert_close(parts["loss_adversarial"], adversarial)
    torch.testing.assert_close(parts["loss"], F.cross_entropy(model(batch["image"]), target) + adversarial)
    if share == 1:
        whole = WithDAT(tokenizer, AttackConfig(eps=3.0), labels()).step(model, batch, generator())
        assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_share_takes_its_own_masks_and_targets(tokenizer: CountedTokenizer) -> None:
    torch.manual_seed(3)
    model, batch = MaskedAutoencoder(SIDE, 4, 3, 16, 1, 2, 16, 1, 2), batch_of()
    objective = WithDAT(tokenizer, AttackConfig("reconstruction", batch_share=0.25), MaskedReconstruction(0.5, True))
    parts = objective.step(model, batch, generator())
    _, (target, noise) = objective.prepare(model, batch, generator())
    image = tokenizer.reconstruct(batch["image"][:4])
    torch.testing.assert_close(parts["loss_adversarial"], objective.loss(model, image, (target[:4], noise[:4])))


def test_a_target_share_is_counted_in_more_images(tokenizer: CountedTokenizer) -> None:
    held, logged = (WithDAT(tokenizer, AttackConfig(share=share), labels()) for share in (0.1, None))
    batches = [torch.empty(count, 3, 32, 32) for count in (1, 4, 64, 256)]  # 64 words each
    assert [held.counted_images(one) for one in batches] == [1, 2, 8, 32]
    assert [logged.counted_images(one) for one in batches] == [1, 1, 4, 8]
    assert logged.counted_images(torch.empty(32, 3, 112, 112)) == 1
    objective = WithDAT(tokenizer, AttackConfig(eps=3.0, share=0.1), labels())
    objective.step(linear_net(), batch_of(), generator())  # finds the strength
    before = tokenizer.encoded
    objective.step(linear_net(), batch_of(), generator())
    assert tokenizer.encoded - before == 2 * IMAGES + 8


def test_the_first_rows_of_whatever_judges_an_image() -> None:
    boxes = [torch.rand(2, 4), torch.rand(0, 4), torch.rand(1, 4)]
    (some, seed), none = first_rows(((boxes, 17), None), 2)
    assert (seed, none) == (17, None)
    assert some[0] is boxes[0]
    assert len(some) == 2


# ---- together ----

MODES = {name: attack for name, (attack, *_) in PASSES.items() if attack.moves_pixels}


@pytest.mark.parametrize("name", MODES)
def test_every_form_holds_its_share_of_words_and_repeats_itself(name: str, tokenizer: CountedTokenizer) -> None:
    attack, results = dataclasses.replace(MODES[name], share=0.2), []
    for _ in range(2):
        model, objective = linear_net(), WithDAT(tokenizer, attack, labels())
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        shares = []
        for step in range(6):
            parts = objective.step(model, batch_of(seed=step), generator(step))
            parts["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            objective.observe({key: float(value.detach()) for key, value in parts.items()})
            shares.append(float(parts["changed_words"]))
            if step == 2:  # goes on from a checkpoint
                state = objective.state_dict()
                objective = WithDAT(tokenizer, attack, labels())
                objective.load_state_dict(state)
        assert sum(shares) / len(shares) == pytest.approx(0.2, abs=0.1)
        results.append((shares, objective.state_dict()))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dat paper --dat_at image", "--dat_at image works with --dat released only; leave it out with --dat paper"),
        ("--dat random --dat_free", "--dat_free works with --dat released only; leave it out with --dat random"),
        ("--dat --dat_rescore 10", "--dat_rescore works with --dat symbolic only; leave it out with --dat released"),
        ("--dat symbolic --dat_rescore -1", "--dat_rescore must be 0 or more, got -1"),
        ("--dat random --dat_fourth_pass", "--dat_fourth_pass works with --dat released only"),
        ("--dat symbolic --dat_free", "leave it out with --dat symbolic"),
        (
            "--dat --dat_free --dat_steps 3",
            "--dat_free has one gradient, and so one step: leave out --dat_steps 3",
        ),
        ("--dat --dat_batch_share 0", r"--dat_batch_share must be in \(0, 1\], got 0"),
        ("--dat --dat_batch_share 20", r"--dat_batch_share must be in \(0, 1\], got 20"),
        ("--dat --dat_free --fsdp", "--dat_free does not go with --fsdp"),
    ],
)
def test_what_does_not_go_together_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assert load_config(FinetuneConfig, flags.split()).dat.attack


def test_exact_losses_need_an_objective_that_has_them(tokenizer: CountedTokenizer) -> None:
    attack = AttackConfig("symbolic", share=0.2, rescore=4)
    with pytest.raises(ConfigError, match="--dat_rescore needs the loss of each image, which only classification has"):
        WithDAT(tokenizer, attack, MaskedReconstruction(0.5, True))
    objective, model = Classification(AugmentConfig(), CLASSES), SmallNet().eval()
    batch = batch_of()
    image, soft = objective.prepare(model, batch, generator())
    with torch.no_grad():
        assert torch.allclose(objective.loss_per_image(model, image, soft).mean(), objective.loss(model, image, soft))
    tokenizer.decoded = 0
    parts = WithDAT(tokenizer, attack, objective).step(model, batch, generator())
    assert 0 < float(parts["changed_words"]) <= 0.25
    # The gradient, the loss before, each candidate, and the adversary.
    assert tokenizer.decoded == (1 + 1 + 4 + 1) * IMAGES


@pytest.mark.parametrize("fourth_pass", [False, True])
def test_batchnorm_sees_three_batches_or_the_released_codes_four(
    fourth_pass: bool, tokenizer: CountedTokenizer
) -> None:
    """Clean image, start of the attack, (attacked image,) and its reconstruction: in this order."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    model = nn.Sequential(norm, nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda _, views, __: seen.append(views[0].detach().clone()))
    attack = AttackConfig(eps=3.0, random_start=0.0, fourth_pass=fourth_pass)
    images, labels = torch.rand(4, 3, 16, 16), torch.randint(0, 4, (4,))
    dat = WithDAT(tokenizer, attack)
    dat(model, images, labels).backward()
    center = tokenizer.decode(tokenizer.encode(images))
    assert len(seen) == norm.num_batches_tracked == 3 + fourth_pass
    assert torch.equal(seen[0], images)
    assert torch.equal(seen[1], center)
    assert dat.last_adversary is not None
    assert torch.equal(seen[-1], dat.last_adversary.adversarial)
    if fourth_pass:
        assert 0 < (seen[2] - center).norm() <= 4 * 3.0
        assert torch.equal(tokenizer.decode(tokenizer.encode(seen[2])), seen[3])


def test_the_flags_of_the_forms_reach_the_attack() -> None:
    flags = "--dat --dat_at image --dat_free --dat_batch_share 0.2 --dat_eps 0.3"
    attack = load_config(FinetuneConfig, flags.split()).dat.attack
    assert attack == AttackConfig(eps=0.3, at="image", free=True, batch_share=0.2)
    assert FinetuneConfig(dat=DatConfig("released"), launch=LaunchConfig(fsdp=True))


# ---- two processes ----


def one_of_two(rank: int, folder: Path) -> None:
    """Two micro-batches of a rank, and the gradient of both ranks."""
    with process_group(World(rank, 2, rank), torch.device("cpu")):
        model = SmallNet().eval()
        spread, (free, exact) = DistributedDataParallel(model), two_objectives()
        with no_gradient_sync(spread):
            free.step(spread, batch_of(seed=rank), generator(rank))["loss"].backward()
        exact.step(spread, batch_of(seed=rank), generator(rank))["loss"].backward()
        free.step(spread, batch_of(seed=rank + 2), generator(rank))["loss"].backward()
        torch.save(gradients(model), folder / f"rank{rank}.pt")


def two_objectives() -> tuple[WithDAT, WithDAT]:
    torch.manual_seed(0)
    tokenizer = LightTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)).freeze()
    attack = AttackConfig(eps=3.0, free=True, at="image", batch_share=0.5)
    return WithDAT(tokenizer, attack, labels()), WithDAT(tokenizer, AttackConfig(eps=3.0), labels())


@pytest.mark.slow
def test_two_ranks_have_the_mean_of_their_gradients(tmp_path: Path) -> None:
    assert exit_codes(start_ranks(2, one_of_two, tmp_path), 60) == [0, 0]
    model, (free, exact) = SmallNet().eval(), two_objectives()
    for rank in (0, 1):
        for objective, seed in ((free, rank), (exact, rank), (free, rank + 2)):
            (objective.step(model, batch_of(seed=seed), generator(rank))["loss"] / 2).backward()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for name, expected in gradients(model).items():
            torch.testing.assert_close(found[name], expected)
