"""A user's own shifts: functions, folders with groups, CSV files and stored corruptions."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated_models import Linear
from noise_images import noise
from PIL import Image
from tiny_runs import draw_folder, verb

from mae_dat.config.commands.corrupt import CorruptConfig
from mae_dat.config.errors import ConfigError, DataError, MissingInputError
from mae_dat.robustness.corrupt_folder import corrupt_folder
from mae_dat.robustness.evaluate import evaluate
from mae_dat.robustness.report.shift_table import paired_change
from mae_dat.robustness.scores.worst import worst_share
from mae_dat.robustness.suites.functions import image_function
from mae_dat.robustness.summary import Evaluation
from mae_dat.runtime.console import Console

QUIET = Console(quiet=True)
SIDE = 32


class Brightness(torch.nn.Module):
    """Two classes: the class of an image is 1 where it is bright; so predictions are known."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        level = image.mean((1, 2, 3))
        return torch.stack([0.5 - level, level - 0.5], 1) * 20


def gray(path: Path, level: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), (round(255 * level),) * 3).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Dark and light images, all predicted correctly, and the same at night and by day."""
    for name, level in (("dark", 0.2), ("light", 0.8)):
        for number in range(4):
            gray(tmp_path / "data" / "val" / name / f"{number}.png", level)
            gray(tmp_path / "shift" / "day" / name / f"{number}.jpg", level)
            # Light images 0 to 2 are dark at night; image 9 has no clean one.
            gray(tmp_path / "shift" / "night" / name / f"{number}.png", 0.1 if number < 3 else level)
        gray(tmp_path / "shift" / "night" / name / "9.png", level)
    return tmp_path


def measure(root: Path, **flags: Any) -> Any:
    flags = {"num_workers": 0, "precision": "fp32", "progress": False, "device": "cpu", **flags}
    return evaluate({"m": Brightness()}, data_path=root / "data", input_size=SIDE, **flags).results


def test_groups_have_accuracies_a_worst_group_and_paired_changes(root: Path) -> None:
    results = measure(root, shifts=[str(root / "shift")])
    cells = results["cells"]["m"]
    assert list(cells) == ["clean", "shift"]
    assert cells["shift"] == {
        "group:day": {"correct": 8, "total": 8},
        "group:night": {"correct": 7, "total": 10},
    }
    assert results["paired"]["m"]["shift"] == {
        "group:day": {"both": 8, "only_clean": 0, "only_shifted": 0, "neither": 0},
        "group:night": {"both": 5, "only_clean": 3, "only_shifted": 0, "neither": 0},
    }
    evaluation = Evaluation(results)
    assert evaluation.scores["shift"] == pytest.approx(100 * 15 / 18)
    assert evaluation.scores["shift/worst"] == evaluation.scores["shift/night"] == 70
    (line,) = [line for line in str(evaluation).splitlines() if "worst: night" in line]
    assert "70.0 [" in line
    assert "-37.5 [" in line.replace("−", "-")
    assert line.endswith("8")


def test_the_paired_change_is_mcnemars(root: Path) -> None:
    change = paired_change({"both": 50, "only_clean": 12, "only_shifted": 3, "neither": 35})
    assert change.gap == -9
    assert change.p_value == pytest.approx(0.03515625)  # the exact test of 3 of 15
    assert change.ends[0] < -9 < change.ends[1] < 0


def test_the_interval_of_the_worst_allows_for_the_choice() -> None:
    worst = worst_share({"a": {"correct": 8, "total": 10}, "b": {"correct": 6, "total": 10}})
    assert worst is not None
    assert (worst.name, worst.share) == ("b", 0.6)
    # Clopper & Pearson of 6 of 10 at the level 97.5 %
    assert (worst.low, worst.high) == (pytest.approx(0.2288, abs=1e-3), pytest.approx(0.8997, abs=1e-3))
    assert worst_share({}) is None


def test_a_csv_file_gives_the_same_counts(root: Path) -> None:
    rows = [
        {"file": str(path.relative_to(root)), "class": path.parent.name, "group": path.parts[-3], "note": "x"}
        for path in sorted((root / "shift").rglob("*.*g"))
    ]
    file = root / "shift.csv"

    def write(rows: list[dict[str, str]], columns: list[str]) -> None:
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    write(rows, ["note", "group", "class", "file"])
    by_folder, by_file = measure(root, shifts=[str(root / "shift")]), measure(root, suites={"shift": file})
    assert by_folder["cells"] == by_file["cells"]
    assert by_folder["paired"] == by_file["paired"]
    write(rows, ["class", "file"])
    results = measure(root, shifts=[f"whole={file}"])
    assert results["cells"]["m"]["whole"] == {"": {"correct": 15, "total": 18}}
    for change, columns, message in (
        ({}, ["file", "group"], r"shift.csv has no column 'class', only file, group"),
        ({"file": "nowhere.png"}, ["file", "class"], r"shift.csv, line 2: there is no file .*nowhere.png"),
        ({"class": ""}, ["file", "class"], "line 2, lacks a value"),
        ({"group": ""}, ["file", "class", "group"], "line 2, lacks a value"),
        ({"class": "litght"}, ["file", "class"], r"litght is not among the 2 classes .* did you mean light"),
        ({"file": rows[1]["file"]}, ["file", "class"], "twice"),
    ):
        write([{**rows[0], **change}, *rows[1:]], columns)
        with pytest.raises(DataError, match=message):
            measure(root, suites={"shift": file})


def test_stored_corruptions_give_the_counts_of_generated_ones(tmp_path: Path) -> None:
    """Images of the model's size: the pipelines agree. Shards hold the same files."""
    data = draw_folder(tmp_path / "data", train=0, val=10, conflict=0)
    given = {"input_size": 32, "seed": 5, "num_workers": 0, "precision": "fp32", "progress": False, "device": "cpu"}
    files, shards = tmp_path / "files", tmp_path / "shards"
    corrupt_folder(CorruptConfig(str(data / "val"), str(files), num_workers=0, seed=5), QUIET)
    some: dict[str, Any] = {"corruptions": ("fog", "pixelate"), "shards": True, "seed": 5, "num_workers": 0}
    corrupt_folder(CorruptConfig(str(data / "val"), str(shards), **some), QUIET)
    results = evaluate({"m": Linear()}, "generated", data, suites={"files": files, "shards": shards}, **given).results
    cells = results["cells"]["m"]
    assert cells["files"] == cells["generated"]
    assert len(cells["files"]) == 75
    assert cells["shards"] == {cell: cells["generated"][cell] for cell in cells["shards"]}
    assert len(cells["shards"]) == 10
    assert not results["suites"]["m"]["files"]["official"]


def test_a_function_changes_the_clean_images(root: Path) -> None:
    def darker(image: torch.Tensor) -> torch.Tensor:
        return image * 0.3

    def inverted(image: np.ndarray) -> np.ndarray:
        return 255 - image

    def half(image: Image.Image) -> Image.Image:
        return image.point(lambda level: level // 2)

    functions = {"darker": darker, "inverted": inverted, "half": half, "untyped": lambda image: 1 - image}
    results = measure(root, suites={**functions, "pair": (lambda image: 255 - image, "array")})
    cells = {name: counts[""]["correct"] for name, counts in results["cells"]["m"].items()}
    assert cells == {"clean": 8, "darker": 4, "inverted": 0, "half": 4, "untyped": 0, "pair": 0}
    assert results["paired"]["m"]["darker"][""] == {"both": 4, "only_clean": 4, "only_shifted": 0, "neither": 0}
    protocol = results["suites"]["m"]["inverted"]["protocol"]
    assert protocol["takes"] == "a uint8 array (H, W, 3)"
    assert "inverted, source " in protocol["function"]


def test_random_functions_are_reproducible_and_leave_the_generators_alone(root: Path) -> None:
    def noisy(image: np.ndarray) -> np.ndarray:
        change = np.random.randint(-120, 120) + 40 * torch.rand(()).item()
        return np.clip(image + change, 0, 255).astype(np.uint8)

    np.random.seed(3)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    first = measure(root, suites={"noisy": noisy}, batch_size=3)
    second = measure(root, suites={"noisy": noisy}, batch_size=8, num_workers=2)
    assert first["images"]["m"]["noisy"] == second["images"]["m"]["noisy"]
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[index]
    function = image_function("noisy", noisy)
    pixels = np.array(noise(SIDE, SIDE))
    assert np.array_equal(function(pixels, 0, 1), function(pixels, 0, 1))
    assert not np.array_equal(function(pixels, 0, 1), function(pixels, 0, 2))
    assert not np.array_equal(function(pixels, 0, 1), function(pixels, 1, 1))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda image: image * 2, r"returned values in \[.*\], not in \[0, 1\]: end it with .clamp"),
        (lambda image: image / 0, r"returned torch.float32 of shape .*, not finite floats"),
        (lambda image: image[:, 1:], "changed the size of an image"),
        (lambda image: image.rotate(3), r"failed on a float tensor .*: AttributeError: .*Say what it takes"),
        (lambda image: image.numpy(), r"returned float32 of shape \(3, 32, 32\), not a float tensor"),
        (((lambda image: image / 255), "array"), r"returned float64 of shape .*, not a uint8 array"),
        (((lambda image: None), "pil"), "returned a NoneType, not an RGB PIL image"),
    ],
)
def test_a_wrong_function_is_an_error_that_names_it(root: Path, function: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"the function rain {message}"):
        measure(root, suites={"rain": function})


def test_wrong_shifts_are_errors_before_any_work(root: Path) -> None:
    for suites, message in (
        ({"generated": lambda image: image}, "name 'generated' of a shift is the name of another suite"),
        ({"rain": 3}, "the suite 'rain' is a int, not a function"),
        ({"rain": (lambda image: image, "tensors")}, "takes 'tensors': choose tensor, array or pil"),
    ):
        with pytest.raises(ConfigError, match=message):
            measure(root, suites=suites)
    with pytest.raises(ConfigError, match="'shift' of a shift is given twice"):
        measure(root, shifts=[str(root / "shift"), f"shift={root / 'data'}"])
    with pytest.raises(MissingInputError, match="no folder or CSV file .*nowhere"):
        measure(root, shifts=["nowhere"])
    with pytest.raises(ConfigError, match=r"--suite shiftt: did you mean shift\?"):
        measure(root, suite="shiftt", suites={"shift": root / "shift"})
    gray(root / "shift" / "night" / "lihgt" / "1.png", 0.9)
    with pytest.raises(DataError, match="lihgt is not among the 2 classes .* did you mean light"):
        measure(root, shifts=[str(root / "shift")])
    gray(root / "mixed" / "fog" / "1" / "dark" / "1.png", 0.9)
    gray(root / "mixed" / "night" / "dark" / "1.png", 0.9)
    with pytest.raises(DataError, match="mixes groups with corruptions"):
        measure(root, suites={"mixed": root / "mixed"})
    (root / "empty" / "night" / "dark").mkdir(parents=True)
    with pytest.raises(DataError, match="night has no images in class folders"):
        measure(root, suites={"empty": root / "empty"})


def test_the_command_measures_a_folder_beside_the_clean_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = draw_folder(tmp_path / "data", train=0, conflict=0)
    (data / "val").rename(tmp_path / "val")
    flags = [
        "--checkpoint",
        "mae_dat_demo",
        "--num_workers",
        "0",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    # Class folders without groups, and no clean images at all.
    assert verb("evaluate")([*flags, "--shifts", f"mine={tmp_path / 'val'}"]) == 0
    assert "\nmine* (%) ↑" in capsys.readouterr().out
    report = (tmp_path / "o" / "report.md").read_text()
    assert "mine" in report
