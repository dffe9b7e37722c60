"""`mae_dat.extract_features`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from noise_images import noise, write_images
from PIL import Image

from mae_dat.analysis.extract_features import extract_features
from mae_dat.config.errors import CheckpointError, ConfigError, DataError
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import build_mae
from mae_dat.models.weights.named_models import load_model

QUIET: dict[str, Any] = {"progress": False, "device": "cpu", "num_workers": 0, "precision": "fp32"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_images(tmp_path, "b/1.png a/0.png 2.png")


def by_hand(model: Classifier, paths: list[Path], size: tuple[int, int] = (64, 64)) -> np.ndarray:
    image = torch.stack([EvalTransform(size)(Image.open(path)) for path in paths])
    with torch.no_grad():
        return model.features(image.float() / 255 if image.dtype == torch.uint8 else image).numpy()


def test_features_of_a_folder_are_those_of_its_images(photos: Path) -> None:
    model = load_model("mae_dat_demo")
    assert isinstance(model, Classifier)
    paths = [photos / "2.png", photos / "a" / "0.png", photos / "b" / "1.png"]
    for source in ("mae_dat_demo", model.train()):
        features = extract_features(source, photos, batch_size=2, **QUIET)
        assert sorted(features.paths) == sorted(map(str, paths))
        expected = by_hand(model.eval(), [Path(path) for path in features.paths])
        np.testing.assert_allclose(features.values, expected, rtol=1e-4, atol=1e-5)
        model.train()
    assert model.training
    assert features.values.dtype == np.float32
    assert np.array_equal(np.asarray(features), features.values)
    assert (len(features), features.labels.tolist()) == (3, [-1] * 3)
    assert repr(features) == "Features of 3 images: float32 (3, 128)"
    other = extract_features("mae_dat_demo", [paths[0], noise(50, 60)], input_size=32, **QUIET)
    assert other.paths == [str(paths[0]), "image 0"]
    smaller = load_model("mae_dat_demo", input_size=32)
    assert isinstance(smaller, Classifier)
    np.testing.assert_allclose(other.values[:1], by_hand(smaller, paths[:1], (32, 32)), rtol=1e-4, atol=1e-5)


def test_patches_and_autoencoders_have_features_too() -> None:
    image = torch.rand(2, 3, 64, 64)
    assert extract_features("mae_dat_demo", image, "tokens", **QUIET).values.shape == (2, 64, 128)
    autoencoder = build_mae("mae_vit_demo_patch8", img_size=32).eval()
    features = extract_features(autoencoder, image[:, :, :32, :32], "cls", **QUIET)
    stored = (image[:, :, :32, :32] * 255).round() / 255
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features.values), autoencoder.features(stored)[:, 0])


def test_timm_modules_need_no_head() -> None:
    features = extract_features(timm.create_model("test_vit", num_classes=0), torch.rand(1, 3, 160, 160), **QUIET)
    assert features.values.shape == (1, 64)


def test_what_has_no_features_raises_an_error(photos: Path) -> None:
    with pytest.raises(ConfigError, match="Flatten has no features"):
        extract_features(torch.nn.Flatten(), photos)
    with pytest.raises(CheckpointError, match=r"mae_dat\.load_tokenizer"):
        extract_features("vqgan_demo", photos)
    with pytest.raises(ConfigError, match="pool must be one of cls, mean, tokens"):
        extract_features("mae_dat_demo", photos, "max")
    with pytest.raises(ConfigError, match="did you mean batch_size"):
        extract_features("mae_dat_demo", photos, batchsize=3)
    (photos / "c.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"c\.png"):
        extract_features("mae_dat_demo", photos, **QUIET)
