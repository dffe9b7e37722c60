"""Attention weights against the network's own output, by their sums, and without a trace."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError
from mae_dat.models.attention import attention_layers, attention_maps, attention_weights
from mae_dat.models.classifier import Classifier, build_classifier
from mae_dat.models.mae import MaskedAutoencoder, pixel_statistics
from mae_dat.models.modes import evaluation_mode

SIZE, PATCH, HEADS, DEPTH = (16, 24), 4, 2, 3
GRID = (SIZE[0] // PATCH, SIZE[1] // PATCH)


def vit(**options: object) -> Classifier:
    """A small classifier with all kinds of tokens and norms."""
    net = VisionTransformer(SIZE, PATCH, num_classes=5, embed_dim=16, depth=DEPTH, num_heads=HEADS, **options)
    return Classifier(net, *pixel_statistics(3))


def network(kind: str) -> Classifier | MaskedAutoencoder:
    if kind == "autoencoder":
        return MaskedAutoencoder(SIZE, PATCH, 3, 16, DEPTH, HEADS, 16, 1, HEADS)
    if kind == "class token":
        return vit()
    if kind == "normalized queries":
        return vit(qk_norm=True, global_pool="avg")
    assert kind == "registers"
    return vit(reg_tokens=2, attn_drop_rate=0.5, drop_path_rate=0.5)


KINDS = ["autoencoder", "class token", "normalized queries", "registers"]


@pytest.fixture
def image() -> Tensor:
    return torch.rand(2, 3, *SIZE)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_times_values_is_what_the_block_computes(kind: str, fused: bool, image: Tensor) -> None:
    model = network(kind).double()
    for parameter in model.parameters():  # attention that is far from uniform
        nn.init.normal_(parameter)
    layers = attention_layers(model)
    assert len(layers) == DEPTH
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in layers:
        layer.fused_attn = fused
        layer.register_forward_hook(lambda module, given, result: seen.append((given[0], result)))
    weights = attention_weights(model, image.double(), range(DEPTH))
    for layer, attention, (given, result) in zip(layers, weights, seen, strict=True):
        assert attention.std() > 0.005, "a uniform attention would prove little"
        value = layer.qkv(given).unflatten(-1, (3, HEADS, -1))[:, :, 2].transpose(1, 2)
        expected = layer.proj((attention @ value).transpose(1, 2).flatten(2))
        torch.testing.assert_close(expected, result, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_looking_leaves_no_trace(kind: str, image: Tensor) -> None:
    model = network(kind).train()
    attention_layers(model)[1].eval()  # as a frozen part is
    flags = [module.training for module in model.modules()]
    state, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    first = attention_maps(model, image, DEPTH - 1)
    assert torch.equal(first, attention_maps(model, image, DEPTH - 1)), "no dropout"
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert not first.requires_grad
    with pytest.raises((RuntimeError, ValueError)):
        attention_maps(model, image.flatten(), 0)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_the_rows_of_what_is_pooled(kind: str, image: Tensor) -> None:
    model = network(kind)
    (weights,) = attention_weights(model, image, [1])
    prefix = {"registers": 3}.get(kind, 1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, GRID[0] * GRID[1] + prefix))
    by_class = attention_maps(model, image, 1, "class")
    by_mean = attention_maps(model, image, 1, "mean")
    assert by_class.shape == (2, HEADS, *GRID)
    assert torch.equal(by_class.flatten(2), weights[:, :, 0, prefix:])
    torch.testing.assert_close(by_mean.flatten(2), weights[:, :, prefix:, prefix:].mean(2))
    pooled = by_mean if kind == "normalized queries" else by_class
    assert torch.equal(attention_maps(model, image, 1), pooled)
    place = attention_maps(model, image, 1, "class")[0, 0, 2, 3]
    assert place == weights[0, 0, 0, prefix + 2 * GRID[1] + 3], "row by row, on a grid that is not square"


def test_rollout_multiplies_blocks_with_their_residuals(image: Tensor) -> None:
    model = network("class token")
    tokens = GRID[0] * GRID[1] + 1
    first, second = (weights.mean(1) for weights in attention_weights(model, image, [0, 1]))
    both = (second + torch.eye(tokens)) / 2 @ ((first + torch.eye(tokens)) / 2)
    rolled = attention_maps(model, image, 1, rollout=True)
    assert rolled.shape == (2, 1, *GRID)
    torch.testing.assert_close(rolled.flatten(1), both[:, 0, 1:])
    assert (rolled.sum((2, 3)) < 1).all()


def test_what_cannot_be_looked_at_is_refused(image: Tensor) -> None:
    with pytest.raises(ConfigError, match="ResNet has no self-attention"):
        attention_maps(build_classifier("resnet10t", 5), image, 0)
    with pytest.raises(ConfigError, match="blocks 1 to 3"):
        attention_weights(network("class token"), image, [DEPTH])
    headless = vit(class_token=False, global_pool="avg")
    assert attention_maps(headless, image, 0).shape == (2, HEADS, *GRID)
    with pytest.raises(ConfigError, match="--query mean"):
        attention_maps(headless, image, 0, "class")
    differential = Classifier(timm.create_model("swin_tiny_patch4_window7_224"), *pixel_statistics(3))
    with pytest.raises(ConfigError, match="plain vision transformer"):
        attention_layers(differential)


def test_evaluation_mode_ends_with_its_block() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
