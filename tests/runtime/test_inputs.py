"""The summary of a command's inputs: the table, and the JSON that is stored."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mae_dat.runtime.console import Console
from mae_dat.runtime.device import describe_device
from mae_dat.runtime.inputs import InputSummary, describe_bytes, list_names, read_inputs


def summary() -> InputSummary:
    inputs = InputSummary("finetune")
    inputs.add("data", "/data/photos (from $MAE_DAT_DATA)", "", "not used: extra/")
    inputs.add("classes", list_names([f"{number} English springer {number}" for number in range(1000)]))
    inputs.add("nothing", "")
    inputs.add("output", "/" + "long" * 30)
    return inputs


def test_the_table_is_aligned_and_fits_80_columns() -> None:
    assert summary().table().split("\n") == [
        "inputs of mae-dat finetune:",
        "  data     /data/photos (from $MAE_DAT_DATA)",
        "           not used: extra/",
        "  classes  0 English springer 0, 1 English springer 1, 2 English springer 2,",
        "           3 English springer 3, ... 999 English springer 999",
        "  output   /" + 17 * "long",
        "           " + 13 * "long",
    ]


def test_lines_are_added_to_a_row() -> None:
    inputs = InputSummary("finetune")
    inputs.add("left out", "nothing")
    inputs.add("model", "resnet50")
    inputs.add("left out", "unreadable images are replaced")
    assert inputs.table().split("\n")[1:3] == ["  left out  nothing", "            unreadable images are replaced"]


def test_the_stored_json_is_what_was_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inputs = summary()
    inputs.details["training"] = {"images": 3}
    with caplog.at_level(logging.INFO):
        Console().report_inputs(inputs, tmp_path / "inputs.json")
    stored = read_inputs(tmp_path / "inputs.json")
    assert caplog.messages == [stored.table()]
    assert stored.details == {"training": {"images": 3}}
    content = json.loads((tmp_path / "inputs.json").read_text())
    assert content["rows"]["data"] == "/data/photos (from $MAE_DAT_DATA)\nnot used: extra/"


def test_ranks_above_0_and_the_parts_of_a_comparison_log_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = Console()
    part.shows_inputs = False
    with caplog.at_level(logging.INFO):
        Console(quiet=True).report_inputs(summary())
        part.report_inputs(summary(), tmp_path / "inputs.json")
    assert not caplog.messages
    assert read_inputs(tmp_path / "inputs.json").table() == summary().table()


def test_names_cannot_change_the_terminal_or_break_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.start_logging()
    inputs = InputSummary("scan")
    inputs.add("classes", "0 \x1b[2Jred, 1 caf\udce9, 2 ねこ")
    console.report_inputs(inputs, tmp_path / "inputs.json")
    assert capsys.readouterr().err == "inputs of mae-dat scan:\n  classes  0 ?[2Jred, 1 caf?, 2 ねこ\n"
    assert read_inputs(tmp_path / "inputs.json").rows["classes"] == "0 ?[2Jred, 1 caf?, 2 ねこ"


def test_the_device_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_dat.runtime.device.usable_cores", lambda: 16)
    threads = torch.get_num_threads()
    words = "1 thread" if threads == 1 else f"{threads} threads"
    cpu = torch.device("cpu")
    assert describe_device(cpu) == f"cpu (16 cores), float32, {words}"
    assert describe_device(cpu, torch.bfloat16, 2, 8) == (
        f"cpu (16 cores), bfloat16 autocast, {words}, 2 workers, 8 ranks"
    )
    assert describe_device(cpu, None, 0, 1).endswith("no workers, 1 rank")


def test_bytes_and_names_in_words() -> None:
    assert [describe_bytes(count) for count in (0, 640, 1300, 2.5e6, 1.5e12)] == [  # type: ignore[arg-type]
        "0 bytes", "640 bytes", "1.3 kB", "2.5 MB", "1,500.0 GB",
    ]  # fmt: skip
    assert list_names(["a", "b", "c"]) == "a, b, c"
    assert list_names([]) == ""
    assert list_names(["x" * 90, "y" * 90]) == f"{'x' * 90}, {'y' * 90}"
    assert list_names([str(number) for number in range(100)], 12) == "0, 1, 2, 3, ... 99"


def test_it_needs_no_torch() -> None:
    code = "import sys, mae_dat.runtime.inputs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
