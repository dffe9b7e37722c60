"""Models with constructed predictions on the folders of ImageNet, -V2, -A, -R, -Sketch and -C, and on numbered
folders."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_folders import SIDE, reduced, validation_names
from evaluated_models import Linear, draw, imagenet, write_onnx  # noqa: F401
from noise_images import write_images
from torch import Tensor

from mae_dat.cli import run
from mae_dat.config.errors import ConfigError, DataError
from mae_dat.robustness.evaluate import evaluate
from mae_dat.robustness.scores.results import Results, read_results
from mae_dat.robustness.suites.base import SuiteSettings
from mae_dat.robustness.suites.catalogue import BENCHMARKS
from mae_dat.robustness.suites.choose import choose_suites
from mae_dat.robustness.suites.imagenet import IMAGENET_A, IMAGENET_R, SYNSETS, synsets_of
from mae_dat.robustness.suites.sources import SuiteSources

STORED = ("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-c")


@pytest.fixture
def benchmarks(imagenet: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The six benchmarks with a few classes: 0, 1, 2 of ImageNet, -Sketch and -C; 0, 2, 10 of -V2; the first four of -A
    (6, 11, 13, 15) and of -R (1, 2, 4, 6)."""
    few_of_r = synsets_of(IMAGENET_R)[:4]
    changes: dict[str, Any] = {"images": 4, "labels": dict(zip(few_of_r, IMAGENET_R, strict=False)), "per_class": None}
    monkeypatch.setitem(BENCHMARKS, "imagenet-r", reduced("imagenet-r", **changes))
    monkeypatch.setitem(BENCHMARKS, "imagenet-sketch", reduced("imagenet-sketch"))
    draw([imagenet / "imagenet-r" / wnid / "0.jpg" for wnid in few_of_r])
    draw([imagenet / "sketch" / name for name in validation_names()])
    return imagenet


def constant(outputs: int, *order: int) -> Callable[[Tensor], Tensor]:
    """A model that gives the outputs in `order`, the first with the highest logit, for every image."""
    logits = torch.zeros(outputs)
    logits[list(order)] = torch.arange(len(order), 0, -1).float()
    return lambda image: logits.expand(len(image), -1)


def correct(results: Results) -> dict[str, set[tuple[int, int]]]:
    """Return correct and total of all cells of each suite."""
    (suites,) = results["cells"].values()
    return {name: {(cell["correct"], cell["total"]) for cell in cells.values()} for name, cells in suites.items()}


def measure(model: Any, root: Path, suites: Sequence[str], **flags: Any) -> Results:
    given = {"input_size": SIDE, "num_workers": 0, "progress": False, "device": "cpu", **flags}
    return evaluate({"net": model}, suites, root, **given).results


def test_a_thousand_outputs_with_and_without_restriction(benchmarks: Path) -> None:
    """Class 999 is in no folder, then come 2 (in all but -A) and 6 (in -A and -R)."""
    model = constant(1000, 999, 2, 6)
    counts = correct(measure(model, benchmarks, STORED))
    # -A and -R prescribe their 200 classes, of which 999 is none.
    expected = {name: {(0, 6)} for name in STORED} | {"imagenet-a": {(1, 4)}, "imagenet-r": {(1, 4)}}
    assert counts == expected
    results = measure(model, benchmarks, STORED, restrict_classes=True)
    assert correct(results) == {name: {(2, 6)} for name in STORED} | {
        "imagenet-a": {(1, 4)},
        "imagenet-r": {(1, 4)},
    }
    readings = {name: facts["protocol"]["reading"] for name, facts in results["suites"]["net"].items()}
    assert readings["imagenet-a"] == "200 classes of ImageNet-A, restricted to the 4 classes of the folder"
    assert readings["imagenet-c"] == "1000 classes, restricted to the 3 classes of the folder"


def test_two_hundred_outputs_are_those_of_the_benchmark(benchmarks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output 1 of a model of ImageNet-A's classes is class 11, of ImageNet-R's class 2."""
    whole = {
        "imagenet-a": dict(zip(synsets_of(IMAGENET_A), IMAGENET_A, strict=True)),
        "imagenet-r": dict(zip(synsets_of(IMAGENET_R), IMAGENET_R, strict=True)),
    }
    for name, labels in whole.items():
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], labels=labels))
    model = constant(200, 199, 1)
    for suite in whole:
        assert correct(measure(model, benchmarks, suite, partial=True)) == {suite: {(0, 4)}}
        for names in (None, tuple(whole[suite])):
            results = measure(model, benchmarks, suite, partial=True, restrict_classes=True, classes=names)
            assert correct(results) == {suite: {(1, 4)}}
        assert "200 outputs by WordNet id" in results["suites"]["net"][suite]["protocol"]["reading"]
    with pytest.raises(DataError, match="has images of 3 classes that the model's 200 outputs lack"):
        measure(model, benchmarks, "imagenet-r", partial=True, classes=tuple(whole["imagenet-a"]))
    # Names of ImageNet's first 200 classes: output 1 is class 1, on every folder of classes 0, 1 and 2.
    first = constant(200, 1)
    suites = ("imagenet", "imagenet-sketch", "imagenet-c")
    assert correct(measure(first, benchmarks, suites, classes=SYNSETS[:200])) == {name: {(2, 6)} for name in suites}
    chosen, _ = choose_suites(("all",), SuiteSources(SuiteSettings(benchmarks), 200, SYNSETS[:200]))
    assert {name for name in chosen if name in BENCHMARKS} == {*suites, "imagenet-v2"}
    with pytest.raises(DataError, match="the model has 200 outputs, not ImageNet's 1000"):
        measure(first, benchmarks, "imagenet")


# ---- folders of numbers, and names from a file ----


def numbered(root: Path) -> Path:
    """Twelve class folders, 0 to 11, with an image each."""
    return write_images(root, " ".join(f"val/{number}/0.png" for number in range(12)))


def test_folders_sorted_as_text_are_an_order_of_their_own(tmp_path: Path) -> None:
    """Output 2 is the folder 2, or, for weights of torchvision's ImageFolder, the folder 10."""
    root, readings = numbered(tmp_path / "set"), set()
    for order, folder in (("auto", "2"), ("text", "10")):
        results = measure(constant(12, 2), root, "clean", class_order=order, output_dir=tmp_path / "out")
        assert correct(results) == {"clean": {(1, 12)}}
        recall = results["classes"]["net"]["clean"]["recall"]
        assert {name for name, score in recall.items() if score["correct"]} == {folder}
        readings.add(results["suites"]["net"]["clean"]["protocol"]["reading"])
        assert ("as text (--class_order text)" in results["inputs"]["classes"]) == (order == "text")
    assert len(readings) == 2
    for folder in range(3, 12):
        (root / "val" / str(folder) / "0.png").unlink()
        (root / "val" / str(folder)).rmdir()
    results = measure(constant(12, 4), root, "clean", class_order="text", partial=True)
    assert correct(results) == {"clean": {(1, 3)}}, "output 4 of 0, 1, 10, 11, 2 is the folder 2"


def test_the_command_takes_the_names_of_an_onnx_files_outputs(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", "val/ant/0.png val/bee/0.png val/cat/0.png")
    model = Linear(5)
    torch.nn.init.zeros_(model[2].weight)
    model[2].bias.data = torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0])
    file = write_onnx(model, tmp_path / "net.onnx")
    names = tmp_path / "names.txt"
    names.write_text("cat\nwasp\nbee\nfly\nant\n")
    given = ["evaluate", "--checkpoint", str(file), "--data_path", str(root), "--suite", "clean", "--partial"]
    given += ["--num_workers", "0", "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(DataError, match="or give the names of the outputs with --classes FILE"):
        run(given)
    for flags, hits in (([], 0), (["--restrict_classes"], 1)):
        assert run([*given, "--classes", str(names), *flags]) == 0
        results = read_results(tmp_path / "out" / "results.json")
        assert correct(results) == {"clean": {(hits, 3)}}
        assert "names given by --classes" in results["inputs"]["classes"]
    names.write_text("cat\nwasp\n")
    with pytest.raises(ConfigError, match="--classes has 2 names, but the models have 5 outputs"):
        run([*given, "--classes", str(names)])
