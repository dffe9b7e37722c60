"""Weight files and atomic writing: round trips, hostile and damaged files, a full disk."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mae_dat.config.errors import CheckpointError, MissingInputError, OutputError, StorageError, listing
from mae_dat.storage.files import atomic_write, prepare_output_folder, require_file, sha256_of
from mae_dat.storage.torch_files import read_pickle
from mae_dat.storage.weight_files import check_keys, extract_weights, read_weights, write_weights


def tensors() -> dict[str, Tensor]:
    return {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).double(), "steps": torch.tensor(7)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


# ---- reading what was written ----


def test_safetensors_round_trip_keeps_tensors_and_metadata(tmp_path: Path) -> None:
    path, state = tmp_path / "weights.safetensors", tensors()
    transposed = torch.arange(6.0).view(2, 3).T  # not contiguous
    write_weights(path, {**state, "t": transposed}, {"config": '{"width": 3}'})
    found = read_weights(path)
    assert_same(found.tensors, {**state, "t": transposed})
    assert found.metadata == {"config": '{"width": 3}'}


def test_equal_weights_make_equal_files(tmp_path: Path) -> None:
    state, metadata = tensors(), dict.fromkeys("dabc", "größe")
    hashes = set()
    for turn in range(6):
        path = tmp_path / f"{turn}.safetensors"
        write_weights(path, state, metadata)
        hashes.add(sha256_of(path))
    assert len(hashes) == 1
    assert read_weights(path).metadata == metadata


@pytest.mark.parametrize("name", ["checkpoint-99.pth", "model.pt", "last.ckpt"])
@pytest.mark.parametrize("root", [None, "model", "state_dict"])
def test_torch_files_with_all_that_references_put_in_them(tmp_path: Path, name: str, root: str | None) -> None:
    path, state = tmp_path / name, tensors()
    around = {"args": argparse.Namespace(lr=1e-3), "epoch": 99, "optimizer": {"state": {0: {"step": 1}}}}
    torch.save(state if root is None else {root: state, **around}, path)
    found = read_weights(path)
    assert_same(found.tensors, state)
    assert found.metadata == {}


def test_old_torch_format(tmp_path: Path) -> None:
    path, state = tmp_path / "old.pth", tensors()
    torch.save({"model": state}, path, _use_new_zipfile_serialization=False)
    assert_same(read_weights(path).tensors, state)


@pytest.mark.parametrize("prefix", ["module.", "net.", "model.", "module.net.", "_orig_mod.", "1."])
def test_wrappers_that_all_keys_share_are_taken_off(prefix: str) -> None:
    state = tensors()
    wrapped = {prefix + key: value for key, value in state.items()}
    assert_same(extract_weights({"state_dict": wrapped, "epoch": 1}, "here").tensors, state)


def test_a_prefix_that_not_all_keys_share_stays() -> None:
    state = {"module.weight": torch.ones(2), "head.weight": torch.ones(3)}
    assert_same(extract_weights(state, "here").tensors, state)


@pytest.mark.parametrize("average", ["state_dict_ema", "model_ema", "ema"])
def test_an_average_goes_before_the_weights_it_averages_and_is_told(average: str) -> None:
    state, averaged = tensors(), tensors()
    file = extract_weights(
        {"model": state, average: {f"module.{key}": value for key, value in averaged.items()}}, "here"
    )
    assert_same(file.tensors, averaged)
    assert file.wrappers == (f"the average ({average})", "DDP (module.)")
    assert_same(extract_weights({"model": state, average: None}, "here").tensors, state)
    assert_same(extract_weights({"model": state, average: {"decay": 0.999, "updates": 3}}, "here").tensors, state)


@pytest.mark.parametrize("outer", ["", "module.", "module._orig_mod."])
def test_statistics_of_a_normalization_are_kept_apart(outer: str) -> None:
    """easyrobust's files: a normalization and the model in one sequence."""
    state = tensors()
    wrapped = {f"{outer}1.{key}": value for key, value in state.items()}
    wrapped |= {f"{outer}0.mean": torch.tensor([0.5, 0.25]).view(1, 2, 1, 1), f"{outer}0.std": torch.ones(2)}
    file = extract_weights({"state_dict": wrapped}, "here")
    assert_same(file.tensors, state)
    assert file.statistics == ((0.5, 0.25), (1.0, 1.0))
    assert ("DDP (module.)" in file.wrappers) == bool(outer)
    assert extract_weights(state, "here").statistics is None


def test_statistics_alone_are_no_weights() -> None:
    with pytest.raises(CheckpointError, match=r"no weights, only 0\.mean, 0\.std"):
        extract_weights({"0.mean": torch.ones(3), "0.std": torch.ones(3)}, "here")


def test_content_without_tensors_is_described() -> None:
    with pytest.raises(CheckpointError, match=r"here contains no weights, only epoch, lr"):
        extract_weights({"epoch": 3, "lr": 0.1}, "here")
    with pytest.raises(CheckpointError, match=r"no weights, only list"):
        extract_weights([torch.ones(2)], "here")


# ---- hostile and damaged files ----


class Hostile:
    """Pickles into a call that would create a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_that_a_file_says_is_executed(tmp_path: Path, new_format: bool) -> None:
    path, canary = tmp_path / "hostile.pth", tmp_path / "canary"
    torch.save({"model": tensors(), "args": Hostile(canary)}, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"hostile\.pth cannot be read as weights"):
        read_weights(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the file is as hostile as it was meant to be
    assert canary.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.98])
def test_truncated_files(tmp_path: Path, suffix: str, kept: float) -> None:
    path, state = tmp_path / f"weights{suffix}", {"weight": torch.randn(50, 50)}
    if suffix == ".pth":
        torch.save(state, path)
    else:
        write_weights(path, state, {})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=rf"weights\{suffix} cannot be read as weights.*again"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html>\n<html>Sign in</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "LFS pointer.*git lfs pull"),
        (bytes(range(256)), "cannot be read as weights"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / f"download{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_a_file_of_another_format_under_the_wrong_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    write_weights(path, tensors(), {})
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        read_pickle(path)


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"tokenizer: no such file: .*nothing\.pth"):
        read_weights(tmp_path / "nothing.pth", "tokenizer")
    with pytest.raises(MissingInputError, match="is a folder.*there is none"):
        read_weights(tmp_path)
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(MissingInputError, match=r"is a folder.*last\.ckpt"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match="is a folder"):
        require_file(tmp_path, "weights", CheckpointError)


# ---- keys ----


def test_equal_keys_and_shapes_pass() -> None:
    check_keys("file", tensors(), tensors(), "nothing")


def test_all_differences_of_keys_stand_in_one_table() -> None:
    expected = {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(4), "s": torch.tensor(1)}
    found = {"b": torch.ones(5, 1), "c": torch.ones(4), "d": torch.ones(6)}
    with pytest.raises(CheckpointError) as error:
        check_keys("file.pth", expected, found, "take another")
    assert str(error.value) == (
        "file.pth does not fit the model (2 missing, 1 unexpected, 1 of another shape):\n"
        "  key  in the file  expected\n"
        "  a    -            2         missing\n"
        "  s    -            scalar    missing\n"
        "  d    6            -         unexpected\n"
        "  b    5 x 1        3         of another shape\n"
        "Fix: take another."
    )


def test_long_lists_are_cut() -> None:
    assert listing([str(number) for number in range(5)], most=3) == "0, 1, 2 and 2 more"
    assert listing(["a", "b"]) == "a, b"
    with pytest.raises(CheckpointError, match=r"\(40 missing\)(.|\n)*and 34 more +missing") as error:
        check_keys("file.pth", {str(number): torch.ones(2) for number in range(40)}, {}, "take another")
    assert len(str(error.value).splitlines()) == 10


# ---- files that are whole or absent ----


def test_atomic_write_replaces_a_file_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]
    assert sha256_of(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"


@pytest.mark.parametrize("fault, raised", [(KeyError, KeyError), (KeyboardInterrupt, KeyboardInterrupt)])
def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, fault: type[BaseException], raised: type[BaseException]
) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(raised):
        with atomic_write(path) as file:
            file.write(b"half")
            raise fault
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_writing_into_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "absent" / "weights.safetensors"
    with pytest.raises(StorageError, match=r"could not write .*weights\.safetensors: there is no folder"):
        write_weights(path, tensors(), {})


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from mae_dat.config.errors import StorageError
from mae_dat.storage.files import atomic_write
from mae_dat.storage.weight_files import write_weights
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
state = {"weight": torch.zeros(100_000)}
def save(path):
    with atomic_write(path) as file:
        torch.save(state, file)
for name, write in {"w.safetensors": lambda path: write_weights(path, state, {}), "w.pth": save}.items():
    path = Path(sys.argv[1]) / name
    try:
        write(path)
    except StorageError as error:
        assert str(path) in str(error) and "intact" in str(error), error
    else:
        raise SystemExit("no error")
"""


def test_a_full_disk_is_told_and_the_old_file_is_intact(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing fails midway in the same way."""
    paths = [tmp_path / "w.safetensors", tmp_path / "w.pth"]
    for path in paths:
        path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_the_output_folder_is_tried_before_hours_are_spent(tmp_path: Path) -> None:
    folder = prepare_output_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert not list(folder.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/run.*--output_dir"):
        prepare_output_folder(tmp_path / "file" / "run")
