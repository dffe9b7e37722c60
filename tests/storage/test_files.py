"""The output folder: what can be written into is, whatever its name; what cannot is told before hours are spent."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mae_dat.config.errors import OutputError, StorageError
from mae_dat.storage.checkpoint import newest_checkpoint, save_checkpoint
from mae_dat.storage.files import atomic_write, open_lock_file, prepare_output_folder, storage_error
from mae_dat.storage.output_lock import lock_output_folder

GOOD_NAMES = {
    "spaces": " a folder  with spaces ",
    "unicode": "größe-模型-🙂",
    "newline": "two\nlines",
    "quotes": 'it\'s "$(touch x)" `y` & *?[a]',
    "a dash": "--output_dir",
    "percent": "100%s%(x)d{y}",
    "255 bytes": "n" * 255,
    "no UTF-8": os.fsdecode(b"\xff\xfe"),
    "several levels": "a/b/c",
}


@pytest.mark.parametrize("name", GOOD_NAMES.values(), ids=GOOD_NAMES.keys())
def test_any_name_will_do(name: str, tmp_path: Path) -> None:
    folder = prepare_output_folder(tmp_path / name)
    assert not list(folder.iterdir()), "the probe is gone"
    with lock_output_folder(folder, grace=0) as lease:
        lease.check()
        save_checkpoint(folder, 7, {"step": 7}, keep_newest=1)
        save_checkpoint(folder, 8, {"step": 8}, keep_newest=1)
    found = newest_checkpoint(folder)
    assert found is not None
    assert found.load() == {"step": 8}
    assert len(list(folder.iterdir())) == 3, "checkpoint, manifest and lock file"


def a_file(folder: Path) -> Path:
    (folder / "run").write_text("in the way")
    return folder / "run"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "below" / "it"


def no_parent(folder: Path) -> Path:
    return Path("/proc/mae_dat/run")  # nobody can make a folder there, root neither


def too_long(folder: Path) -> Path:
    return folder / ("n" * 256)


def too_long_for_a_checkpoint(folder: Path) -> Path:
    """The folder itself can be made, by steps; the names of checkpoints in it are past the limit of a path."""
    while len(os.fsencode(folder)) < 4096 - 200:
        folder = folder / ("n" * 99)
    folder = folder / ("n" * (4096 - 30 - len(os.fsencode(folder))))
    folder.mkdir(parents=True)
    return folder


def a_null(folder: Path) -> Path:
    return folder / "a\0b"


def a_dangling_link(folder: Path) -> Path:
    (folder / "run").symlink_to(folder / "absent" / "below")
    return folder / "run"


def a_link_to_itself(folder: Path) -> Path:
    (folder / "run").symlink_to(folder / "run")
    return folder / "run"


BAD_FOLDERS: dict[Callable[[Path], Path], str] = {
    a_file: "File exists",
    below_a_file: "Not a directory",
    no_parent: "No such file or directory",
    too_long: "File name too long",
    too_long_for_a_checkpoint: "File name too long",
    a_null: "null byte|null character",
    a_dangling_link: "File exists",
    a_link_to_itself: "Too many levels of symbolic links|File exists",
}


@pytest.mark.parametrize(("make", "cause"), BAD_FOLDERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_written_is_told_at_once(make: Callable[[Path], Path], cause: str, tmp_path: Path) -> None:
    folder = make(tmp_path)
    with pytest.raises(OutputError, match=f"({cause}).*--output_dir") as error:
        prepare_output_folder(folder)
    assert str(folder) in str(error.value)
    assert error.value.exit_code == 73


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that is mounted read-only: bits of permission do not stop root."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_file_system(read_only: Path) -> None:
    for folder in (read_only, read_only / "below"):
        with pytest.raises(OutputError, match=r"Read-only file system.*--output_dir"):
            prepare_output_folder(folder)
    with pytest.raises(StorageError, match="Read-only file system"):
        with lock_output_folder(read_only):
            pass


def test_a_folder_that_becomes_read_only(tmp_path: Path) -> None:
    folder = tmp_path / "mounted"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        save_checkpoint(prepare_output_folder(folder), 1, {"step": 1})
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        with pytest.raises(StorageError, match=r"checkpoint-00000002.pth: .*Read-only file system.*intact"):
            save_checkpoint(folder, 2, {"step": 2})
        found = newest_checkpoint(folder)
        assert found is not None
        assert found.step == 1
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "the quota is used up"),
        (errno.EFBIG, "no space left for a file of this size"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_the_cause_of_a_failed_write_is_told_with_what_it_needed(code: int, cause: str, tmp_path: Path) -> None:
    told = storage_error(tmp_path / "file", OSError(code, os.strerror(code)), 123_456)
    assert f"could not write {tmp_path}/file: " in str(told)
    assert cause in str(told)
    assert "(123,456 bytes needed, " in str(told)
    assert told.exit_code == 74


def test_nothing_is_begun_that_cannot_fit(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(
        StorageError, match=r"file: no space left \(1,152,921,504,606,846,976 bytes needed, [\d,]+ bytes"
    ):
        with atomic_write(tmp_path / "file", need=1 << 60):
            sys.exit("begun")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / ".lease.lock").symlink_to(target)
    with pytest.raises(OutputError, match=r"\.lease\.lock is a link, which is not followed: remove it"):
        open_lock_file(tmp_path / ".lease.lock")
    assert target.read_text() == "precious"
    with open_lock_file(target):
        assert target.read_text() == "precious", "the content stays"
