"""Two models on the same images: images won and lost by suite, class and name; evaluations that are not compared."""

import copy
import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from evaluations import evaluation
from image_results import known_images, predict_cells, predicted
from PIL import Image
from tiny_runs import verb

from mae_dat.config.errors import CheckpointError, ConfigError
from mae_dat.config.parse import run_command
from mae_dat.robustness.report.changes import changes_csv, changes_table, class_changes_table
from mae_dat.robustness.report.merge import choose_models, merge_evaluations
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.scores.results import Results, write_results
from mae_dat.robustness.summary import Evaluation

LABELS = np.repeat(np.arange(4), 10)
CELLS = [f"fog/{severity}" for severity in range(1, 6)]


def one_model(name: str, wrong: list[int], foggy: list[int]) -> Results:
    """A model that predicts all of 40 images correctly but these, and in fog but those."""
    results = evaluation((name,), ("imagenet-a", "generated"))
    results["cells"][name]["generated"] = {}
    prediction = LABELS.copy()
    prediction[wrong] = (prediction[wrong] + 1) % 4
    predicted(results, name, "imagenet-a", LABELS, prediction)
    predict_cells(results, name, "imagenet-a", LABELS, {"": wrong})
    predict_cells(results, name, "generated", LABELS, dict.fromkeys(CELLS, foggy))
    for suite in ("imagenet-a", "generated"):
        known_images(results, suite, LABELS)
        results["suites"][name][suite]["fingerprint"] = "same"
    results["measured_under"] = [
        {"versions": {"torch": "2.15.0"}, "cells": {name: {"imagenet-a": [""], "generated": CELLS}}}
    ]
    return results


def before_and_after() -> tuple[Results, Results]:
    return one_model("plain", [0, 1, 10], [0, 1]), one_model("dat", [1, 2], [])


def test_images_won_and_lost() -> None:
    report = summarize(merge_evaluations(*choose_models({"A": before_and_after()[0], "B": before_and_after()[1]})))
    table = changes_table(report)
    assert table is not None
    assert [row[:4] for row in table.rows] == [("ImageNet-A", "40", "2", "1"), ("IN-C*", "200", "10", "0")]
    assert table.rows[0][4:] == ("1", "no significant difference")  # McNemar of 2 against 1
    classes = class_changes_table(report)
    assert classes is not None
    assert {row[0]: row[1:] for row in classes.rows} == {"cat": ("11", "1", "+10"), "dog": ("1", "0", "+1")}


def test_every_changed_image_is_a_row() -> None:
    report = summarize(merge_evaluations(*choose_models(dict(zip("AB", before_and_after(), strict=True)))))
    rows = list(csv.DictReader(io.StringIO(changes_csv(report))))
    assert len(rows) == 3 + 10
    assert rows[0] == {
        "suite": "imagenet-a", "cell": "", "image": "cat/0.png", "label": "cat", "before": "dog", "after": "cat",
        "change": "won",
    }  # fmt: skip
    assert [(row["image"], row["change"]) for row in rows[1:3]] == [("cat/2.png", "lost"), ("dog/10.png", "won")]
    assert {(row["cell"], row["image"]) for row in rows[3:]} == {
        (cell, f"cat/{i}.png") for cell in CELLS for i in (0, 1)
    }


def test_python_compares_two_evaluations(tmp_path: Path) -> None:
    before, after = map(Evaluation, before_and_after())
    write_results(after.results, tmp_path / "results.json")
    changes = before.compare(tmp_path)
    assert [row["change"] for row in changes.changed] == ["won", "lost", *["won"] * 11]
    assert repr(before.compare(after)) == repr(changes)
    assert "no significant difference" in repr(changes)


def edit_counts(results: Results) -> None:
    results["cells"]["dat"]["imagenet-a"][""]["correct"] += 1


def edit_predictions(results: Results) -> None:
    results["images"]["dat"]["imagenet-a"][""]["correct"] = "1:damaged"


def other_images(results: Results) -> None:
    results["suites"]["dat"]["generated"]["fingerprint"] = "another"


def other_subset(results: Results) -> None:
    results["suites"]["dat"]["generated"]["protocol"]["subset"] = "8 of 40 pictures (seed 0)"


def other_protocol(results: Results) -> None:
    results["models"]["dat"]["protocol"] = "timm"


def other_versions(results: Results) -> None:
    results["measured_under"][0]["versions"]["torch"] = "2.14.0"


def other_order(results: Results) -> None:
    results["images"]["dat"]["generated"]["fog/3"]["order"] = "other"


def no_predictions(results: Results) -> None:
    del results["images"]


def other_suites(results: Results) -> None:
    results["cells"]["dat"] = {"imagenet": results["cells"]["dat"]["imagenet-a"]}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_counts, r"B: dat, imagenet-a: the predictions do not give 39 of 40 correct.*edited"),
        (edit_predictions, r"do not give 38 of 40 correct"),
        (other_images, r"generated: other images or labels.*Evaluate both models again"),
        (other_subset, r"generated, subset: none and 8 of 40"),
        (other_protocol, r"--protocol native and timm"),
        (other_versions, r"torch 2.15.0 in A, 2.14.0 in B"),
        (other_order, r"generated: other images"),
        (no_predictions, r"imagenet-a: no predictions for each image in B"),
        (other_suites, r"no suite in common: imagenet-a, generated and imagenet"),
    ],
)
def test_what_cannot_be_compared_is_an_error(edit: Callable[[Results], None], message: str) -> None:
    before, after = before_and_after()
    edit(after)
    with pytest.raises(CheckpointError, match=message):
        merge_evaluations(*choose_models({"A": before, "B": after}))


def test_one_model_of_each_is_chosen() -> None:
    before, after = before_and_after()
    both = evaluation(("plain", "dat"), ("imagenet-a",))
    with pytest.raises(ConfigError, match=r"several models .*A: plain, dat; B: plain, dat.*--names"):
        choose_models({"A": both, "B": copy.deepcopy(both)})
    assert [one.name for one in choose_models({"A": before, "B": both})] == ["plain", "plain"]
    assert [one.name for one in choose_models({"A": both, "B": after}, ("plain", "dat"))] == ["plain", "dat"]
    with pytest.raises(ConfigError, match="--names gone: A has the models plain"):
        choose_models({"A": before, "B": after}, ("gone", "dat"))


def test_the_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, results in zip("AB", before_and_after(), strict=True):
        (tmp_path / name).mkdir()
        write_results(results, tmp_path / name / "results.json")
    verb("report")(["--compare", str(tmp_path / "A"), str(tmp_path / "B"), "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == str(tmp_path / "out" / "report.html")
    assert any(line.split()[:4] == ["ImageNet-A", "40", "2", "1"] for line in printed)
    assert len((tmp_path / "out" / "changes.csv").read_text().splitlines()) == 14
    assert (
        "Images won and lost: MAE + DAT vs. MAE, fine-tuned plainly" in (tmp_path / "out" / "report.html").read_text()
    )


@pytest.mark.parametrize(
    "arguments", [["OUT", "--compare", "A", "B"], ["--names", "a", "b", "OUT"], [], ["--compare", "A"]]
)
def test_wrong_flags(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: verb("report")(arguments))
    assert end.value.code == 64
    assert "--compare" in capsys.readouterr().err


def test_changed_images_that_are_still_there_are_shown(tmp_path: Path) -> None:
    before, after = before_and_after()
    for results in (before, after):
        results["image_sets"]["imagenet-a"]["a"]["root"] = str(tmp_path / "val")
    (tmp_path / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (400, 300), "red").save(tmp_path / "val" / "cat" / "0.png")
    (tmp_path / "val" / "cat" / "2.png").write_text("no image")
    page = Evaluation(before).compare(Evaluation(after)).report(tmp_path / "out").read_text()
    with Image.open(tmp_path / "out" / "examples" / "1.png") as thumbnail:
        assert thumbnail.size == (224, 168)
    assert not (tmp_path / "out" / "examples" / "2.png").exists()
    assert "✗ MAE, fine-tuned plainly: dog" in page
    assert "✓ MAE + DAT: cat" in page
