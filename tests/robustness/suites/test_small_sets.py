"""CIFAR-10-C, CIFAR-100-C, Tiny-ImageNet-C, LAION-C and ImageNet-3DCC: published layouts with known content.

The real sets were not available here.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_folders import write
from PIL import Image

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA
from mae_dat.robustness.evaluate import evaluate
from mae_dat.robustness.suites.catalogue import BENCHMARKS, LAION_DISTORTIONS, THREE_D
from mae_dat.robustness.suites.imagenet import LAION_C, SIXTEEN, SYNSETS
from mae_dat.robustness.suites.sets import open_benchmark

QUIET: dict[str, Any] = {"num_workers": 0, "precision": "fp32", "progress": False, "device": "cpu"}


def level_model(outputs: int) -> Any:
    """Predict the class that the red level of the first pixel stands for: (class + 0.5) / outputs."""

    def model(images: torch.Tensor) -> torch.Tensor:
        number = (images[:, 0, 0, 0] * outputs).long().clamp(0, outputs - 1)
        return 30.0 * torch.nn.functional.one_hot(number, outputs)

    return model


def levels(labels: np.ndarray, outputs: int, side: int) -> np.ndarray:
    """Images, uint8 (N, side, side, 3), that the model above predicts as these labels."""
    red = np.round((labels + 0.5) / outputs * 255).astype(np.uint8)
    return np.broadcast_to(red[:, None, None, None], (len(labels), side, side, 3)).copy()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10-C with 20 images of a severity: at severity s of fog, the first s images are wrong."""
    few = dataclasses.replace(BENCHMARKS["cifar-10-c"], images=20, per_class=2)
    monkeypatch.setitem(BENCHMARKS, "cifar-10-c", few)
    root = tmp_path / "CIFAR-10-C"
    root.mkdir()
    labels = np.tile(np.arange(10).repeat(2)[::-1], 5)
    np.save(root / "labels.npy", labels)
    for name in CORRUPTIONS + EXTRA:
        shown = labels.copy()
        if name == "fog":
            for severity in range(5):
                shown[20 * severity : 20 * severity + severity + 1] = (labels[: severity + 1] + 1) % 10
        np.save(root / f"{name}.npy", levels(shown, 10, 32))
    return root


def measure(root: Path, suite: str, outputs: int, **flags: Any) -> Any:
    return evaluate({"m": level_model(outputs)}, suite, root, input_size=32, **{**QUIET, **flags})


def test_cifar_arrays_are_read_severity_by_severity(cifar: Path) -> None:
    evaluation = measure(cifar.parent, "cifar-10-c", 10)
    cells = evaluation.results["cells"]["m"]["cifar-10-c"]
    assert len(cells) == 95
    assert [cells[f"fog/{severity}"]["correct"] for severity in range(1, 6)] == [19, 18, 17, 16, 15]
    assert all(cells[f"{name}/5"]["correct"] == 20 for name in CORRUPTIONS if name != "fog")
    # The mean over severities, then over the 15 corruptions. No mCE: no paper prints constants for it.
    assert evaluation.scores == {"cifar-10-c/mean": pytest.approx(15 / 15)}
    facts = evaluation.results["suites"]["m"]["cifar-10-c"]
    assert facts["protocol"]["preprocessing"] == "32 x 32 as stored"
    limited = measure(cifar.parent, "cifar-10-c", 10, limit=5).results["cells"]["m"]["cifar-10-c"]
    assert {count["total"] for count in limited.values()} == {5}


def test_the_set_is_found_by_all_where_the_outputs_fit(cifar: Path) -> None:
    results = measure(cifar.parent, "all", 10).results
    assert list(results["cells"]["m"]) == ["cifar-10-c"]
    assert results["not_measured"]["cifar-100-c"] == "the models have 10 outputs, not its 100"
    with pytest.raises(DataError, match="CIFAR-10-C has 10 classes, and the model 4 outputs"):
        measure(cifar.parent, "cifar-10-c", 4)


def test_wrong_arrays_are_errors_that_name_the_file(cifar: Path) -> None:
    def fails(match: str, error: type[Exception] = DataError) -> None:
        with pytest.raises(error, match=match):
            measure(cifar.parent, "cifar-10-c", 10)

    fog, labels = np.load(cifar / "fog.npy"), np.load(cifar / "labels.npy")
    for array, message in (
        (fog[:99], r"fog.npy is uint8 of shape \(99, 32, 32, 3\); CIFAR-10-C has uint8 of shape \(100, 32, 32, 3\)"),
        (fog / 255, "fog.npy is float64 of shape"),
        (fog.transpose(0, 3, 1, 2), r"of shape \(100, 3, 32, 32\)"),
    ):
        np.save(cifar / "fog.npy", array)
        fails(message)
    (cifar / "fog.npy").write_bytes(b"no array")
    fails("fog.npy cannot be read as an array")
    (cifar / "fog.npy").unlink()
    fails("fog missing, so their mean is over 14 corruptions. Complete it, or measure")
    partial = measure(cifar.parent, "cifar-10-c", 10, partial=True).results["suites"]["m"]["cifar-10-c"]
    assert partial["missing"] == ["fog missing, so their mean is over 14 corruptions"]
    np.save(cifar / "fog.npy", fog)
    for array, message in (
        (labels[:50], r"labels.npy is int64 of shape \(50,\); CIFAR-10-C has 100 whole numbers, 20 for each"),
        (labels + 1, "the labels are 1 to 10, 0 to 2 of a class"),
        (labels.astype(float), "labels.npy is float64"),
        (np.concatenate([labels[:80], labels[80:][::-1]]), "differ between severities"),
    ):
        np.save(cifar / "labels.npy", array)
        fails(message)
    (cifar / "labels.npy").unlink()
    fails("labels.npy is missing, so the classes of all images are unknown", MissingInputError)


def test_tiny_imagenet_has_folders_of_its_own_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three classes with two images in each cell; the second class is wrong under snow 5."""
    few = dataclasses.replace(BENCHMARKS["tiny-imagenet-c"], images=6, per_class=2, outputs=3)
    monkeypatch.setitem(BENCHMARKS, "tiny-imagenet-c", few)
    wnids, root = ["n01443537", "n02124075", "n04507155"], tmp_path / "Tiny-ImageNet-C"
    for corruption in CORRUPTIONS:
        for severity in range(1, 6):
            for label, wnid in enumerate(wnids):
                shown = 0 if (corruption, severity, label) == ("snow", 5, 1) else label
                for number in range(2):
                    path = root / corruption / str(severity) / wnid / f"test_{number}.JPEG"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(levels(np.array([shown]), 3, 64)[0]).save(path, "JPEG")
    cells = measure(tmp_path, "tiny-imagenet-c", 3).results["cells"]["m"]["tiny-imagenet-c"]
    assert len(cells) == 75
    assert {cell for cell, count in cells.items() if count["correct"] < 6} == {"snow/5"}
    assert cells["snow/5"]["correct"] == 4
    shutil.rmtree(root / "fog" / "3")
    with pytest.raises(DataError, match="Tiny-ImageNet-C is not complete: fog has no severity 3"):
        measure(tmp_path, "tiny-imagenet-c", 3)


def test_laion_c_averages_the_probability_of_a_superclass(tmp_path: Path) -> None:
    """Two images of each superclass at intensity 5 of mosaic, one of each elsewhere: the authors state no count."""
    names = list(LAION_C)
    assert len(names) == 16
    assert sum(map(len, LAION_C.values())) == 285
    assert sorted(LAION_C["dog"]) == sorted(SIXTEEN["dog"])  # two independent lists
    assert [SYNSETS[number] for number in LAION_C["ball"]][:2] == ["n02799071", "n02802426"]
    for distortion in LAION_DISTORTIONS:
        for level in range(1, 6):
            count = 2 if (distortion, level) == ("mosaic", 5) else 1
            folder = tmp_path / distortion / f"intensity_level_{level}"
            write([folder / name / f"{distortion}{k}.png" for name in names for k in range(count)], side=40)
    sets = open_benchmark("laion-c", tmp_path, (32, 32))
    assert len(sets) == 30
    assert {len(found) for found in sets} == {16, 32}
    assert str(sets[0].transform) == "the whole image resized to 32 x 32 (bicubic)"
    assert sets[0].classes == names
    logits = torch.full((1, 1000), -9.0)
    logits[0, list(LAION_C["cat"])] = 2.0  # a mean of six
    logits[0, LAION_C["dog"][0]] = 3.0  # the highest single one, among 109
    logits[0, 999] = 9.0  # of no superclass
    assert names[int(sets[0].class_mapping.predictions(logits)[0, 0])] == "cat"
    shutil.rmtree(tmp_path / "mosaic" / "intensity_level_2")
    with pytest.raises(DataError, match="LAION-C is not complete: mosaic has no severity 2"):
        open_benchmark("laion-c", tmp_path, (32, 32))
    (tmp_path / "mosaic" / "2").mkdir()
    with pytest.raises(DataError, match="not a severity of LAION-C; expected the folders intensity_level_1 to"):
        open_benchmark("laion-c", tmp_path, (32, 32))


def test_laion_c_is_counted_as_corruptions(tmp_path: Path) -> None:
    names = list(LAION_C)
    for distortion in LAION_DISTORTIONS:
        for level in range(1, 6):
            folder = tmp_path / "laion-c" / distortion / f"intensity_level_{level}"
            for name in names:
                shown = 0 if level == 5 else LAION_C[name][0]
                path = folder / name / "0.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (shown // 250, shown % 250, 0)).save(path)

    def model(images: torch.Tensor) -> torch.Tensor:
        number = (images[:, 0, 0, 0] * 255).round() * 250 + (images[:, 1, 0, 0] * 255).round()
        return 30.0 * torch.nn.functional.one_hot(number.long().clamp(0, 999), 1000)

    evaluation = evaluate({"m": model}, "laion-c", tmp_path, input_size=32, **QUIET)
    cells = evaluation.results["cells"]["m"]["laion-c"]
    assert {count["correct"] for cell, count in cells.items() if not cell.endswith("/5")} == {16}
    assert {count["correct"] for cell, count in cells.items() if cell.endswith("/5")} == {1}  # class 0 is a fish
    assert evaluation.scores == {"laion-c/mean": pytest.approx(100 * (15 / 16) / 5)}
    assert "texture" not in cells["mosaic/1"]


def test_3dcc_has_twelve_corruptions(tmp_path: Path) -> None:
    assert len(THREE_D) == 12
    few = dataclasses.replace(
        BENCHMARKS["imagenet-3dcc"], images=2, per_class=1, labels={"n01440764": 0, "n01443537": 1}
    )
    write([tmp_path / c / str(s) / w / "0.JPEG" for c in THREE_D for s in range(1, 6) for w in few.labels], side=224)
    assert len(open_benchmark(few, tmp_path, (224, 224))) == 60
    shutil.rmtree(tmp_path / "fog_3d")
    with pytest.raises(DataError, match="ImageNet-3DCC is not complete: fog_3d is missing"):
        open_benchmark(few, tmp_path, (224, 224))
