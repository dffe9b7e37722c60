"""The exported weights of a run and their card."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mae_dat.runtime.sharding import full_state_dict
from mae_dat.storage.files import atomic_write, sha256_of
from mae_dat.storage.weight_files import WEIGHTS_FILE, write_weights
from mae_dat.training.context import RunContext

logger = logging.getLogger(__name__)


def export_model(tensors: Mapping[str, Tensor], context: RunContext, facts: dict[str, Any]) -> None:
    """Write `model.safetensors`, with `facts` that rebuild the model inside, and its card with the sha256.

    Nothing is written when the file there is of the same facts and steps: a rerun of a complete run changes nothing.
    """
    tensors = full_state_dict(tensors)
    path = context.output / WEIGHTS_FILE
    card = path.with_suffix(".json")
    if not context.world.main:
        return
    if path.is_file() and card.is_file() and facts.items() <= json.loads(card.read_text()).items():
        return
    write_weights(path, tensors, {"mae_dat": json.dumps(facts)})
    with atomic_write(card) as file:
        file.write(json.dumps({"sha256": sha256_of(path), **facts}, indent=1).encode() + b"\n")
    logger.info("wrote %s", path)
