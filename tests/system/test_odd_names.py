"""A class whose folder is not named in UTF-8 goes through every command, as any other class."""

import csv
import os
from pathlib import Path

import pytest
from noise_images import MakeFolder
from tiny_runs import FINETUNE, one_thread, verb  # noqa: F401

NAME = os.fsdecode(b"caf\xe9")


def test_a_class_that_is_not_utf8(make: MakeFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = make(" ".join(f"photos/{name}/{number}.png" for name in (NAME, "dog") for number in range(8))) / "photos"
    data, out, shards = tmp_path / "data", tmp_path / "out", tmp_path / "shards"
    assert verb("split")([str(photos), str(data), "--val", "0.5"]) == 0
    assert verb("finetune")([*FINETUNE, "--data_path", str(data), "--output_dir", str(out)]) == 0
    assert verb("scan")([str(data / "train"), "--num_workers", "0"]) == 0
    assert verb("pack")([str(data), str(shards), "--num_workers", "0"]) == 0
    given = ["--checkpoint", str(out), "--num_workers", "0"]
    evaluated = ["--data_path", str(shards), "--suite", "clean", "--output_dir", str(tmp_path / "report")]
    assert verb("evaluate")([*given, *evaluated]) == 0
    assert verb("predict")([str(data / "val"), *given, "--output_dir", str(tmp_path / "predictions")]) == 0
    with (tmp_path / "predictions" / "predictions.csv").open(errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == 1 + 8
    capsys.readouterr()
