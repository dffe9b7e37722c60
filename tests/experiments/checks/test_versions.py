"""Versions: the installed ones, and wrong ones as values."""

import platform
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from mae_dat.config.extras import EXTRA_USES, EXTRAS
from mae_dat.experiments.checks.row import CheckRow, run_check
from mae_dat.experiments.checks.versions import (
    check_numpy,
    check_opencv,
    check_other_packages,
    check_package,
    check_python,
    check_timm,
    check_torch,
    check_torchvision,
    extra_row,
    pair_problem,
    python_row,
    reinstall_command,
    requirements,
    version_row,
)

TORCH = Requirement("torch>=2.11,<2.16")


def test_the_installed_packages_are_all_right() -> None:
    checks = (check_package, check_python, check_torch, check_torchvision, check_timm, check_numpy, check_opencv)
    assert [row for check in checks if (row := check()).state == "failed"] == []
    assert check_torchvision().text.startswith(metadata.version("torchvision"))
    assert check_python().text.startswith(platform.python_version())
    first, *wrong = check_other_packages()
    assert first.state == "ok"
    assert not wrong


@pytest.mark.parametrize(
    "version, state",
    [("2.15.0+cu132", "ok"), ("2.12.1", "ok"), ("2.15.1.dev2026", "ok"), ("2.10.1", "failed"), ("2.16.0", "failed")],
)
def test_a_version_is_compared_with_the_range(version: str, state: str) -> None:
    row = version_row("torch", version, TORCH)
    assert row.state == state
    assert row.text.startswith(version)
    assert row.fix == ("" if state == "ok" else 'pip install "torch<2.16,>=2.11"')
    assert version_row("torch", version, None).state == "ok"  # the range is unknown


def test_a_missing_package_is_installed_in_its_range() -> None:
    assert version_row("torch", None, TORCH) == CheckRow(
        "failed", "torch", "not installed", 'pip install "torch<2.16,>=2.11"'
    )


@pytest.mark.parametrize("required", ["torch==2.14.0", "torch (==2.14.0)"])
def test_torch_and_torchvision_must_match(required: str) -> None:
    assert pair_problem("2.14.0+cu132", "0.28.1", required) == ""
    problem = pair_problem("2.15.0+cu132", "0.28.1", required)
    assert problem == "0.28.1 needs torch==2.14.0, and torch 2.15.0+cu132 is installed"
    assert pair_problem("2.15.0", "0.28.1", None) == ""


def test_python_is_compared_with_the_tested_versions() -> None:
    tested = ["3.11", "3.12", "3.13"]
    assert python_row("3.12.4", ">=3.11", tested).state == "ok"
    assert python_row("3.14.0", ">=3.11", tested).state == "warning"
    old = python_row("3.10.2", ">=3.11", tested)
    assert (old.state, old.fix) == ("failed", "install Python 3.13")


def test_a_package_that_cannot_be_imported_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    (row,) = run_check("timm", check_timm, reinstall_command("timm"))
    assert row.state == "failed"
    assert row.fix.startswith('pip install --force-reinstall "timm')


def test_without_opencv_the_row_names_the_build_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    row = check_opencv()
    assert row.state == "failed"
    assert row.fix.endswith(f'pip install "{requirements()["opencv-python-headless"]}"')


def test_an_extra_is_installed_or_can_be() -> None:
    required = {"onnx": Requirement("onnx>=1.17"), "onnxruntime": Requirement("onnxruntime>=1.20")}
    versions: dict[str, str | None] = {"onnx": "1.23.2", "onnxruntime": "1.32.0"}
    assert extra_row("export", versions, required) == CheckRow("ok", "extra export", "onnx 1.23.2, onnxruntime 1.32.0")
    old = extra_row("export", {**versions, "onnx": "1.16.0"}, required)
    assert (old.state, old.fix) == ("warning", "pip install --upgrade onnx onnxruntime onnxscript")
    assert "onnx 1.16.0; >=1.17 is required" in old.text
    missing = extra_row("export", {**versions, "onnx": None}, required)
    assert missing.state == "-"
    assert missing.text.startswith("without onnx; ")
    assert missing.text.endswith("\npip install onnx onnxruntime onnxscript")
    assert extra_row("parquet", {"pyarrow": None}, {}).text.startswith("not installed; for Parquet files")


def test_every_extra_has_a_use_and_requirements() -> None:
    assert EXTRA_USES.keys() == EXTRAS.keys()
    assert all(set(requirements(extra)) == set(packages) for extra, packages in EXTRAS.items())
    assert "onnx" not in requirements()
