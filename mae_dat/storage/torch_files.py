"""Read torch's files (`.pth`, `.pt`, `.ckpt`) without executing code in them, and identify files of other formats.

They are read with torch's `weights_only`. The classes allowed in addition are `argparse.Namespace`, for MAE's
checkpoints, and harmless objects that training scripts store beside the weights, such as numpy's numbers and paths:
each becomes an `InertObject`. torch's own messages are not shown, because they advise to load the file without this
protection.
"""

import argparse
import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any, Self

import torch

from mae_dat.config.errors import CheckpointError, listing
from mae_dat.storage.files import is_web_page

_SAVE_WEIGHTS = (
    "Save only the weights, with the code that wrote the file: "
    "torch.save(model.state_dict(), 'weights.pth'), and use that file."
)
_HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # a key in Lightning's files
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    "numpy.dtype",
    *(
        f"{module}.{kind}Path"
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "Windows", "PurePosix", "PureWindows", "")
    ),
)
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first number in torch's files before version 1.6
_MODULE_MARKS = (b"torch.nn.modules", b"torch.fx.graph_module")  # in the pickle of a module, never in that of tensors
_PICKLE_START = 1 << 20  # bytes of a pickle that are searched for them
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
}
_MAX_NAMES = 4  # of an archive's content, in a message


class InertObject:
    """Replaces an object that is not needed, such as a number of numpy; accepts any content and does nothing."""

    def __new__(cls, *content: Any) -> Self:
        """Create the object; its `content` is dropped."""
        return super().__new__(cls)

    def __init__(self, *content: Any) -> None:
        """Drop the content."""

    def __setstate__(self, state: Any) -> None:
        """Drop the state."""


def read_pickle(path: Path) -> Any:
    """Read the object in a torch file with `weights_only`. Raises CheckpointError, which identifies other files."""
    reject_other_files(path)
    _identify(path)
    _reject_unusual_archives(path)
    # (class, full name) pairs, which torch documents but does not type, allow a class under another name.
    allowed: list[Any] = [argparse.Namespace, *((InertObject, name) for name in _HARMLESS)]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings give the same advice
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any layer of the reader
        raise _rejected(path, error) from error


def reject_other_files(path: Path) -> None:
    """Raise a CheckpointError with the cause for the files that failed downloads leave behind."""
    start = _read_start(path)
    if not start:
        raise CheckpointError(f"{path} is empty; download or write the file again.")
    if is_web_page(start):
        raise CheckpointError(f"{path} is a web page, not weights: the download failed; repeat it.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull`.")


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a damaged file, with the cause but without torch's advice."""
    cause = str(error).strip().split("\n")[0] or type(error).__name__
    if cause.isdecimal():  # torch's reader of pickles names an unknown instruction by its number
        cause = "it is not a file that torch wrote, or is damaged"
    if "weights_only" in cause or "Weights only" in cause:
        cause = "it is damaged, or contains objects other than tensors, numbers and text, which are never loaded"
    return CheckpointError(f"{path} cannot be read as weights: {cause}. Download or write the file again.")


def _read_start(path: Path, count: int = 64) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise unreadable(path, error) from error


def _identify(path: Path) -> None:
    """Raise a CheckpointError with instructions for a file of a known format that torch does not load as weights."""
    start = _read_start(path, 512)
    if start[8:10] == b'{"':
        raise CheckpointError(f"{path} cannot be read as weights: it is a safetensors file; rename it to .safetensors.")
    if start.startswith(b"\x93NUMPY"):
        raise _not_weights(path, "a single array of numpy (.npy)", _SAVE_WEIGHTS)
    if start.startswith(b"\x89HDF"):
        raise _not_weights(path, "an HDF5 file, such as Keras writes", "Use weights that torch wrote.")
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise _not_weights(path, f"compressed by {name}", "Unpack it and use the file in it.")
    if start.startswith(b"PK"):
        _identify_zip(path)
    elif start[257:262] == b"ustar" or (start[:1] != b"\x80" and tarfile.is_tarfile(path)):
        _identify_tar(path)


def _identify_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise unreadable(path, error) from error
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise _not_weights(
            path,
            "a TorchScript program, of which nothing is executed here",
            f"If you trust its source, save only its weights: torch.save(torch.jit.load({path.name!r}, "
            "map_location='cpu').state_dict(), 'weights.pth'), and use that file.",
        )
    if any(name.rpartition("/")[2] == "archive_format" for name in names):
        raise _not_weights(
            path,
            "a program of torch.export",
            f"Save only its weights: torch.save(torch.export.load({path.name!r}).state_dict, 'weights.pth').",
        )
    if any(name.endswith("data.pkl") for name in names):
        return
    if names and all(name.endswith(".npy") for name in names):
        raise _not_weights(
            path,
            f"arrays of numpy (.npz: {listing(names, _MAX_NAMES)})",
            "Save them as tensors: torch.save({key: torch.from_numpy(array) for key, array in "
            f"numpy.load({path.name!r}).items()}}, 'weights.pth'). timm.create_model(NAME, checkpoint_path=...) "
            "converts the published files of ViT and Mixer.",
        )
    raise _not_weights(
        path, f"a zip archive of {listing(names, _MAX_NAMES)}", "Unpack it and use the weights file in it."
    )


def _identify_tar(path: Path) -> None:
    try:
        with tarfile.open(path, "r:") as archive:
            names = [member.name for _, member in zip(range(_MAX_NAMES + 1), archive, strict=False)]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise unreadable(path, error) from error
    if {"pickle", "storages"} <= {*names}:
        raise _not_weights(path, "in torch's oldest format (tar), which is not supported", _SAVE_WEIGHTS)
    raise _not_weights(
        path, f"a tar archive of {listing(names, _MAX_NAMES)}", "Unpack it (tar -xf) and use the weights file in it."
    )


def _not_weights(path: Path, what: str, fix: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read as weights: it is {what}. {fix}")


def _reject_unusual_archives(path: Path) -> None:
    """Raise CheckpointError for compressed records, which could fill the memory, and for two records with the same
    name, which are ambiguous. torch writes neither."""
    try:
        with zipfile.ZipFile(path) as archive:
            records, size = archive.infolist(), path.stat().st_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # another format, or damaged: torch's reader reports the cause
    if len({record.filename for record in records}) < len(records):
        raise unreadable(path, ValueError("it contains two records with the same name"))
    if sum(record.file_size for record in records) > size:
        raise unreadable(path, ValueError("its records are compressed, which torch never does"))


def _rejected(path: Path, error: Exception) -> CheckpointError:
    """Return the error for a file that torch does not load: a pickled module, another object in it, or damage."""
    match = re.search(r"GLOBAL ([\w.]{1,200})", str(error))
    start = _pickle_start(path)
    if match and any(mark in start for mark in _MODULE_MARKS):
        return _not_weights(path, f"a whole pickled model ({match[1]}), whose code would be executed", _SAVE_WEIGHTS)
    if match:
        return CheckpointError(
            f"{path} cannot be read as weights: it contains an object of {match[1]}, which is never loaded. "
            f"{_SAVE_WEIGHTS}"
        )
    if start[:1] == b"\x80" and _LEGACY_MAGIC not in start[:32]:
        return _not_weights(path, "a pickle that torch did not write, or damaged", _SAVE_WEIGHTS)
    return unreadable(path, error)


def _pickle_start(path: Path) -> bytes:
    """Return the first part of a file's pickle; empty if there is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if name is None:
                return b""
            with archive.open(name) as record:
                return record.read(_PICKLE_START)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError):
        return _read_start(path, _PICKLE_START)
