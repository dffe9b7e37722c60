"""The masked autoencoder against reference outputs, and the properties that its masking and patches must have."""

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from paths import GOLDEN
from torch import Tensor

from golden_rule import fill_by_rule
from mae_dat.config.errors import ConfigError
from mae_dat.models.classifier import build_classifier
from mae_dat.models.mae import (
    IMAGENET_MEAN,
    MAE_MODELS,
    MaskedAutoencoder,
    build_mae,
    check_image_size,
    mask_noise,
    masked_mse,
    sincos_position_embedding,
)

Golden = Callable[[str], dict[str, np.ndarray]]
TINY = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 4,
}


def tiny(**overrides: object) -> MaskedAutoencoder:
    return MaskedAutoencoder(**{**TINY, **overrides})


@pytest.fixture
def reference(golden: Golden) -> dict[str, Tensor]:
    arrays = {key: torch.from_numpy(value) for key, value in golden("mae_tiny").items()}
    arrays["image"] = arrays["images_u8"].permute(0, 3, 1, 2).float() / 255
    return arrays


@pytest.fixture
def ruled() -> MaskedAutoencoder:
    model = tiny()
    model.load_state_dict(fill_by_rule(model, skip=("pos_embed", "decoder_pos_embed")))
    return model


def test_the_keys_and_shapes_are_those_of_the_reference() -> None:
    expected = json.loads((GOLDEN / "mae_tiny_keys.json").read_text())
    assert {key: list(value.shape) for key, value in tiny().state_dict().items()} == expected


def test_forward_reproduces_the_reference(ruled: MaskedAutoencoder, reference: dict[str, Tensor]) -> None:
    image, noise = reference["image"], reference["noise"]
    latent, mask, ids_restore = ruled.encode(image, 0.75, noise)
    prediction, mask_again = ruled(image, 0.75, noise)
    assert torch.equal(mask, reference["mask"])
    assert torch.equal(mask_again, reference["mask"])
    assert torch.equal(ids_restore, reference["ids_restore"])
    torch.testing.assert_close(latent, reference["latent"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction, reference["pred"], rtol=1e-5, atol=1e-5)
    # The reference patchifies whatever it is given; its record is of the normalized image.
    torch.testing.assert_close(ruled.target(image, norm_pix=False), reference["patchify"], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("norm_pix, key", [(False, "loss_0"), (True, "loss_1")])
def test_loss_reproduces_the_reference(
    ruled: MaskedAutoencoder, reference: dict[str, Tensor], norm_pix: bool, key: str
) -> None:
    prediction, mask = ruled(reference["image"], 0.75, reference["noise"])
    loss = masked_mse(prediction, ruled.target(reference["image"], norm_pix), mask)
    assert loss.item() == pytest.approx(reference[key].item(), rel=1e-5)


def test_gradient_norm_reproduces_the_reference(ruled: MaskedAutoencoder, reference: dict[str, Tensor]) -> None:
    prediction, mask = ruled(reference["image"], 0.75, reference["noise"])
    masked_mse(prediction, ruled.target(reference["image"], norm_pix=True), mask).backward()
    gradients = [p.grad for p in ruled.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(0.20767981, rel=1e-5)
    assert all((p.grad is not None) == p.requires_grad for p in ruled.parameters())


def test_position_embeddings_reproduce_the_reference(reference: dict[str, Tensor]) -> None:
    model = tiny()
    torch.testing.assert_close(model.pos_embed.data, reference["pos_embed"], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.decoder_pos_embed.data, reference["decoder_pos_embed"], rtol=0, atol=1e-6)
    assert not model.pos_embed.requires_grad
    assert not model.decoder_pos_embed.requires_grad


def test_first_half_of_the_position_embedding_encodes_the_column() -> None:
    grid = sincos_position_embedding(16, (3, 5))[0, 1:].view(3, 5, 16)
    assert torch.equal(grid[0, :, :8], grid[2, :, :8])
    assert not torch.equal(grid[:, 0, :8], grid[:, 1, :8])
    assert torch.equal(grid[:, 0, 8:], grid[:, 4, 8:])
    assert not torch.equal(grid[0, :, 8:], grid[1, :, 8:])


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75, 0.9])
def test_masking_keeps_the_stated_number_in_every_image(ratio: float) -> None:
    model, noise = tiny(), torch.rand(3, 64)
    latent, mask, ids_restore = model.encode(torch.rand(3, 3, 64, 64), ratio, noise)
    keep = int(64 * (1 - ratio))
    assert latent.shape == (3, keep + 1, 48)
    assert (mask == 0).sum(dim=1).tolist() == [keep] * 3
    assert torch.equal(ids_restore.sort(dim=1).values, torch.arange(64).expand(3, -1))
    assert torch.equal(noise.sort(dim=1).values.gather(1, ids_restore), noise), "ids_restore must undo the shuffle"
    assert all(noise[i][mask[i] == 0].max() < noise[i][mask[i] == 1].min() for i in range(3) if ratio)


def test_ties_in_the_noise_keep_the_first_patches() -> None:
    _, mask, ids_restore = tiny().encode(torch.rand(1, 3, 64, 64), 0.75, torch.zeros(1, 64))
    assert torch.equal(ids_restore[0], torch.arange(64))
    assert mask[0].tolist() == [0.0] * 16 + [1.0] * 48


def test_kept_patch_embedding_equals_the_full_convolution() -> None:
    model = tiny(img_size=(32, 64), in_chans=4).double()
    image, kept = torch.rand(2, 4, 32, 64, dtype=torch.float64), torch.rand(2, 32).argsort(dim=1)[:, :9]
    full = model.patch_embed.proj(model.normalize(image)).flatten(2).transpose(1, 2)
    expected = torch.stack([row[index] for row, index in zip(full, kept, strict=True)])
    torch.testing.assert_close(model.embed_patches(image, kept), expected, rtol=1e-12, atol=1e-12)


def test_removed_patches_do_not_reach_the_prediction() -> None:
    model, image, noise = tiny(), torch.rand(2, 3, 64, 64), torch.rand(2, 64)
    prediction, mask = model(image, 0.75, noise)
    visible = model.unpatchify(1 - mask.unsqueeze(-1).expand(-1, -1, 192))
    assert torch.equal(model(image * visible, 0.75, noise)[0], prediction)
    assert not torch.equal(model(image * (1 - visible), 0.75, noise)[0], prediction)


def test_features_are_the_unmasked_encoding() -> None:
    model, image = tiny(), torch.rand(2, 3, 64, 64)
    ordered = torch.arange(64.0).expand(2, -1)
    torch.testing.assert_close(model.features(image), model.encode(image, 0.0, ordered)[0])
    assert model.features(image).shape == (2, 65, 48)


@pytest.mark.parametrize("size, channels", [(64, 3), ((32, 80), 1), ((80, 16), 4)])
def test_any_size_and_any_channels(size: int | tuple[int, int], channels: int) -> None:
    model = tiny(img_size=size, in_chans=channels)
    image = torch.rand(2, channels, *model.img_size)
    assert torch.equal(model.unpatchify(model.patchify(image)), image)
    torch.testing.assert_close(model.denormalize(model.normalize(image)), image)
    prediction, mask = model(image, 0.75, torch.rand(2, model.num_patches))
    assert prediction.shape == model.target(image, True).shape == (2, model.num_patches, 64 * channels)
    masked_mse(prediction, model.target(image, True), mask).backward()
    assert model.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN if channels == 3 else [0.5] * channels)


def test_patches_are_row_major_with_row_column_channel_pixels() -> None:
    model = tiny(img_size=(16, 24), in_chans=2)
    image = torch.rand(1, 2, 16, 24)
    patch = model.patchify(image)[0, 1 * 3 + 2]  # second row of patches, third column
    assert patch[(5 * 8 + 7) * 2 + 1] == image[0, 1, 8 + 5, 16 + 7]


def test_normalized_targets_and_their_way_back_to_pixels() -> None:
    model, image = tiny(), torch.rand(2, 3, 64, 64)
    target = model.target(image, norm_pix=True)
    torch.testing.assert_close(target.mean(dim=-1), torch.zeros(2, 64), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(dim=-1), torch.ones(2, 64), rtol=0, atol=1e-4)
    for norm_pix in (False, True):
        back = model.prediction_to_image(model.target(image, norm_pix), image, norm_pix)
        torch.testing.assert_close(back, image, rtol=0, atol=1e-5)


def test_loss_ignores_the_visible_patches() -> None:
    prediction, target = torch.rand(2, 4, 6), torch.rand(2, 4, 6)
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    loss = masked_mse(prediction, target, mask)
    noisy = prediction + torch.randn(2, 4, 6) * (1 - mask).unsqueeze(-1)
    assert torch.equal(masked_mse(noisy, target, mask), loss)
    assert loss.item() == pytest.approx((prediction - target)[mask == 1].square().mean().item(), rel=1e-6)


def test_initialization_is_the_reference_recipe() -> None:
    model = tiny(embed_dim=192, depth=1)
    bound = (6 / (192 + 768)) ** 0.5
    weight = model.blocks[0].mlp.fc1.weight
    assert bound * 0.95 < weight.abs().max() <= bound
    projection = model.patch_embed.proj
    assert projection.weight.abs().max() <= (6 / (192 + 3 * 64)) ** 0.5
    assert projection.weight.std().item() == pytest.approx((2 / (192 + 3 * 64)) ** 0.5, rel=0.02)
    assert projection.bias.abs().max() > 0
    assert model.decoder_pred.bias.abs().max() == 0
    assert 0.015 < model.cls_token.std() < 0.025
    assert 0.01 < model.mask_token.std() < 0.03
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("name", ["mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"])
def test_registered_sizes_have_the_published_dimensions(name: str) -> None:
    width, depth, patch = {"b": (768, 12, 16), "l": (1024, 24, 16), "h": (1280, 32, 14)}[name[8]]
    with torch.device("meta"):
        model = build_mae(name)
    encoder = sum(p.numel() for key, p in model.named_parameters() if "decoder" not in key and key != "mask_token")
    block = 12 * width**2 + 13 * width  # qkv, proj, fc1, fc2 with biases and two LayerNorms
    tokens = (224 // patch) ** 2 + 1
    assert encoder == depth * block + 2 * width + width + tokens * width + (3 * patch**2 + 1) * width
    assert (len(model.decoder_blocks), model.mask_token.shape[-1], model.decoder_blocks[0].attn.num_heads) == (
        8,
        512,
        16,
    )


@pytest.mark.parametrize(
    "name, encoder, whole, fine_tuned",
    [
        ("vit_base_patch16", 85_798_656, 111_907_840, 86_567_656),
        ("vit_large_patch16", 303_301_632, 329_541_888, 304_326_632),
        ("vit_huge_patch14", 630_764_800, 657_074_508, 632_045_800),
    ],
)
def test_the_published_numbers_of_parameters(name: str, encoder: int, whole: int, fine_tuned: int) -> None:
    with torch.device("meta"):
        model, classifier = build_mae(f"mae_{name}"), build_classifier(name, 1000)
    own = [p.numel() for key, p in model.named_parameters() if "decoder" not in key and key != "mask_token"]
    assert sum(own) == encoder  # timm's without its head
    assert sum(p.numel() for p in model.parameters()) == whole
    assert sum(p.numel() for p in classifier.parameters()) == fine_tuned


def test_build_mae_takes_overrides_and_suggests_names() -> None:
    model = build_mae("mae_vit_demo_patch8", img_size=(32, 64), in_chans=1, depth=1)
    assert (model.grid, len(model.blocks), model.in_chans, model.embed_dim) == ((4, 8), 1, 1, 128)
    with pytest.raises(ConfigError, match="mae_vit_base_patch16") as error:
        build_mae("mae_vit_base_patch61")
    assert "mae_vit_base_patch61" in str(error.value)
    assert all(name.startswith("mae_vit_") for name in MAE_MODELS)


@pytest.mark.parametrize(
    "size, patch, message",
    [(100, 16, "96 or 112"), ((64, 60), 8, "56 or 64"), (10, 16, "use 16"), ((8, 8, 8), 8, "side")],
)
def test_a_size_that_does_not_fit_the_patch_names_the_nearest(size: int, patch: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_image_size(size, patch)
    with pytest.raises(ConfigError):
        tiny(img_size=size, patch_size=patch)


def test_impossible_arguments_are_refused() -> None:
    model, image, noise = tiny(), torch.rand(2, 3, 64, 64), torch.rand(2, 64)
    for ratio in (1.0, 0.999, -0.1):
        with pytest.raises(ConfigError, match=f"mask ratio {ratio}"):
            model(image, ratio, noise)
    with pytest.raises(ValueError, match=r"\(2, 63\)"):
        model(image, 0.75, noise[:, :63])
    with pytest.raises(ValueError, match="takes"):
        model(image[:, :, :32], 0.75, noise)
    with pytest.raises(ConfigError, match="embed_dim 50"):
        tiny(embed_dim=50)


def test_the_same_noise_gives_the_same_result_and_the_generator_repeats_it() -> None:
    model, image = tiny(), torch.rand(2, 3, 64, 64)
    noise, again = (mask_noise(2, 64, torch.Generator().manual_seed(7), "cpu") for _ in range(2))
    assert torch.equal(noise, again)
    assert torch.equal(model(image, 0.75, noise)[0], model(image, 0.75, again)[0])
    assert not torch.equal(model(image, 0.75, noise)[1], model(image, 0.75, torch.rand(2, 64))[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other cost small tensors many times their work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_tiny_model_overfits_one_batch(reference: dict[str, Tensor]) -> None:
    model, image, noise = tiny(img_size=32), reference["image"][:2, :, :32, :32], torch.rand(2, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(100):
        prediction, mask = model(image, 0.75, noise)
        loss = masked_mse(prediction, model.target(image, norm_pix=False), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
