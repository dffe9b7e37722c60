"""Read and write weight files. Code in a file is never executed, and damaged files are never loaded.

This package writes `.safetensors`. `.pth`, `.pt` and `.ckpt` files are read with torch's `weights_only`, which allows
only two more classes here: `argparse.Namespace` for MAE's checkpoints, and a stub for a callback in Lightning's.
"""

import argparse
import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor

from mae_dat.config.errors import CheckpointError, MissingInputError
from mae_dat.storage.files import atomic_write, is_web_page, require_file, sha256_of

WEIGHTS_FILE = "model.safetensors"  # the exported model of a run, in its output folder
# Where MAE, timm and Lightning store the weights in a checkpoint; averaged weights take precedence, as in timm.
_AVERAGE_KEYS = ("state_dict_ema", "model_ema", "ema")
_STATE_KEYS = (*_AVERAGE_KEYS, "model", "state_dict")
_MAX_DEPTH = 4  # levels of such keys that are searched, because a hostile file can nest any number of them
_PREFIXES = ("module.", "net.", "model.", "1.")  # DDP; Classifier; a wrapper; easyrobust's (normalization, model)
_STATISTICS = ("0.mean", "0.std")  # of easyrobust's pair of normalization and model
_MAX_ROWS = 6  # of each kind in a table of keys
_SUFFIXES = {".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors"}
_LIGHTNING_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class LightningCallbackStub:
    """Replaces `ModelCheckpoint` as a dictionary key in Lightning's files; does nothing."""


PixelStatistics = tuple[tuple[float, ...], tuple[float, ...]]


class WeightsFile(NamedTuple):
    """Tensors by key without prefixes, the string metadata of a safetensors file, the source, and removed wrappers.

    `statistics` are the mean and standard deviation of pixels in [0, 1], one value per channel, if the file has them.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    source: str = "the given weights"
    wrappers: tuple[str, ...] = ()
    statistics: PixelStatistics | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The description of the model in a file of this package; empty for other files. Raises CheckpointError."""
        try:
            facts = json.loads(self.metadata.get("mae_dat", "{}"))
        except ValueError as error:
            raise CheckpointError(f"{self.source}: its description is damaged ({error}).") from error
        return facts if isinstance(facts, dict) else {}


def read_weights(path: str | Path, what: str = "weights") -> WeightsFile:
    """Read the weights of a `.safetensors` or torch file to the CPU, with keys as from `extract_weights`.

    `what` names the purpose in messages. Raises MissingInputError for a missing file and CheckpointError for any file
    that is not a complete weights file.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in _SUFFIXES)
        raise MissingInputError(
            f"{what}: {path} is a folder; give a weights file in it ({listing(files) or 'there is none'})."
        )
    require_file(path, what)
    content, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else (read_pickle(path), {})
    return extract_weights(content, str(path), metadata)


def read_pickle(path: Path) -> Any:
    """Read the object in a torch file with `weights_only`. Raises CheckpointError."""
    _reject_other_files(path)
    _reject_unusual_archives(path)
    # (class, full name) pairs, which torch documents but does not type, allow the name of a class not installed.
    allowed: list[Any] = [argparse.Namespace, (LightningCallbackStub, _LIGHTNING_CALLBACK)]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any layer of the reader
        raise _unreadable(path, error) from error


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """Write a safetensors file atomically and return its sha256; equal weights and metadata give identical files.

    A file that already has this content stays as it is. Raises StorageError.
    """
    parts = _safetensors_parts(tensors, metadata)
    sha256 = _sha256_of_parts(parts)
    if not path.is_file() or sha256_of(path) != sha256:
        with atomic_write(path, sum(len(part) for part in parts)) as file:
            file.writelines(parts)
    return sha256


def _sha256_of_parts(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _safetensors_parts(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """Return the content of a safetensors file, in parts to avoid a copy of the tensors."""
    payload = serialize({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, metadata)
    start = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8:start])
    # safetensors writes the metadata in an order that differs from call to call, and so does the hash of the file.
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, memoryview(payload)[start:]]


def extract_weights(content: Any, source: str, metadata: dict[str, str] | None = None) -> WeightsFile:
    """Return the tensors of a state dict, or of a checkpoint that has one under `model`, `state_dict` or as an average.

    Traces of wrappers are removed: prefixes that all keys share, `_orig_mod.` anywhere, the statistics of a
    normalization. Raises CheckpointError with `source` and its content if there are no tensors.
    """
    wrappers: list[str] = []
    for _ in range(_MAX_DEPTH):
        key = next((key for key in _STATE_KEYS if isinstance(content, Mapping) and _has_state_dict(content, key)), None)
        if key is None:
            break
        wrappers += [f"the average ({key})"] if key in _AVERAGE_KEYS else []
        content = content[key]
    names = [str(key) for key in content] if isinstance(content, Mapping) else [type(content).__name__]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if any("_orig_mod." in key for key in tensors):  # torch.compile wraps modules at any depth
        tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
        wrappers.append("torch.compile (_orig_mod.)")
    statistics: dict[str, Tensor] = {}
    while tensors:
        statistics |= {key: tensors.pop(key) for key in _STATISTICS if key in tensors}
        prefix = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None or not tensors:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        wrappers += ["DDP (module.)"] if prefix == "module." else []
    if not tensors:
        raise CheckpointError(f"{source} contains no weights, only {listing(names)}: use the checkpoint of a model.")
    file = WeightsFile(tensors, metadata or {}, source, tuple(wrappers))
    return file._replace(statistics=_statistics(statistics, file.facts))


def _has_state_dict(content: Mapping[Any, Any], key: str, depth: int = _MAX_DEPTH) -> bool:
    """Return whether `content[key]` is or contains a state dict: `ema` may also be a number."""
    inner = content.get(key)
    return isinstance(inner, Mapping) and (
        any(isinstance(value, Tensor) for value in inner.values())
        or (depth > 1 and any(_has_state_dict(inner, inner_key, depth - 1) for inner_key in _STATE_KEYS))
    )


def _statistics(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> PixelStatistics | None:
    values = [tensors[key].flatten().tolist() for key in _STATISTICS if key in tensors]
    values = values or [facts[key] for key in ("mean", "std") if key in facts]
    return (tuple(values[0]), tuple(values[1])) if len(values) == 2 else None


def check_keys(source: Path | str, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], advice: str) -> None:
    """Raise CheckpointError with a table of missing, unexpected and mis-shaped keys, unless keys and shapes are equal.

    `source` names the file of `tensors` in the message, `advice` is its last sentence.
    """
    differences = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
        "of another shape": [key for key in expected if key in tensors and tensors[key].shape != expected[key].shape],
    }
    if not any(differences.values()):
        return
    rows = [("key", "in the file", "expected", "")]
    for what, keys in differences.items():
        rows += [(key, _shape(tensors.get(key)), _shape(expected.get(key)), what) for key in keys[:_MAX_ROWS]]
        rows += [(f"and {len(keys) - _MAX_ROWS} more", "", "", what)] if len(keys) > _MAX_ROWS else []
    counts = ", ".join(f"{len(keys)} {what}" for what, keys in differences.items() if keys)
    raise CheckpointError(f"{source} does not fit the model ({counts}):\n{_table(rows)}\nFix: {advice}.")


def _shape(tensor: Tensor | None) -> str:
    return "-" if tensor is None else " x ".join(map(str, tensor.shape)) or "scalar"


def _table(rows: Sequence[Iterable[str]]) -> str:
    """Return rows as lines with left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def listing(names: Sequence[str], most: int = 12) -> str:
    """Return the first `most` names, and the number of the others, in words."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    _reject_other_files(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # as above
        raise _unreadable(path, error) from error


def _reject_other_files(path: Path) -> None:
    """Raise a CheckpointError with the cause for the files that failed downloads leave behind."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not start:
        raise CheckpointError(f"{path} is empty; download or write the file again.")
    if is_web_page(start):
        raise CheckpointError(f"{path} is a web page, not weights: the download failed; repeat it.")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights themselves; run `git lfs pull`.")


def _reject_unusual_archives(path: Path) -> None:
    """Raise CheckpointError for compressed records, which could fill the memory, and for two records with the same
    name, which are ambiguous. torch writes neither."""
    try:
        with zipfile.ZipFile(path) as archive:
            records, size = archive.infolist(), path.stat().st_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # another format, or damaged: torch's reader reports the cause
    if len({record.filename for record in records}) < len(records):
        raise _unreadable(path, ValueError("it contains two records with the same name"))
    if sum(record.file_size for record in records) > size:
        raise _unreadable(path, ValueError("its records are compressed, which torch never does"))


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    cause = str(error).strip().split("\n")[0] or type(error).__name__
    if "Weights only load failed" in cause:  # torch then advises to load it without this protection
        cause = "it is damaged, or contains objects other than tensors, numbers and text, which are never loaded"
    return CheckpointError(f"{path} cannot be read as weights: {cause}. Download or write the file again.")


def verify_card(path: Path) -> str:
    """Compare a file with the `sha256` in its card, the JSON of the same name, if there is one.

    Returns the sha256 of the file, or an empty text if nothing was compared. Raises CheckpointError if they differ, or
    the card is damaged.
    """
    card = path.with_suffix(".json")
    if not card.is_file():
        return ""
    try:
        facts = json.loads(card.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the card {card} of {path.name} is damaged ({error}): restore or remove it.") from error
    expected = facts.get("sha256") if isinstance(facts, dict) else None
    if not expected:
        return ""
    if (actual := sha256_of(path)) != expected:
        raise CheckpointError(
            f"{path} is damaged: its sha256 is not the one in {card.name}. Install the package or copy the file again."
        )
    return actual
