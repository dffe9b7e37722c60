"""A masked autoencoder from the weights of other models: loaded, resampled, newly initialized or rejected."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_models import tiny, tiny_mae
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError
from mae_dat.models.classifier import build_classifier
from mae_dat.models.mae import IMAGENET_MEAN, IMAGENET_STD, MaskedAutoencoder
from mae_dat.models.weights.formats import ModelFile
from mae_dat.models.weights.initialize import InitReport, initialize_autoencoder
from mae_dat.models.weights.load import resize_position_embedding
from mae_dat.storage.weight_files import write_weights


def timm_vit(img_size: Any = 64, **options: Any) -> VisionTransformer:
    """A timm ViT with the shapes of `tiny_mae`, and random values in every tensor."""
    settings = {"patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 0, "global_pool": ""}
    net = VisionTransformer(img_size, **{**settings, **options})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def normalized(image: Tensor, mean: Any = IMAGENET_MEAN, std: Any = IMAGENET_STD) -> Tensor:
    return (image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def treatments(report: InitReport) -> dict[str, str]:
    return {row.part: row.treatment for row in report.rows}


def test_a_full_autoencoder_is_loaded_as_it_is() -> None:
    source, model = tiny_mae(), tiny_mae()
    report = initialize_autoencoder(model, source.state_dict())
    assert all(torch.equal(model.state_dict()[key], value) for key, value in source.state_dict().items())
    assert set(treatments(report).values()) == {"loaded"}
    assert sum(row.tensors for row in report.rows) == len(source.state_dict())
    assert report.summary() == ""


def test_an_encoder_leaves_the_decoder_as_initialized(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source, model = tiny_mae(), tiny_mae()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    encoder = {key: value for key, value in source.state_dict().items() if not key.startswith(("decoder", "mask_"))}
    report = initialize_autoencoder(model, encoder)
    for key, value in model.state_dict().items():
        assert torch.equal(value, encoder.get(key, before[key])), key
    assert report.rows[-1] == ("decoder", len(before) - len(encoder), "new", "the file has no decoder")
    assert report.summary() == "new: decoder"
    assert "MAE encoder" in caplog.text


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_timm_vit_computes_the_same_tokens_as_before(scale: float | None) -> None:
    net, model = timm_vit(init_values=scale), tiny_mae().eval()
    report = initialize_autoencoder(model, net.state_dict())
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model.features(image), net.forward_features(normalized(image)), rtol=1e-4, atol=1e-4)
    assert ("LayerScale" in treatments(report)) == (scale is not None)


def test_recorded_pixel_statistics_become_part_of_the_patch_embedding(tmp_path: Path) -> None:
    net, model, half = timm_vit(), tiny_mae().eval(), (0.5, 0.5, 0.5)
    path = tmp_path / "net.safetensors"
    write_weights(path, net.state_dict(), {"mae_dat": json.dumps({"mean": half, "std": half})})
    report = initialize_autoencoder(model, path)
    image = torch.rand(2, 3, 64, 64)
    expected = net.forward_features(normalized(image, half, half))
    torch.testing.assert_close(model.features(image), expected, rtol=1e-4, atol=1e-4)
    assert treatments(report)["patch_embed"] == "resampled"
    assert "normalization" in str(report)


def test_a_file_named_after_a_timm_model_was_normalized_as_that_model(tmp_path: Path) -> None:
    net, model = timm_vit(), tiny_mae().eval()
    torch.save(net.state_dict(), tmp_path / "vit_small_patch16_224.augreg_in1k.pth")
    initialize_autoencoder(model, tmp_path / "vit_small_patch16_224.augreg_in1k.pth")
    image = torch.rand(2, 3, 64, 64)
    expected = net.forward_features(normalized(image, (0.5,) * 3, (0.5,) * 3))
    torch.testing.assert_close(model.features(image), expected, rtol=1e-4, atol=1e-4)


def test_a_timm_model_by_its_name(tmp_path: Path) -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, embed_dim=48, depth=4, num_heads=4)
    folder = tmp_path / "net"
    folder.mkdir()
    settings = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
    write_weights(folder / "model.safetensors", net.state_dict(), {})
    half = (0.5, 0.5, 0.5)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 1000, "model_args": settings}
    config["pretrained_cfg"] = {"input_size": [3, 64, 64], "mean": half, "std": half, "classifier": "head"}
    (folder / "config.json").write_text(json.dumps(config))
    model = tiny_mae().eval()
    report = initialize_autoencoder(model, f"local-dir:{folder}")
    image = torch.rand(1, 3, 64, 64)
    expected = net.eval().forward_features(normalized(image, half, half))
    torch.testing.assert_close(model.features(image), expected, rtol=1e-4, atol=1e-4)
    assert treatments(report)["head"] == "not used"


def test_a_classifier_of_mean_tokens_has_no_last_norm() -> None:
    classifier, model = tiny(), tiny_mae()
    report = initialize_autoencoder(model, classifier.net.state_dict())
    assert torch.equal(model.blocks[3].mlp.fc2.weight, classifier.net.blocks[3].mlp.fc2.weight)
    assert torch.equal(model.norm.weight, torch.ones(48))
    assert treatments(report) | {"norm": "new", "fc_norm, head": "not used"} == treatments(report)


@pytest.mark.parametrize(("old", "new", "grids"), [(64, 96, (8, 12)), (64, (32, 128), (8, (4, 16)))])
def test_another_image_size_resizes_both_position_embeddings(old: int, new: Any, grids: Any) -> None:
    source, model = tiny_mae(old), tiny_mae(new)
    report = initialize_autoencoder(model, source.state_dict())
    for key in ("pos_embed", "decoder_pos_embed"):
        expected = resize_position_embedding(source.state_dict()[key], (8, 8), model.grid)
        torch.testing.assert_close(model.state_dict()[key], expected)
        assert treatments(report)[key] == "resampled"
    assert "8 x 8 to" in str(report)
    assert treatments(report)["decoder"] == "loaded"


def test_non_square_images_are_known_from_a_recorded_size(tmp_path: Path) -> None:
    source, path = tiny_mae((32, 80)), tmp_path / "wide.safetensors"
    model = tiny_mae(64)
    with pytest.raises(CheckpointError, match="not square .41 tokens"):
        initialize_autoencoder(model, source.state_dict())
    write_weights(path, source.state_dict(), {"mae_dat": json.dumps({"kind": "mae", "input_size": [32, 80]})})
    initialize_autoencoder(model, path)
    torch.testing.assert_close(model.pos_embed, resize_position_embedding(source.pos_embed, (4, 10), (8, 8)))


def test_another_patch_side_resamples_the_projection_and_renews_the_prediction() -> None:
    source = tiny_mae()
    model = MaskedAutoencoder(64, 16, 3, 48, 4, 4, 32, 1, 4)
    fresh = model.decoder_pred.weight.clone()
    report = initialize_autoencoder(model, source.state_dict())
    # A resampled patch embedding sees an enlarged image as the source sees the image (FlexiViT).
    image = torch.rand(1, 3, 8, 8)
    enlarged = nn.functional.interpolate(image, 16, mode="bicubic", antialias=True)
    weights = [(net.patch_embed.proj.weight, net.patch_embed.proj.bias) for net in (source, model)]
    small, large = (nn.functional.conv2d(x, *weight) for x, weight in zip((image, enlarged), weights, strict=True))
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-3)
    assert torch.equal(model.decoder_pred.weight, fresh)
    assert treatments(report)["decoder_pred"] == "new"
    assert torch.equal(model.decoder_blocks[0].mlp.fc1.weight, source.decoder_blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (3, 4), (3, 6), (2, 5)])
def test_images_that_repeat_their_channels_have_the_same_tokens(old: int, new: int) -> None:
    half = (0.5,) * old
    source, model = tiny_mae(in_chans=old, mean=half, std=half).eval(), tiny_mae(in_chans=new).eval()
    image = torch.rand(2, 1 if new == 1 else old, 64, 64)
    weights = ModelFile(dict(source.state_dict()), "autoencoder", "MAE with decoder", statistics=(half, half))
    report = initialize_autoencoder(model, weights)
    tokens = [
        net.features(image[:, torch.arange(count) % image.shape[1]]) for net, count in ((source, old), (model, new))
    ]
    torch.testing.assert_close(*tokens, rtol=1e-4, atol=1e-4)
    assert f"{old} to {new} channels" in str(report)
    assert treatments(report)["decoder_pred"] == "new"


def test_a_decoder_of_another_size_starts_from_scratch() -> None:
    model = tiny_mae(decoder_depth=2)
    fresh = model.decoder_blocks[0].mlp.fc1.weight.clone()
    report = initialize_autoencoder(model, tiny_mae().state_dict())
    assert torch.equal(model.decoder_blocks[0].mlp.fc1.weight, fresh)
    assert "2 blocks of width 32; the file's has 1 of width 32" in str(report)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: build_classifier("resnet18", 3).net, r"is not a vision transformer.*nearest to"),
        (lambda: timm.create_model("test_convnext"), "is nearest to"),
        (lambda: timm_vit(embed_dim=192, depth=12), "12 blocks of width 192.*those of --model mae_vit_tiny_patch16"),
        (lambda: timm_vit(embed_dim=32), "use the weights of mae_vit_tiny_patch16, "),
        (lambda: timm_vit(reg_tokens=4), "has register tokens .reg_token"),
        (lambda: timm_vit(class_token=False), r"cls_token(.|\n)*missing"),
        (lambda: timm_vit(pos_embed="none"), "no pos_embed"),
        (lambda: timm_vit(qkv_bias=False), r"blocks.0.attn.qkv.bias(.|\n)*missing"),
    ],
)  # fmt: skip
def test_other_architectures_are_rejected_with_the_reason(source: Any, message: str) -> None:
    model = tiny_mae()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        initialize_autoencoder(model, source().state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_damaged_decoder_is_an_error() -> None:
    state = tiny_mae().state_dict()
    del state["decoder_blocks.0.mlp.fc1.weight"]
    with pytest.raises(CheckpointError, match=r"decoder_blocks.0.mlp.fc1.weight(.|\n)*missing"):
        initialize_autoencoder(tiny_mae(), state)
