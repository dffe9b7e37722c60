"""Read verified tensors, and the facts recorded with them, from a name, file or folder.

Evaluation, fine-tuning, conversion and torch.hub all read models here.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mae_dat.config.errors import CheckpointError, MissingInputError
from mae_dat.config.flags import expand_home
from mae_dat.models.classifier import fused_head
from mae_dat.models.split_norms import main_norms
from mae_dat.models.weights.formats import ModelFile, recognize
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.storage.released import local_path, released_weights
from mae_dat.storage.timm_config import CONFIG_FILE, hub_weights, read_timm_config
from mae_dat.storage.weight_files import (
    WEIGHTS_FILE,
    WeightsFile,
    extract_weights,
    read_weights,
    recorded_statistics,
    verify_card,
)

ModelSource = str | Path | Mapping[str, Any] | ModelFile
"""A weights file, an output folder, the name of released weights, a state dict, or a `ModelFile` read from these."""

_WORD_HEAD = "decoder_words."


def read_model_file(source: ModelSource) -> ModelFile:
    """Read weights, verify them, recognize their format and convert their keys to those of MAE and timm.

    An output folder provides its `model.safetensors`, or the model in its newest checkpoint. Facts are those recorded
    with the weights, else those of the registry of released weights, else those of timm's `config.json` next to them.
    AdvProp's auxiliary norms and a pretraining's word head are dropped; the BatchNorm of a linear probe is fused into
    its head.

    Raises MissingInputError, CheckpointError (also for a tokenizer), DownloadError.
    """
    if isinstance(source, ModelFile):
        return source
    facts: Mapping[str, Any] | None = None
    is_ours = is_timms = False
    released = digest = ""
    if isinstance(source, Mapping):
        file = extract_weights(source, "the given weights")
    else:
        path = Path(expand_home(source))
        entry = None if path.exists() else released_weights().get(str(path))
        released = entry.name if entry else ""
        path = local_path(path)
        path = (hub_weights(path) if path.is_dir() else None) or path
        if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
            file, facts = _read_newest_checkpoint(path)
            is_ours = True
        else:
            path = path / WEIGHTS_FILE if path.is_dir() else path
            digest = verify_card(path)
            file = read_weights(path)
            facts = file.facts or (entry.facts if entry else {})
            if not facts and (facts := read_timm_config(path)):
                file = file._replace(statistics=file.statistics or recorded_statistics(facts))
                is_timms = True
    # The word head is used only by the pretraining with its tokenizer; models loaded from the file have none.
    tensors = {key: tensor for key, tensor in file.tensors.items() if not key.startswith(_WORD_HEAD)}
    model_file = recognize(file._replace(tensors=fused_head(main_norms(tensors))), facts, is_ours)
    if model_file.kind == "tokenizer":
        raise CheckpointError(
            f"{file.source} is a tokenizer ({model_file.format}): use it with --tokenizer or mae_dat.load_tokenizer."
        )
    if is_timms:
        model_file = replace(model_file, format=f"timm's {CONFIG_FILE}, {model_file.format}", is_timms=True)
    return replace(model_file, released=released, sha256=digest)


def _read_newest_checkpoint(folder: Path) -> tuple[WeightsFile, dict[str, Any]]:
    """Read the model of a run that has not exported one yet, and the run's settings."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise MissingInputError(f"{folder} contains neither {WEIGHTS_FILE} nor a valid checkpoint-*.pth.")
    weights = extract_weights(checkpoint.load(), str(checkpoint.path), ours=True)
    return weights, dict(checkpoint.manifest.get("settings", {}))


@contextlib.contextmanager
def errors_name_flag(flag: str | None) -> Iterator[None]:
    """Prefix the message of a CheckpointError with the flag that named the file, such as `--finetune`."""
    try:
        yield
    except CheckpointError as error:
        if flag is None:
            raise
        raise CheckpointError(f"{flag}: {error}") from error
