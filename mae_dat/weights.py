"""Reading and writing weight files. Nothing that a file says is ever executed, and what is damaged is never loaded.

`.safetensors` is what we write. Foreign `.pth`, `.pt` and `.ckpt` files are read with torch's `weights_only` and
exactly two further names allowed: the `argparse.Namespace` of MAE's checkpoints, and a stub for the callback of
Lightning's.
"""

import argparse
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor

from mae_dat.errors import CheckpointError
from mae_dat.files import atomic_write, require_file


class LightningCallbackStub:
    """Stands for `ModelCheckpoint` as a dictionary key in Lightning's files; carries no behaviour."""


_LIGHTNING_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class WeightsFile(NamedTuple):
    """Tensors by key and, for safetensors, the file's string metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_weights(path: Path, what: str = "weights") -> WeightsFile:
    """Reads a state dict on the CPU from `.safetensors` or a torch file, unwrapping `model`, `state_dict` and
    `module.`.

    Raises MissingInputError for no such file and CheckpointError for anything that is not a whole weights file.
    """
    require_file(path, what)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    tensors = _state_dict_of(read_pickle(path))
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors: is it a checkpoint?")
    return WeightsFile({key.removeprefix("module."): value for key, value in tensors.items()}, {})


def read_pickle(path: Path) -> Any:
    """The object in a torch file, under `weights_only`. Raises CheckpointError."""
    # torch types the list as callables; (class, full name) pairs are documented and needed to allow a name that is not
    # installed.
    allowed: list[Any] = [argparse.Namespace, (LightningCallbackStub, _LIGHTNING_CALLBACK)]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        head = path.open("rb").read(64).lstrip().lower()
        if head.startswith((b"<!doctype", b"<html")):
            cause = "it is an HTML page: the download was answered with an error or a login page"
        elif not head:
            cause = "the file is empty"
        else:
            cause = str(error).splitlines()[0]
        raise CheckpointError(f"cannot read {path}: {cause}. Fetch or save the file again.") from error


def write_weights(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically. Raises StorageError."""
    payload = serialize({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, metadata)
    with atomic_write(path) as file:
        file.write(payload)


def _read_safetensors(path: Path) -> WeightsFile:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return WeightsFile({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}. Fetch or save the file again.") from error


def _state_dict_of(content: Any) -> dict[str, Tensor]:
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        return {}
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def check_keys(path: Path | str, expected: dict[str, Tensor], found: dict[str, Tensor], advice: str) -> None:
    """Raises CheckpointError with the missing, unexpected and mis-shaped keys, unless both sides agree exactly."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    shapes = [
        f"{key}: file {tuple(found[key].shape)}, model {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & found.keys())
        if expected[key].shape != found[key].shape
    ]
    if not (missing or unexpected or shapes):
        return
    parts = [
        f"  {name} ({len(keys)}): {', '.join(keys[:12])}{', ...' if len(keys) > 12 else ''}"
        for name, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    raise CheckpointError("\n".join([f"the keys of {path} do not fit the model.", *parts, f"  {advice}"]))
