"""Networks that were trained on other pixels, and networks that give probabilities."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from evaluated_models import dataset  # noqa: F401
from torch import Tensor, nn

from mae_dat.attacks.normalization import NORMALIZATIONS, better_normalization
from mae_dat.models.classifier import Classifier
from mae_dat.robustness.evaluate import evaluate
from mae_dat.robustness.input_checks import ProbabilityModel, are_probabilities
from mae_dat.robustness.open_networks import open_network
from mae_dat.storage.weight_files import write_weights

QUIET: dict[str, Any] = {"progress": False, "num_workers": 0, "precision": "fp32", "device": "cpu"}
LEVELS = 8


class Brightness(nn.Module):
    """Classifies normalized images (mean 0.5, std 0.5) by their mean into `LEVELS` classes, exactly."""

    def forward(self, image: Tensor) -> Tensor:
        mean = image.mean((1, 2, 3))[:, None]
        centers = torch.linspace(-1, 1, LEVELS)
        return -(100 * (mean - centers).square())


def grays() -> tuple[Tensor, Tensor]:
    """A hundred uniform images in [0, 1], and their classes."""
    label = torch.arange(100) % LEVELS
    return (label / (LEVELS - 1)).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone(), label


@pytest.mark.parametrize("kind", ["classifier", "callable"])
def test_a_wrong_normalization_is_reported_with_the_better_one(kind: str) -> None:
    images, label = grays()

    def is_correct(logits: Tensor) -> Tensor:
        return logits.argmax(1) == label

    imagenet, half = NORMALIZATIONS[:2]
    model: nn.Module = Classifier(Brightness(), imagenet.mean, imagenet.std) if kind == "classifier" else Brightness()
    warning = better_normalization("net", model, images, is_correct)
    own = int(is_correct(model(images)).sum())
    assert own < 60
    assert warning is not None
    assert f"with {half.name} it classifies 100 of 100 images correctly, with its own {own} (p = " in warning
    assert ("--model" in warning) == (kind == "classifier")
    assert better_normalization("net", Classifier(Brightness(), half.mean, half.std), images, is_correct) is None


def test_chance_is_no_reason_to_warn() -> None:
    """A difference of two images of a hundred, and a network that predicts one class."""
    images, label = grays()
    half = NORMALIZATIONS[1]
    right = (Classifier(Brightness(), half.mean, half.std)(images).argmax(1) == label).clone()

    def two_fewer(logits: Tensor) -> Tensor:
        first = bool(torch.equal(logits.argmax(1), label))
        return right & (torch.arange(100) >= (0 if first else 2))

    assert better_normalization("net", Brightness(), images, two_fewer) is None
    constant = Classifier(
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, LEVELS)), (0.5,) * 3, (0.5,) * 3
    )
    nn.init.zeros_(constant.net[2].weight)  # type: ignore[index]
    assert better_normalization("net", constant, images, lambda logits: logits.argmax(1) == label) is None


def gray_folder(root: Path, side: int = 32) -> Path:
    """Images of 8 classes in val/CLASS, each a gray level of its own."""
    from PIL import Image

    for level in range(LEVELS):
        folder = root / "val" / f"level{level}"
        folder.mkdir(parents=True)
        for number in range(8):
            gray = np.full((side, side, 3), round(255 * level / (LEVELS - 1)), np.uint8)
            gray[0, 0] = number
            Image.fromarray(gray).save(folder / f"{number}.png")
    return root


def test_an_evaluation_warns_and_records_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root, imagenet = gray_folder(tmp_path / "data"), NORMALIZATIONS[0]
    wrong = Classifier(Brightness(), imagenet.mean, imagenet.std)
    with caplog.at_level(logging.WARNING):
        evaluation = evaluate({"net": wrong}, "clean", root, input_size=32, **QUIET)
    assert "net may need another normalization: with mean 0.5 and std 0.5 it classifies 64 of 64" in caplog.text
    assert "mean 0.5 and std 0.5" in evaluation.results["inputs"]["check"]
    half = NORMALIZATIONS[1]
    caplog.clear()
    right = evaluate({"net": Classifier(Brightness(), half.mean, half.std)}, "clean", root, input_size=32, **QUIET)
    assert right.scores["clean"] == 100
    assert "check" not in right.results["inputs"]
    assert "normalization" not in caplog.text


# ---- settings of timm ----


def test_a_file_of_timm_is_evaluated_with_timms_crop_and_interpolation(tmp_path: Path) -> None:
    from mae_dat.robustness.network import EvalOptions

    net = timm.create_model("test_resnet", num_classes=5)
    path = tmp_path / "weights.safetensors"
    write_weights(path, net.state_dict(), {})
    network = open_network(str(path), "test_resnet", "net", EvalOptions(torch.device("cpu")))
    settings: Any = timm.get_pretrained_cfg("test_resnet")
    assert network.facts["interpolation"] == settings.interpolation
    assert network.facts["crop"] == settings.crop_pct
    assert network.size == settings.input_size[-2:]
    assert not network.normalization_is_known


def test_a_file_named_after_another_model_of_timm_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from mae_dat.models.weights.open import open_model

    path = tmp_path / "tf_efficientnet_lite0.safetensors"
    write_weights(path, timm.create_model("efficientnet_lite0", num_classes=3).state_dict(), {})
    with caplog.at_level(logging.WARNING):
        open_model(path, "efficientnet_lite0")
    assert "named after timm's tf_efficientnet_lite0, which normalizes by mean 0.5, std 0.5" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        open_model(path, "tf_efficientnet_lite0")
    assert not caplog.records


# ---- probabilities ----


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([[0.2, 0.8], [1.0, 0.0]], True),
        ([[0.2, 0.7], [1.0, 0.0]], False),
        ([[-0.2, 1.2], [1.0, 0.0]], False),
        ([[1.0], [1.0]], False),
        ([[0.0, 0.0], [0.0, 0.0]], False),
    ],
)
def test_probabilities_are_recognized(outputs: list[list[float]], expected: bool) -> None:
    assert are_probabilities(torch.tensor(outputs)) == expected


def test_a_model_of_probabilities_gets_the_calibration_of_its_logits(dataset: Path) -> None:  # noqa: F811
    torch.manual_seed(0)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10))
    nn.init.normal_(net[2].weight)
    models = {"logits": net, "probabilities": nn.Sequential(net, nn.Softmax(1))}
    results = evaluate(models, "clean", dataset, input_size=32, **QUIET).results
    scores = [results["calibration"][name]["clean"] for name in models]
    assert scores[0].keys() == scores[1].keys()
    for key, value in scores[0].items():
        assert scores[1][key] == pytest.approx(value, abs=1e-5), key
    assert results["cells"]["logits"] == results["cells"]["probabilities"]
    assert results["models"]["probabilities"].get("outputs") == "probabilities"
    assert "outputs" not in results["models"]["logits"]


def test_probabilities_of_zero_are_finite_logits() -> None:
    model = ProbabilityModel(lambda image: torch.tensor([[1.0, 0.0]]).expand(len(image), -1))
    logits = model(torch.zeros(2, 3, 4, 4))
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.softmax(1), torch.tensor([[1.0, 0.0]] * 2))
