"""Torch files with more than tensors: harmless objects are dropped, files of other formats are identified."""

import argparse
import pathlib
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError
from mae_dat.storage.torch_files import read_pickle
from mae_dat.storage.weight_files import read_weights, write_weights


def tensors() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


NUMBERS: dict[str, Any] = {
    "float64": np.float64(83.1),
    "float32": np.float32(2),
    "integer": np.int64(3),
    "boolean": np.bool_(True),
    "text": np.str_("adam"),
    "array": np.arange(3.0),
    "state of a generator": np.random.RandomState(0).get_state(),
    "path": pathlib.Path("/data"),
    "path of another system": pathlib.PureWindowsPath("C:/data"),
    "namespace with both": argparse.Namespace(output_dir=pathlib.Path("/x"), lr=np.float64(0.1)),
}


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("name", NUMBERS)
def test_numpy_numbers_and_paths_beside_the_weights_do_no_harm(tmp_path: Path, name: str, new_format: bool) -> None:
    path = tmp_path / "checkpoint.pth"
    content = {"model": tensors(), "extra": NUMBERS[name], "optimizer": {"lr": [NUMBERS[name]]}}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    loaded = read_weights(path).tensors
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[key], value) for key, value in tensors().items())


def test_numpy_1_and_numpy_2_name_the_same_classes_differently(tmp_path: Path) -> None:
    for module in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        pickled = b"\x80\x02}q\x00(X\x01\x00\x00\x00wc" + module + b"\nscalar\ncnumpy\ndtype\n"
        pickled += (
            b"(X\x02\x00\x00\x00f8K\x00K\x01tRc_codecs\nencode\n(X\x01\x00\x00\x00\x00X\x06\x00\x00\x00latin1tR\x86Ru."
        )
        path = tmp_path / "number.pth"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/version", b"3\n")
            archive.writestr("archive/data.pkl", pickled)
        assert list(read_pickle(path)) == ["w"]


# ---- files of other formats ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def write_tar(path: Path) -> None:
    torch.save(tensors(), path.with_name("inner.pth"))
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_name("inner.pth"), "inner.pth")


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/inner.pth", b"weights")


def write_script(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.trace(Net(), torch.zeros(1, 3)).save(str(path))


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **{key: value.numpy() for key, value in tensors().items()})  # type: ignore[arg-type]


def write_npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "torchscript": (write_script, r"TorchScript program.*torch\.jit\.load\('file\.pth'.*state_dict\(\)"),
    "exported program": (
        lambda path: torch.export.save(torch.export.export(Net(), (torch.zeros(1, 3),)), path),
        r"program of torch\.export\. Save only its weights: .*torch\.export\.load\('file\.pth'\)\.state_dict",
    ),
    "tar": (write_tar, r"tar archive of inner\.pth\. Unpack it \(tar -xf\)"),
    "zip": (write_zip, r"zip archive of model/inner\.pth\. Unpack it"),
    "npz": (write_npz, r"arrays of numpy \(\.npz: a\.weight\.npy, a\.bias\.npy\).*torch\.from_numpy"),
    "npy": (write_npy, r"single array of numpy"),
    "gzip": (lambda path: path.write_bytes(b"\x1f\x8b\x08" + bytes(64)), r"compressed by gzip\. Unpack it"),
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), r"HDF5 file, such as Keras writes"),
    "safetensors": (lambda path: write_weights(path, tensors(), {}), r"safetensors file; rename it to \.safetensors"),
    "module": (
        lambda path: torch.save(Net(), path),
        r"whole pickled model \([\w.]*test_torch_files\.Net\).*torch\.save\(model\.state_dict\(\)",
    ),
    "old module": (
        lambda path: torch.save(Net(), path, _use_new_zipfile_serialization=False),
        r"whole pickled model \([\w.]*Net\).*torch\.save\(model\.state_dict\(\)",
    ),
    "object": (
        lambda path: torch.save({"model": tensors(), "args": zipfile.ZipInfo("a")}, path),
        r"contains an object of zipfile\.ZipInfo, which is never loaded\. Save only the weights",
    ),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps({"w": np.zeros(2)}, 2)),
        r"a pickle that torch did not write.*torch\.save\(model\.state_dict\(\)",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_identified_with_instructions(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file.pth"
    write, message = OTHERS[name]
    write(path)
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(path)
    assert str(error.value).startswith(f"{path} cannot be read as weights: ")
    assert "weights_only" not in str(error.value)


def test_neither_messages_nor_warnings_repeat_torchs_advice(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    contents = {"plain.pth": pickle.dumps({"a": 1}), "text.pth": b"hello", "deep.pth": pickle.dumps([[1]] * 3, 4)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} cannot be read as weights: it is") as caught:
            read_pickle(tmp_path / name)
        assert "weights_only" not in str(caught.value)
    assert not recwarn.list
    assert "weights_only" not in "".join(capfd.readouterr())
