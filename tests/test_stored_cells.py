"""What a number stands for: a partial cell shows, what changes is measured anew, and a report tells what it mixes."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from test_benchmark_sets import FEW, SIDE, validation_names
from test_robustness import Linear, draw, imagenet, own, write_onnx  # noqa: F401 - some are fixtures

from mae_dat.axes import axes_of
from mae_dat.results import Results
from mae_dat.robustness import evaluate
from mae_dat.suites import Battery, Choice
from mae_dat.typeset import counts_csv

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
