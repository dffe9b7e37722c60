"""The files of a prediction: cells that no spreadsheet runs, odd names, complete lines, Parquet."""

import csv
import io
import json
from pathlib import Path

import pytest

from mae_dat.config.errors import StorageError
from mae_dat.prediction.result_files import PredictionFiles, safe_cell, write_csv

COLUMNS: dict[str, type] = {"file": str, "probability_1": float, "abstained": bool}
ODD = ["=1+2", "+x", "-x.jpg", "@x", "\tx", "\rx", "\nx", "'x", 'a,"b"\nc', "plain = -1", "ä\udcff"]


def restored(cell: str) -> str:
    return cell.removeprefix("'")


def test_cells_are_safe_and_can_be_restored(tmp_path: Path) -> None:
    for text in ODD[:8]:
        assert safe_cell(text) == f"'{text}"
    assert [safe_cell(text) for text in ODD[8:10]] == ODD[8:10]
    assert [safe_cell(value) for value in (0.123456789, 1e-9, 1.0, True)] == ["0.123457", "1e-09", "1", "true"]
    path = tmp_path / "a.csv"
    write_csv(path, ["file"], [{"file": text} for text in ODD])
    with path.open(newline="", encoding="utf-8") as file:
        (heading, *rows) = csv.reader(file)
    assert heading == ["file"]
    assert [restored(cell) for (cell,) in rows] == [*ODD[:10], "ä\\udcff"]


def write(folder: Path, fail: bool = False) -> PredictionFiles:
    files = PredictionFiles(folder, COLUMNS)
    with files:
        for number, name in enumerate(ODD):
            row = {"file": name, "probability_1": number / 3, "abstained": number == 2}
            files.add([row], [{"file": name, "probabilities": [number / 3]}], {f"{name}?": "it\tis damaged"})
        if fail:
            raise KeyboardInterrupt
    return files


def test_lines_appear_under_their_names_only_when_complete(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, fail=True)
    assert {path.suffix for path in tmp_path.iterdir()} == {".partial"}
    assert write(tmp_path).unreadable == len(ODD)
    assert not [*tmp_path.glob("*.partial")]
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == ODD
    assert json.loads(lines[1]) == {"file": "+x", "probabilities": [0.333333]}
    rows = [*csv.DictReader(io.StringIO((tmp_path / "predictions.csv").read_text(), newline=""))]
    assert [row["abstained"] for row in rows] == ["false", "false", "true", *["false"] * 8]
    unreadable = (tmp_path / "unreadable.txt").read_text().splitlines()
    assert unreadable[0] == "=1+2?\tit\\tis damaged"
    assert unreadable[6] == "\\nx?\tit\\tis damaged"
    with PredictionFiles(tmp_path, COLUMNS):
        pass
    assert sorted(path.name for path in tmp_path.glob("*.[cjt]*")) == ["predictions.csv", "predictions.jsonl"]
    assert (tmp_path / "predictions.csv").read_text() == "file,probability_1,abstained\n"


def test_a_full_disk_is_a_storage_error() -> None:
    files = PredictionFiles(Path("/dev"), COLUMNS)
    files._partial = lambda name: Path("/dev/full")  # type: ignore[method-assign] # the device that is always full
    with pytest.raises(StorageError, match=r"could not write /dev/predictions\.csv: no space left"), files:
        pass


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    write(tmp_path)
    table = parquet.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert table["file"] == [*ODD[:10], "ä\\udcff"]
    assert table["probability_1"] == pytest.approx([number / 3 for number in range(len(ODD))])
    assert table["abstained"] == [number == 2 for number in range(len(ODD))]
