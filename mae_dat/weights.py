"""Reading and writing weight files. Nothing that a file says is ever executed, and what is damaged is never loaded.

`.safetensors` is what we write. Foreign `.pth`, `.pt` and `.ckpt` files are read with torch's `weights_only` and
exactly two further names allowed: the `argparse.Namespace` of MAE's checkpoints, and a stub for the callback of
Lightning's.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor

from mae_dat.errors import CheckpointError, MissingInputError
from mae_dat.files import atomic_write, require_file

_STATE_KEYS = ("model", "state_dict")  # where MAE, timm and Lightning keep the weights in a checkpoint
_PREFIXES = ("module.", "net.", "model.", "1.")  # DDP; Classifier; a wrapper; easyrobust's (normalisation, model)
_NORMALIZATION_KEYS = {"0.mean", "0.std"}
_SUFFIXES = {".pth", ".pt", ".ckpt", ".safetensors"}
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_LIGHTNING_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class LightningCallbackStub:
    """Stands for `ModelCheckpoint` as a dictionary key in Lightning's files; carries no behaviour."""


class WeightsFile(NamedTuple):
    """Tensors by key and, for safetensors, the file's string metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_weights(path: str | Path, what: str = "weights") -> WeightsFile:
    """The weights in a `.safetensors` or torch file, on the CPU, under bare keys (see `bare_tensors`).

    `what` names the purpose in messages. Raises MissingInputError for no such file and CheckpointError for anything
    that is not a whole weights file.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)
        raise MissingInputError(
            f"{what}: {path} is a folder; name a weights file in it ({listing(files) or 'there is none'})."
        )
    require_file(path, what)
    content, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (read_pickle(path), {})
    return WeightsFile(bare_tensors(content, str(path)), metadata)


def read_pickle(path: Path) -> Any:
    """The object in a torch file, under `weights_only`. Raises CheckpointError."""
    _refuse_other_files(path)
    # torch types the list as callables; (class, full name) pairs are documented and needed to allow a name that is not
    # installed.
    allowed: list[Any] = [argparse.Namespace, (LightningCallbackStub, _LIGHTNING_CALLBACK)]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any of the reader's layers
        raise _unreadable(path, error) from error


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically: equal weights and metadata make equal files. Raises StorageError."""
    payload = serialize({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, metadata)
    start = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8:start])
    # safetensors writes the metadata in an order that changes from call to call, and with it the file's hash.
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(payload)[start:])


def bare_tensors(content: Any, source: str) -> dict[str, Tensor]:
    """The tensors of a state dict, or of a checkpoint that holds one under `model` or `state_dict`.

    What wrappers add is taken off: prefixes that all keys share, `_orig_mod.` anywhere, statistics of a normalisation.
    Raises CheckpointError, naming `source` and what it holds, where there are no tensors.
    """
    while isinstance(content, Mapping) and (
        inner := next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), None)
    ):
        content = inner
    found = [str(key) for key in content] if isinstance(content, Mapping) else [type(content).__name__]
    items = content.items() if isinstance(content, Mapping) else ()
    # torch.compile wraps modules at any depth.
    tensors = {str(key).replace("_orig_mod.", ""): value for key, value in items if isinstance(value, Tensor)}
    tensors = {key: value for key, value in tensors.items() if key not in _NORMALIZATION_KEYS}
    if not tensors:
        raise CheckpointError(f"{source} holds no weights (it holds {listing(found)}); give a model's checkpoint.")
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def check_keys(source: Path | str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], advice: str) -> None:
    """Raises CheckpointError with the missing, unexpected and mis-shaped keys, unless both sides agree exactly.

    `source` names the found tensors, `advice` says what to give instead.
    """
    shapes = [
        f"{key} {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    differences = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": shapes,
    }
    if problems := [f"{kind}: {listing(keys)}" for kind, keys in differences.items() if keys]:
        raise CheckpointError(f"{source} does not fit the model; {'; '.join(problems)}. Fix: {advice}.")


def listing(names: Sequence[str], most: int = 12) -> str:
    """The first `most` names, and how many more there are."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _refuse_other_files(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _refuse_other_files(path: Path) -> None:
    """What a failed download leaves behind gets its own message."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not start:
        raise CheckpointError(f"{path} is empty; fetch or write the file again.")
    if _WEB_PAGE.match(start):
        raise CheckpointError(f"{path} is a web page, not weights; the download failed: fetch the file again.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull`.")


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    cause = str(error).strip().split("\n")[0] or type(error).__name__
    return CheckpointError(f"{path} cannot be read as weights: {cause}. Fetch or write the file again.")
