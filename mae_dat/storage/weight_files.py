"""Read and write weight files. Code in a file is never executed, and damaged files are never loaded.

This package writes `.safetensors`; `torch_files.py` reads `.pth`, `.pt` and `.ckpt` files.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import safetensors
from safetensors.torch import save as serialize
from torch import Tensor

from mae_dat.config.errors import CheckpointError, MissingInputError, listing
from mae_dat.storage.files import atomic_write, require_file, sha256_of
from mae_dat.storage.json_files import ShapeError, parse_json, read_json
from mae_dat.storage.model_facts import check_facts
from mae_dat.storage.torch_files import read_pickle, reject_other_files, unreadable
from mae_dat.storage.unwrap import PixelStatistics, unwrap

WEIGHTS_FILE = "model.safetensors"  # the exported model of a run, in its output folder
_MAX_ROWS = 6  # of each kind in a table of keys
_SUFFIXES = {".pth", ".pt", ".ckpt", ".bin", ".tar", ".safetensors"}


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
            facts = parse_json(self.metadata.get("mae_dat", "{}"))
        except ShapeError as error:
            raise CheckpointError(f"{self.source}: its description is damaged ({error}).") from error
        return check_facts(facts, self.source)


class Card(TypedDict):
    """The JSON beside a weights file, which describes it."""

    sha256: NotRequired[str]


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


def extract_weights(
    content: Any, source: str, metadata: dict[str, str] | None = None, ours: bool = False
) -> WeightsFile:
    """Return the tensors of a state dict or of a checkpoint that contains one, without traces of wrappers (`unwrap`).

    `ours` marks the checkpoint of a run of this package; its exported files have metadata. Raises CheckpointError with
    `source` and its content if there are no tensors, or if some are NaN.
    """
    metadata = metadata or {}
    tensors, wrappers, statistics = unwrap(content, source, ours or "mae_dat" in metadata)
    file = WeightsFile(tensors, metadata, source, wrappers, statistics)
    return file if statistics else file._replace(statistics=recorded_statistics(file.facts))


def recorded_statistics(facts: Mapping[str, Any]) -> PixelStatistics | None:
    """Return the mean and deviation of pixels in [0, 1] among facts about a model; None if they lack one of them."""
    values = [facts[key] for key in ("mean", "std") if key in facts]
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
    raise CheckpointError(f"{source} does not fit the model ({counts}):\n{aligned_table(rows)}\nFix: {advice}.")


def _shape(tensor: Tensor | None) -> str:
    return "-" if tensor is None else " x ".join(map(str, tensor.shape)) or "scalar"


def aligned_table(rows: Sequence[Iterable[str]]) -> str:
    """Return rows as lines with left-aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    reject_other_files(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # as above
        raise unreadable(path, error) from error


def verify_card(path: Path) -> str:
    """Compare a file with the `sha256` in its card, the JSON of the same name, if there is one.

    Returns the sha256 of the file, or an empty text if nothing was compared. Raises CheckpointError if they differ, or
    the card is damaged.
    """
    card = path.with_suffix(".json")
    if not card.is_file():
        return ""
    try:
        expected = read_json(card, Card, "a card").get("sha256")
    except CheckpointError as error:
        raise CheckpointError(f"the card of {path.name} is damaged: {error} Restore or remove it.") from error
    if not expected:
        return ""
    if (actual := sha256_of(path)) != expected:
        raise CheckpointError(
            f"{path} is damaged: its sha256 is not the one in {card.name}. Install the package or copy the file again."
        )
    return actual
