"""An error removes the folders that a command created and left empty, and nothing else."""

from pathlib import Path

import pytest

from mae_dat.config.errors import DataError
from mae_dat.storage.files import prepare_output_folder
from mae_dat.storage.new_folders import empty_folders_removed
from mae_dat.storage.output_lock import lock_output_folder


def fail_in(folder: Path, file: str = "") -> None:
    """Opens an output folder as a training does, writes a file if it is given, and raises an error."""
    with pytest.raises(DataError), empty_folders_removed():
        prepare_output_folder(folder)
        with lock_output_folder(folder):
            if file:
                (folder / file).touch()
            raise DataError("")


def test_new_folders_are_removed_with_their_new_parents_and_lock(tmp_path: Path) -> None:
    fail_in(tmp_path / "a" / "b", file="inputs.json")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_file_stays(tmp_path: Path) -> None:
    fail_in(tmp_path / "a", file="log.txt")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"log.txt", ".lease.lock"}


def test_an_earlier_folder_stays_even_if_it_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    fail_in(tmp_path / "a")
    assert (tmp_path / "a").is_dir()


def test_without_an_error_and_without_a_command_folders_stay(tmp_path: Path) -> None:
    with empty_folders_removed():
        prepare_output_folder(tmp_path / "a")
    with pytest.raises(DataError):
        prepare_output_folder(tmp_path / "b")
        raise DataError("")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
