"""Replaced files are found by size, by time and content, or by content alone; copies are the same files."""

import os
import shutil
from pathlib import Path

import pytest

from mae_dat.data import file_facts as module
from mae_dat.data.file_facts import FileFacts, file_facts, replaced


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


@pytest.mark.parametrize("number", [0, 7, 19])
def test_a_file_replaced_with_its_size_and_time_is_found(paths: list[str], number: int) -> None:
    before = file_facts(paths)
    stat = Path(paths[number]).stat()
    Path(paths[number]).write_bytes(b"x" * 100)
    os.utime(paths[number], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = file_facts(paths, before)
    assert (now["sizes"], now["times"]) == (before["sizes"], before["times"])
    assert replaced(before, now)


def test_facts_of_older_releases_know_sizes_and_modification_times_only(paths: list[str]) -> None:
    before = file_facts(paths)
    older = FileFacts(sizes=before["sizes"], times=before["times"], content="of before")
    now = file_facts(paths, older)
    assert now == {**before, "content": "of before"}
    assert not replaced(older, now)


@pytest.fixture
def large(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that count as a set too large to be read, of which four blocks of ten bytes are sampled."""
    monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(module, "_SAMPLES", 4)
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 10)
    return paths


@pytest.mark.parametrize("keeps_time", [False, True])
def test_of_large_sets_every_replaced_file_is_found(large: list[str], keeps_time: bool) -> None:
    before = file_facts(large)
    assert not replaced(before, file_facts(large, before))
    stat = Path(large[1]).stat()
    Path(large[1]).write_bytes(b"x" * 100)  # not one of the sampled 0, 5, 10, 15
    if keeps_time:
        os.utime(large[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = file_facts(large, before)
    assert now["content"] == before["content"]
    assert replaced(before, now)


def test_of_copies_of_large_sets_samples_are_compared(large: list[str], tmp_path: Path) -> None:
    before = file_facts(large)
    copies = [str(shutil.copyfile(path, tmp_path / f"copy {Path(path).name}")) for path in large]
    assert not replaced(before, file_facts(copies, before))
    Path(copies[5]).write_bytes(b"x" * 100)
    assert replaced(before, file_facts(copies, before))


def test_single_large_files_are_sampled_from_start_to_end(large: list[str], tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(content := bytes(range(100)) * 20)
    path = str(tmp_path / "shard")
    before = file_facts([path])
    for position in (0, 663, 1327, 1999):
        Path(path).write_bytes(content[:position] + b"!!" + content[position + 2 :])
        assert replaced(before, file_facts([path])), position
    Path(path).write_bytes(content[:300] + b"!!" + content[302:])
    assert not replaced(before, file_facts([path])), "the documentation says so"


def test_samples_are_not_compared_with_the_hash_of_everything(large: list[str]) -> None:
    facts = file_facts(large)
    assert facts["content"].startswith("sampled:")
    assert not replaced({**facts, "content": "of an older release"}, facts)
    assert len(facts["groups"]) == len(large)
