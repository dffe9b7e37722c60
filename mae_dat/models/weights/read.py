"""From a name, file or folder to verified tensors and the facts recorded with them.

Every model takes this way: opened for evaluation, loaded to start fine-tuning, converted, or loaded by torch.hub.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mae_dat.config.errors import CheckpointError, MissingInputError
from mae_dat.models.classifier import fused_head
from mae_dat.models.split_norms import main_norms
from mae_dat.models.weights.formats import ModelFile, recognize
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.storage.released import local_path, released_weights
from mae_dat.storage.weight_files import WEIGHTS_FILE, WeightsFile, extract_weights, read_weights, verify_card

ModelSource = str | Path | Mapping[str, Any] | ModelFile
"""A weights file, an output folder, the name of released weights, a state dict, or what was read from one of them."""

_WORD_HEAD = "decoder_words."


def read_model_file(source: ModelSource) -> ModelFile:
    """Read weights, verify them, recognize their format and convert their keys to those of MAE and timm.

    An output folder provides its `model.safetensors`, or the model in its newest checkpoint. Facts are those recorded
    with the weights, else those of the registry of released weights. AdvProp's auxiliary norms and a pretraining's word
    head are dropped; the BatchNorm of a linear probe is fused into its head.

    Raises MissingInputError, CheckpointError (also for a tokenizer), DownloadError.
    """
    if isinstance(source, ModelFile):
        return source
    facts: Mapping[str, Any] | None = None
    is_ours = False
    if isinstance(source, Mapping):
        file = extract_weights(source, "the given weights")
    else:
        path = Path(source)
        entry = None if path.exists() else released_weights().get(str(path))
        path = local_path(path)
        if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
            file, facts = _read_newest_checkpoint(path)
            is_ours = True
        else:
            path = path / WEIGHTS_FILE if path.is_dir() else path
            verify_card(path)
            file = read_weights(path)
            facts = file.facts or (entry.facts if entry else {})
    # The word head belongs to a pretraining and its tokenizer; nothing that is loaded from it has one.
    tensors = {key: tensor for key, tensor in file.tensors.items() if not key.startswith(_WORD_HEAD)}
    model_file = recognize(file._replace(tensors=fused_head(main_norms(tensors))), facts, is_ours)
    if model_file.kind == "tokenizer":
        raise CheckpointError(
            f"{file.source} is a tokenizer ({model_file.format}): give it as --tokenizer, "
            "or open it with mae_dat.load_tokenizer."
        )
    return model_file


def _read_newest_checkpoint(folder: Path) -> tuple[WeightsFile, dict[str, Any]]:
    """Read the model of a run that has not exported one yet, and the run's settings."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None:
        raise MissingInputError(f"{folder} holds neither {WEIGHTS_FILE} nor a valid checkpoint-*.pth.")
    weights = extract_weights(checkpoint.load(), str(checkpoint.path))
    return weights, dict(checkpoint.manifest.get("settings", {}))


@contextlib.contextmanager
def errors_name_flag(flag: str | None) -> Iterator[None]:
    """Put the flag that named a file, such as `--finetune`, in front of the message of a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        if flag is None:
            raise
        raise CheckpointError(f"{flag}: {error}") from error
