"""What a number stands for: a partial cell shows, what changes is measured anew, and a report tells what it mixes."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_benchmark_sets import FEW, SIDE, validation_names
from test_robustness import Linear, draw, imagenet, own, write_onnx  # noqa: F401 - some are fixtures

from mae_dat.axes import axes_of
from mae_dat.cells import PortionPictures
from mae_dat.results import Results
from mae_dat.robustness import evaluate
from mae_dat.suites import Battery, Choice
from mae_dat.tokenizer import embedded_path
from mae_dat.typeset import counts_csv
from mae_dat.weights import write_weights

CPU = torch.device("cpu")


def right(results: Results, suite: str) -> list[int]:
    """Counts of the one network."""
    (found,) = results["cells"].values()
    return [count["correct"] for count in found[suite].values()]


# ---- all cells of a suite ----


def test_a_picture_that_any_cell_lacks_makes_a_partial_row(
    imagenet: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = validation_names()
    (imagenet / "ImageNet-C" / "fog" / "3" / names[0]).unlink()
    with caplog.at_level("INFO"):
        found = evaluate(Linear(1000), "imagenet-c", imagenet, size=SIDE, partial=True)
    facts = found["suites"]["Linear"]["imagenet-c"]
    assert facts["missing"][-1] == "fog/3: 5 of 6 pictures are there"
    assert (facts["images"], found["cells"]["Linear"]["imagenet-c"]["fog/3"]["total"]) == (6, 5)
    assert any("imagenet-c  75 x 6 pictures, partial: " in line and "fog/3: 5 of 6" in line for line in caplog.messages)
    assert not any(axis.published for axis in axes_of(found))
    assert all("partial†" in axis.title for axis in axes_of(found))
    assert {row["partial"] for row in csv.DictReader(counts_csv(found).splitlines())} == {"True"}
    draw([imagenet / "ImageNet-C" / "snow" / "4" / name for name in reversed(names)])
    other = evaluate(Linear(1000), "imagenet-c", imagenet, size=SIDE, partial=True)
    assert other["suites"]["Linear"]["imagenet-c"]["fingerprint"] != facts["fingerprint"]


def test_what_all_cells_lack_is_said_once(imagenet: Path) -> None:  # noqa: F811
    for folder in (imagenet / "ImageNet-C").glob("*/*"):
        shutil.rmtree(folder / FEW[0])
    suite = Battery(Choice(imagenet, partial=True), 1000).suite("imagenet-c", (SIDE, SIDE), "bicubic")
    absent = f"1 of 3 class folders are missing or empty ({FEW[0]})"
    assert suite.missing == [absent, "4 of 6 pictures are there"]


def test_a_chosen_picture_meets_the_same_chance_as_in_the_whole_folder(
    imagenet: Path,  # noqa: F811
) -> None:
    names, whole = validation_names(), Battery(Choice(imagenet), 1000)
    chosen = Battery(Choice(imagenet), 1000)
    chosen.subset = {names[4], names[1]}
    fewer = Battery(Choice(imagenet, limit=1), 1000)
    fewer.subset = {names[4], names[1]}
    every = whole.suite("generated", (SIDE, SIDE), "bicubic")
    assert "numbers" not in every.made, "the key of what was stored before"
    for battery, count in ((chosen, 2), (fewer, 1)):
        suite = battery.suite("generated", (SIDE, SIDE), "bicubic")
        assert suite.made["numbers"] == "places in the whole folder"
        portions = [suite.portions[0], every.portions[0]]
        made, (part, all_) = PortionPictures(portions), (one.pictures for one in portions)
        assert len(part) == count
        for index in range(count):
            (at,) = [i for i in range(6) if all_.name_of(i) == part.name_of(index)]
            assert torch.equal(made[0, index]["pictures"], made[1, at]["pictures"])
            assert made[0, index]["number"] == at


# ---- never another network's numbers ----


def test_a_tokenizer_is_known_by_its_weights(own: Path, tmp_path: Path) -> None:  # noqa: F811
    path = embedded_path()
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    tensors, keys = load_file(path), set()
    for scale in (1.0, 0.5, 1.0):
        write_weights(tmp_path / "tok.safetensors", {key: value * scale for key, value in tensors.items()}, facts)
        found = evaluate(
            Linear(), "words-random", own, size=32, output=tmp_path / "out", tokenizer=str(tmp_path / "tok.safetensors")
        )
        protocol = found["suites"]["Linear"]["words-random"]["protocol"]
        assert protocol["tokenizer"] == "tok.safetensors"
        keys.add(protocol["tokenizer's sha256"])
    assert len(keys) == len(list((tmp_path / "out" / "cells").iterdir())) == 2
