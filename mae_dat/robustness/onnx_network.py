"""Networks in ONNX files, run by onnxruntime. They have no gradients."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dat.config.errors import CheckpointError, MissingInputError
from mae_dat.config.extras import require_extra
from mae_dat.models.modes import Network
from mae_dat.robustness.network import DEFAULT_SIZE, EvalOptions, EvaluatedNetwork, create_evaluated_network
from mae_dat.robustness.scores.results import ModelFacts
from mae_dat.storage.files import sha256_of
from mae_dat.storage.released import local_path


def open_onnx(path: Path, name: str, options: EvalOptions) -> EvaluatedNetwork:
    """Open an ONNX file with one input, float (B, 3, H, W) in [0, 1], as the network `name`.

    Raises MissingInputError (no such file, or onnx or onnxruntime is not installed), CheckpointError (not such a
    graph), ConfigError (a size it does not take).
    """
    require_extra("export", f"evaluating {path}")
    import onnx
    import onnxruntime

    path = local_path(path)
    if not path.is_file():
        raise MissingInputError(f"--checkpoint: no such file: {path}")
    try:
        session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
        graph = onnx.load(path, load_external_data=False)
    except Exception as error:  # onnxruntime raises a type of its own for each fault
        raise CheckpointError(f"{path} cannot be run as ONNX: {str(error).splitlines()[0]}") from error
    (image_input, *other_inputs) = session.get_inputs()
    if other_inputs or len(image_input.shape) != 4 or image_input.type != "tensor(float)":
        raise CheckpointError(f"{path} must take one input, float (B, 3, H, W) in [0, 1], not {image_input.shape}.")
    sides = [side for side in image_input.shape[-2:] if isinstance(side, int)]
    facts: ModelFacts = {
        "title": name,
        "source": str(path),
        "sha256": onnx_sha256(path, graph),
        "architecture": "ONNX graph",
        "parameters": sum(int(torch.tensor(list(weight.dims)).prod()) for weight in graph.graph.initializer),
        "size": list(options.size or (sides if len(sides) == 2 else DEFAULT_SIZE)),
        "normalization": "inside",
        "interpolation": options.interpolation or "bicubic",
        "precision": "fp32",
        "averaged": None,
    }
    network = create_evaluated_network(_session_network(session, image_input), facts, None, options)
    return replace(network, versions={"onnxruntime": onnxruntime.__version__})


def _session_network(session: Any, image_input: Any) -> Network:
    """Return a function from images (B, 3, H, W) to logits (B, K) that runs an onnxruntime session."""
    fixed_batch = image_input.shape[0] if isinstance(image_input.shape[0], int) else None

    def network(image: Tensor) -> Tensor:
        logits = []
        for part in image.detach().float().split(fixed_batch or len(image)):
            pixels = _padded_batch(part, fixed_batch).cpu().numpy()
            logits.append(session.run(None, {image_input.name: pixels})[0][: len(part)])
        return torch.from_numpy(np.concatenate(logits)).to(image.device)

    return network


def _padded_batch(image: Tensor, fixed_batch: int | None) -> Tensor:
    """Append black images to (B, C, H, W) up to a graph's fixed batch size."""
    return image if fixed_batch is None else F.pad(image, (0, 0, 0, 0, 0, 0, 0, fixed_batch - len(image)))


def onnx_sha256(path: Path, graph: Any) -> str:
    """Return the hash of an ONNX file and of the files beside it that hold its tensors; `graph` is the `ModelProto`."""
    external = sorted(set(_external_files(graph)))
    if not external:
        return sha256_of(path)
    lines = (f"{name} {sha256_of(path.parent / name)}\n" for name in (path.name, *external))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _external_files(message: Any) -> Iterator[str]:
    """Yield the names of all files that tensors within a protobuf message are stored in."""
    for field, value in message.ListFields():
        if field.name == "external_data":
            yield from (entry.value for entry in value if entry.key == "location")
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _external_files(part)
