"""Devices and disks of this machine, and disks that are full, missing, read-only or no folder."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.config.errors import ConfigError
from mae_dat.experiments.checks.machine import (
    check_cache_folder,
    check_cuda,
    check_memory,
    check_output_folder,
    check_precision,
    check_processor,
    check_shared_memory,
    check_threads,
    folder_row,
)


def test_the_devices_of_this_machine() -> None:
    rows = [*check_cuda(), check_processor(), check_memory(), check_precision(DoctorConfig()), check_threads()]
    assert not [row for row in rows if row.state == "failed"]
    assert [row.name for row in rows[-4:]] == ["processor", "memory", "precision", "threads"]
    assert rows[0].name.startswith("GPU")


def test_the_precision_and_its_reason() -> None:
    assert check_precision(DoctorConfig(device="cpu", precision="fp32")).text == "float32 on cpu: --precision fp32"
    assert check_precision(DoctorConfig(device="cpu", precision="bf16")).text == "bfloat16 on cpu: --precision bf16"
    with pytest.raises(ConfigError, match="--device tpu is not a device"):
        check_precision(DoctorConfig(device="tpu"))


def test_more_threads_than_cores_are_a_warning() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4096)
    try:
        row = check_threads()
    finally:
        torch.set_num_threads(before)
    assert row.state == "warning"
    assert row.text.startswith("4096 for torch")
    assert row.fix.startswith("export OMP_NUM_THREADS=")


def test_a_folder_is_checked_and_not_created(tmp_path: Path) -> None:
    row = folder_row("output folder", tmp_path / "a" / "b", 1, "choose another")
    assert row.state == "ok"
    assert row.text.startswith(str(tmp_path / "a" / "b"))
    assert row.text.endswith("GB free, not there yet")
    assert folder_row("output folder", tmp_path, 1, "choose another").text.endswith("GB free")
    assert not list(tmp_path.iterdir())
    little = folder_row("output folder", tmp_path, 1e30, "choose another")
    assert (little.state, little.fix) == ("warning", "free some space, or choose another")


def test_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert check_output_folder(Path("./output_dir")).state != "failed"
    assert check_output_folder(Path()).state != "failed"


def test_a_file_in_the_place_of_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache"
    file.write_bytes(b"")
    for folder in (file, file / "mae_dat"):
        monkeypatch.setenv("MAE_DAT_HOME", str(folder))
        row = check_cache_folder()
        assert (row.state, row.text) == ("failed", f"{file} is no folder")
        assert row.fix == "remove it, or set MAE_DAT_HOME to another folder"


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB in memory."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_shared_memory_fails(mounted: Path) -> None:
    row = check_shared_memory(mounted)
    assert (row.state, row.text) == ("failed", "0.0 GB of 0.0 GB free")
    assert "--shm-size" in row.fix
    subprocess.run(["mount", "-o", "remount,size=100m", str(mounted)], check=True)
    assert check_shared_memory(mounted).state == "warning"


def test_a_full_disk_and_a_read_only_one_fail(mounted: Path) -> None:
    assert folder_row("output folder", mounted, 1, "choose another").state == "failed"
    subprocess.run(["mount", "-o", "remount,ro,size=1g", str(mounted)], check=True)
    row = folder_row("output folder", mounted, 1, "choose another")
    assert (row.state, row.fix) == ("failed", "choose another")
    assert row.text.endswith("cannot be written: Read-only file system")


def test_a_missing_shared_memory_fails(tmp_path: Path) -> None:
    row = check_shared_memory(tmp_path / "shm")
    assert (row.state, row.text) == ("failed", "does not exist")
