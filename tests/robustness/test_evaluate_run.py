"""A model with ImageNet's outputs on a few class folders: `main_finetune.py --eval` and `mae-dat evaluate`."""

from pathlib import Path

import pytest
import timm
import torch
from noise_images import noise, write_images
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from tiny_runs import verb

from mae_dat.config.errors import CheckpointError, DataError, MissingInputError
from mae_dat.models.classifier import build_classifier
from mae_dat.models.weights.open import open_model
from mae_dat.prediction.predict import predict
from mae_dat.robustness.evaluate import evaluate
from mae_dat.robustness.evaluate_run import eval_preprocessing
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.scores.results import read_results
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
    assert "val acc1 0.00 %, acc5 33.33 %" in text
    assert "(ImageNet's WordNet ids)" in text
    assert "all 1,000 classes of the model (no --restrict_classes)" in text
    text = evaluate_folder([*given, "--nb_classes", "1000", "--restrict_classes"], capsys)
    assert "val acc1 33.33 %" in text
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
    assert "val acc1 4.35 %" in text
    assert "folder names as numbers of the outputs" in text


def test_the_table_of_predictions_names_imagenets_classes(weights: Path, tmp_path: Path) -> None:
    root = folders(tmp_path / "set", IDS[0])
    predictions = predict(
        str(weights), root / "val", model="vit_demo_patch8", num_workers=0, progress=False, device="cpu"
    )
    assert "tiger beetle" in str(predictions)


# ---- folders without splits, and preprocessing ----


def test_a_folder_without_splits_is_evaluated_itself(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As ImageNet-A (WordNet ids) and ImageNet-V2 (numbers, not sorted as text) are unpacked."""
    names = ("n01440764", "n02102040", "300", "1", "217", "10")
    write_images(tmp_path / "a", " ".join(f"{name}/{number}.png" for name in names[:2] for number in range(2)))
    write_images(tmp_path / "v2", " ".join(f"{name}/{number}.png" for name in names[2:] for number in range(2)))
    (tmp_path / "a" / "README.txt").write_text("The readme of ImageNet-A.")
    for folder, accuracy in (("a", "acc1 0.00 %, acc5 50.00 %"), ("v2", "acc1 25.00 %")):
        text = evaluate_folder(["--resume", str(weights), "--data_path", str(tmp_path / folder)], capsys)
        assert accuracy in text
        assert f"on {tmp_path / folder}" in text
    evaluation = evaluate(
        _load(weights), "clean", tmp_path / "v2", partial=True, input_size=64, num_workers=0, progress=False
    )
    assert next(iter(evaluation.scores.values())) == 25


def test_a_folder_of_folders_is_not_taken_for_classes(weights: Path, tmp_path: Path) -> None:
    root = write_images(tmp_path / "c", "fog/1/n01440764/0.png fog/2/n01440764/0.png")
    with pytest.raises(MissingInputError, match="has no folder val"):
        finetune_main(["--eval", *MODEL, "--resume", str(weights), "--data_path", str(root)])


def test_timms_file_is_evaluated_as_timm_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = timm.create_model("test_efficientnet", num_classes=3, pretrained_cfg_overlay={"crop_pct": 0.5})
    save_for_hf(net, tmp_path / "hub", safe_serialization=True)
    opened = open_model(tmp_path / "hub")
    settings = resolve_model_data_config(net)
    preprocessing = eval_preprocessing(opened, EvalOptions(torch.device("cpu")))
    image = noise(300, 200)
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close((preprocessing(image) - mean) / std, create_transform(**settings)(image))
    root = folders(tmp_path / "set", "a", "b", "c")
    given = ["--eval", "--resume", str(tmp_path / "hub"), "--data_path", str(root), "--num_workers", "0"]
    for protocol, expected in (("native", "320 x 320 (bicubic)"), ("imagenet-c", "182 x 182 (bilinear)")):
        finetune_main([*given, "--device", "cpu", "--protocol", protocol])
        text = " ".join(capsys.readouterr().err.split())
        assert f"resized to cover {expected}, center crop 160 x 160" in text


def test_the_protocol_of_released_figures_crops_images_of_the_models_size(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folders(tmp_path / "set", *IDS)
    given = ["--resume", str(weights), "--data_path", str(root), "--output_dir", str(tmp_path / "out")]
    text = evaluate_folder([*given, "--protocol", "dat"], capsys)
    assert "protocol dat: resized to cover 73 x 73 (bicubic), center crop 64 x 64" in text
    evaluate_folder([*given, "--protocol", "dat", "--suite", "imagenet", "--restrict_classes"], capsys)
    (facts,) = read_results(tmp_path / "out" / "results.json")["models"].values()
    assert facts.get("protocol") == "dat"
