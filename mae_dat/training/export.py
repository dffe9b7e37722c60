"""The exported weights of a run and their card, which stay in step with the checkpoints."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_dat.config.errors import CheckpointError
from mae_dat.runtime.sharding import full_state_dict
from mae_dat.storage.files import atomic_write, sha256_of
from mae_dat.storage.json_files import read_json
from mae_dat.storage.weight_files import WEIGHTS_FILE, Card, write_weights
from mae_dat.training.context import RunContext
from mae_dat.training.resume import SettingChange

logger = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.safetensors"
"""The exported tokenizer of a run, in its output folder."""
_NAME_DIGITS = 8


def export_model(
    tensors: Mapping[str, Tensor], context: RunContext, facts: dict[str, Any], changes: Sequence[SettingChange] = ()
) -> None:
    """Write `model.safetensors`, with `facts` that rebuild the model inside, and its card with the sha256.

    The card also has the `changes` of settings within the run, if there were any.

    A rerun of a complete run changes nothing, unless the file has other content than the checkpoint: then it is
    reported and written again. Raises StorageError.
    """
    tensors = full_state_dict(tensors)
    changed = {"changes": list(changes)} if changes else {}
    if context.world.main:
        write_export(context.output / WEIGHTS_FILE, tensors, {"mae_dat": json.dumps(facts)}, facts | changed)


def write_export(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], facts: Mapping[str, Any]) -> None:
    """Write a safetensors file and its card, the JSON of the same name with the file's sha256 and `facts`.

    Both stay as they are where they have this content. Warns if the file was changed since its card was written.
    Raises StorageError.
    """
    recorded, before = _recorded_sha256(path), sha256_of(path) if path.is_file() else ""
    sha256 = write_weights(path, tensors, metadata)
    if recorded and before and before != recorded:
        logger.warning(
            "%s was damaged or changed: its sha256 was not the one in its card. The file now has the weights of the "
            "training%s.",
            path,
            " again" if sha256 == recorded else "",
        )
    _write_card(path, {"sha256": sha256, **facts})
    if sha256 != before:
        logger.info("wrote %s", path)


def _write_card(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the card of a weights file, unless it has these facts already. Raises StorageError."""
    card, text = path.with_suffix(".json"), json.dumps(facts, indent=1).encode() + b"\n"
    if not card.is_file() or card.read_bytes() != text:
        with atomic_write(card, len(text)) as file:
            file.write(text)


def set_aside_exports(output: Path) -> None:
    """Rename the exported weights of an earlier training in the output folder, when a training starts there.

    The folder's weights are then those of its newest checkpoint until the new training is complete. The new name
    contains the first digits of the file's sha256, so no file is overwritten.
    """
    for name in (WEIGHTS_FILE, TOKENIZER_FILE):
        path = output / name
        if not path.is_file():
            continue
        aside = path.with_stem(f"{path.stem}-{sha256_of(path)[:_NAME_DIGITS]}")
        for old, new in ((path, aside), (path.with_suffix(".json"), aside.with_suffix(".json"))):
            if old.is_file():
                old.replace(new)
        logger.warning("%s is of an earlier training: renamed to %s.", path, aside.name)


def _recorded_sha256(path: Path) -> str:
    """Return the sha256 in a file's card; empty if there is none, or the card is damaged."""
    try:
        card: Card = read_json(path.with_suffix(".json"), Card, "a card")
    except CheckpointError:
        return ""
    return card.get("sha256", "")
