"""Reading and writing weight files. Nothing that a file says is ever executed, and what is damaged is never loaded.

`.safetensors` is what we write. Foreign `.pth`, `.pt` and `.ckpt` files are read with torch's `weights_only` and
exactly two further names allowed: the `argparse.Namespace` of MAE's checkpoints, and a stub for the callback of
Lightning's.
"""

import argparse
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from safetensors.torch import save as serialize
from torch import Tensor

from mae_dat.config.errors import CheckpointError, MissingInputError
from mae_dat.storage.files import atomic_write, require_file, sha256_of

WEIGHTS_FILE = "model.safetensors"  # the exported model of a run, in its output folder
# Where MAE, timm and Lightning keep the weights in a checkpoint; an average goes before what it averages, as in timm.
_AVERAGE_KEYS = ("state_dict_ema", "model_ema", "ema")
_STATE_KEYS = (*_AVERAGE_KEYS, "model", "state_dict")
_DEEPEST = 4  # levels of such keys that are looked into: a file can nest them without end
_PREFIXES = ("module.", "net.", "model.", "1.")  # DDP; Classifier; a wrapper; easyrobust's (normalisation, model)
_STATISTICS = ("0.mean", "0.std")  # of easyrobust's pair of normalisation and model
_ROWS = 6  # of each kind in a table of keys
_SUFFIXES = {".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors"}
_WEB_PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)
_LIGHTNING_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class LightningCallbackStub:
    """Stands for `ModelCheckpoint` as a dictionary key in Lightning's files; carries no behaviour."""


PixelStatistics = tuple[tuple[float, ...], tuple[float, ...]]


class WeightsFile(NamedTuple):
    """Tensors by bare key, a safetensors file's string metadata, where they are from, and what was taken off.

    `statistics` are the mean and deviation of pixels in [0, 1], one value a channel, where the file holds them.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    source: str = "the given weights"
    wrappers: tuple[str, ...] = ()
    statistics: PixelStatistics | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a file of ours says about its model; empty for a foreign one. Raises CheckpointError."""
        try:
            facts = json.loads(self.metadata.get("mae_dat", "{}"))
        except ValueError as error:
            raise CheckpointError(f"{self.source}: its description is damaged ({error}).") from error
        return facts if isinstance(facts, dict) else {}


def read_weights(path: str | Path, what: str = "weights") -> WeightsFile:
    """The weights in a `.safetensors` or torch file, on the CPU, under bare keys (see `extract_weights`).

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
    return extract_weights(content, str(path), metadata)


def read_pickle(path: Path) -> Any:
    """The object in a torch file, under `weights_only`. Raises CheckpointError."""
    _refuse_other_files(path)
    _refuse_odd_archives(path)
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


def extract_weights(content: Any, source: str, metadata: dict[str, str] | None = None) -> WeightsFile:
    """The tensors of a state dict, or of a checkpoint that holds one under `model`, `state_dict` or as an average.

    What wrappers add is taken off: prefixes that all keys share, `_orig_mod.` anywhere, statistics of a normalisation.
    Raises CheckpointError, naming `source` and what it holds, where there are no tensors.
    """
    wrappers: list[str] = []
    for _ in range(_DEEPEST):
        inner = next((key for key in _STATE_KEYS if isinstance(content, Mapping) and _holds(content, key)), None)
        if inner is None:
            break
        wrappers += [f"the average ({inner})"] if inner in _AVERAGE_KEYS else []
        content = content[inner]
    found = [str(key) for key in content] if isinstance(content, Mapping) else [type(content).__name__]
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
        raise CheckpointError(f"{source} holds no weights (it holds {listing(found)}); give a model's checkpoint.")
    file = WeightsFile(tensors, metadata or {}, source, tuple(wrappers))
    return file._replace(statistics=_statistics(statistics, file.facts))


def _holds(content: Mapping[Any, Any], key: str, deepest: int = _DEEPEST) -> bool:
    """Whether `content[key]` is a state dict or holds one: an `ema` may as well be a rate."""
    inner = content.get(key)
    return isinstance(inner, Mapping) and (
        any(isinstance(value, Tensor) for value in inner.values())
        or (deepest > 1 and any(_holds(inner, below, deepest - 1) for below in _STATE_KEYS))
    )


def _statistics(found: Mapping[str, Tensor], facts: Mapping[str, Any]) -> PixelStatistics | None:
    values = [found[key].flatten().tolist() for key in _STATISTICS if key in found]
    values = values or [facts[key] for key in ("mean", "std") if key in facts]
    return (tuple(values[0]), tuple(values[1])) if len(values) == 2 else None


def check_keys(source: Path | str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor], advice: str) -> None:
    """Raises CheckpointError with a table of missing, unexpected and mis-shaped keys, unless both sides agree exactly.

    `source` names the found tensors, `advice` says what to give instead.
    """
    differences = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape": [key for key in expected if key in found and found[key].shape != expected[key].shape],
    }
    if not any(differences.values()):
        return
    rows = [("key", "in the file", "expected", "")]
    for what, keys in differences.items():
        rows += [(key, _shape(found.get(key)), _shape(expected.get(key)), what) for key in keys[:_ROWS]]
        rows += [(f"and {len(keys) - _ROWS} more", "", "", what)] if len(keys) > _ROWS else []
    counts = ", ".join(f"{len(keys)} {what}" for what, keys in differences.items() if keys)
    raise CheckpointError(f"{source} does not fit the model ({counts}):\n{_table(rows)}\nFix: {advice}.")


def _shape(tensor: Tensor | None) -> str:
    return "-" if tensor is None else " x ".join(map(str, tensor.shape)) or "scalar"


def _table(rows: Sequence[Iterable[str]]) -> str:
    """Lines of left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


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


def _refuse_odd_archives(path: Path) -> None:
    """torch compresses nothing and writes no name twice: what does would fill the memory, or be read in two ways."""
    try:
        with zipfile.ZipFile(path) as archive:
            records, size = archive.infolist(), path.stat().st_size
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # another format, or damaged: torch's reader says what is wrong
    if len({record.filename for record in records}) < len(records):
        raise _unreadable(path, ValueError("it holds two records of the same name"))
    if sum(record.file_size for record in records) > size:
        raise _unreadable(path, ValueError("its records are compressed, as torch writes none"))


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    cause = str(error).strip().split("\n")[0] or type(error).__name__
    if "Weights only load failed" in cause:  # torch goes on with advice to load it all the same
        cause = "it holds more than tensors, numbers and text, or is damaged, and nothing else is loaded"
    return CheckpointError(f"{path} cannot be read as weights: {cause}. Fetch or write the file again.")


def verify_card(path: Path) -> None:
    """Compare a file with the `sha256` in its card, the JSON of the same name, if there is one.

    Raises CheckpointError if they differ, or the card is damaged.
    """
    card = path.with_suffix(".json")
    if not card.is_file():
        return
    try:
        facts = json.loads(card.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the card {card} of {path.name} is damaged ({error}): restore or remove it.") from error
    expected = facts.get("sha256") if isinstance(facts, dict) else None
    if expected and sha256_of(path) != expected:
        raise CheckpointError(
            f"{path} is damaged: its sha256 is not the one in {card.name}. Install the package or copy the file again."
        )
