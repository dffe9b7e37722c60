"""A model with ImageNet's outputs on a few class folders: `main_finetune.py --eval` and `mae-dat evaluate`."""

from pathlib import Path

import pytest
import torch
from noise_images import write_images
from tiny_runs import verb

from mae_dat.config.errors import CheckpointError, DataError
from mae_dat.models.classifier import build_classifier
from mae_dat.prediction.predict import predict
from mae_dat.robustness.evaluate import evaluate
from mae_dat.storage.weight_files import read_weights

finetune_main = verb("finetune")
IDS = ("n01440764", "n02102040", "n02979186")
MODEL = ["--model", "vit_demo_patch8", "--input_size", "64", "--num_workers", "0", "--device", "cpu"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A model that always predicts class 300, then 217 (n02102040), and stores no names."""
    model = build_classifier("vit_demo_patch8", 1000, (64, 64))
    state = {key: torch.zeros_like(value) for key, value in model.net.state_dict().items()}
    state["head.bias"][300], state["head.bias"][217] = 9, 8
    torch.save({"model": state}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def folders(root: Path, *classes: str) -> Path:
    return write_images(root, " ".join(f"val/{name}/{number}.png" for name in classes for number in range(2)))


def evaluate_folder(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command prints, on one line."""
    finetune_main(["--eval", *MODEL, *arguments])
    return " ".join(capsys.readouterr().err.split())


def test_wordnet_ids_get_imagenets_labels(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folders(tmp_path / "set", *IDS)
    given = ["--resume", str(weights), "--data_path", str(root), "--output_dir", str(tmp_path / "out")]
    text = evaluate_folder(given, capsys)
    assert "accuracy 0.00 % top-1, 33.33 % top-5" in text
    assert "(ImageNet's WordNet ids)" in text
    assert "all 1,000 classes of the model (no --restrict_classes)" in text
    text = evaluate_folder([*given, "--nb_classes", "1000", "--restrict_classes"], capsys)
    assert "accuracy 33.33 % top-1" in text
    assert "only classes that have images: 3 of 1,000" in text
    with pytest.raises(CheckpointError, match="has 1000 classes, but the setting has 3: leave out --nb_classes"):
        evaluate_folder([*given, "--nb_classes", "3"], capsys)
    other = ["--resume", str(weights), "--data_path", str(folders(tmp_path / "other", "cat", "dog", "tree"))]
    with pytest.raises(DataError, match=r"3 class folders .* stores no class names, so the output of each folder"):
        evaluate_folder(other, capsys)


def test_the_restriction_is_part_of_the_key_and_reaches_attacks(weights: Path, tmp_path: Path) -> None:
    root = folders(tmp_path / "set", *IDS)
    suites = ["clean", "words-random"]
    scores, readings = [], []
    for restricted in (False, True):
        network = _load(weights)
        evaluation = evaluate(
            network,
            suites,
            root,
            output_dir=tmp_path / "out",
            partial=True,
            restrict_classes=restricted,
            input_size=64,
            num_workers=0,
            progress=False,
            device="cpu",
        )
        (cells,) = evaluation.results["cells"].values()
        scores.append((cells["clean"][""]["correct"], cells["words-random"]["0"]["correct"]))
        (facts,) = evaluation.results["suites"].values()
        readings.append(facts["clean"]["protocol"]["reading"])
    assert scores == [(0, 0), (2, 2)]
    assert readings == [
        "ImageNet's WordNet ids",
        "ImageNet's WordNet ids, restricted to the 3 classes of the folder",
    ]


def _load(weights: Path) -> torch.nn.Module:
    model = build_classifier("vit_demo_patch8", 1000, (64, 64))
    model.net.load_state_dict(read_weights(weights).tensors)
    return model


def test_numbered_folders_of_a_foreign_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Output 10 is the folder 10, which is the third one when sorted as text."""
    model = build_classifier("vit_demo_patch8", 12, (64, 64))
    state = {key: torch.zeros_like(value) for key, value in model.net.state_dict().items()}
    state["head.bias"][10] = 9
    torch.save({"model": state}, tmp_path / "weights.pth")
    root = folders(tmp_path / "set", *map(str, range(12)))
    (root / "val" / "10" / "0.png").unlink()
    text = evaluate_folder(["--resume", str(tmp_path / "weights.pth"), "--data_path", str(root)], capsys)
    assert "accuracy 4.35 % top-1" in text
    assert "folder names as numbers of the outputs" in text


def test_the_table_of_predictions_names_imagenets_classes(weights: Path, tmp_path: Path) -> None:
    root = folders(tmp_path / "set", IDS[0])
    predictions = predict(
        str(weights), root / "val", model="vit_demo_patch8", num_workers=0, progress=False, device="cpu"
    )
    assert "tiger beetle" in str(predictions)
