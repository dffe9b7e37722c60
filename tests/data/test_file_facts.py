"""Replaced files are found by size, by time and content, or by content alone; copies are the same files."""

import os
import shutil
from pathlib import Path

import pytest

from mae_dat.data import file_facts as module
from mae_dat.data.file_facts import FileState, file_facts, replaced


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    names = [str(tmp_path / f"{number}.bin") for number in range(20)]
    for number, name in enumerate(names):
        Path(name).write_bytes(bytes([number]) * 100)
    return names


def test_the_same_files_are_not_read_again(paths: list[str]) -> None:
    before = file_facts(paths)
    marked = {**before, "content": "of before"}
    assert file_facts(paths, marked) == marked  # type: ignore[arg-type]
    assert file_facts(paths) == before


@pytest.mark.parametrize("number", [0, 7, 19])
def test_any_replaced_file_is_found(paths: list[str], number: int) -> None:
    before = file_facts(paths)
    Path(paths[number]).write_bytes(b"x" * 100)
    os.utime(paths[number], ns=(1, 1))
    now = file_facts(paths, before)
    assert now["sizes"] == before["sizes"]
    assert replaced(before, now)


def test_a_file_of_another_size_or_a_missing_one(paths: list[str]) -> None:
    before = file_facts(paths)
    Path(paths[3]).write_bytes(b"x" * 101)
    assert replaced(before, file_facts(paths, before))
    Path(paths[3]).unlink()
    assert replaced(before, file_facts(paths, before))


def test_copies_with_other_times_are_the_same_files(paths: list[str], tmp_path: Path) -> None:
    before = file_facts(paths)
    copies = [shutil.copyfile(path, tmp_path / f"copy {Path(path).name}") for path in paths]
    for path in copies:
        os.utime(path, ns=(5, 5))
    now = file_facts([str(path) for path in copies], before)
    assert now["times"] != before["times"]
    assert not replaced(before, now)


def test_of_large_sets_the_starts_of_some_files_are_read(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(module, "_SAMPLED_FILES", 5)
    before = file_facts(paths)
    Path(paths[1]).write_bytes(b"x" * 100)  # not one of 0, 4, 8, 12, 16
    os.utime(paths[1], ns=(2, 2))
    assert not replaced(before, file_facts(paths))
    assert replaced(FileState(paths, whole=True).facts(), before)
    Path(paths[4]).write_bytes(b"x" * 100)
    os.utime(paths[4], ns=(2, 2))
    assert replaced(before, file_facts(paths))
