"""Reference weights by rule: the outputs recorded in tests/golden need no weight files, only tensor keys and shapes."""

import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn


def rule_tensor(key: str, shape: Sequence[int]) -> Tensor:
    """Return the float32 tensor that the rule gives to `key`; ValueError for a shape without dimensions.

    r is standard normal, seeded by the CRC-32 of the key. More than one dimension: 0.05 r; `running_var`: 1 + 0.1 |r|;
    one-dimensional `weight`: 1 + 0.1 r; any other one-dimensional: 0.02 r.
    """
    if len(shape) == 0:
        raise ValueError(f"the rule says nothing about scalars: {key} (name it in skip)")
    r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(shape)).astype(np.float32)
    if len(shape) > 1:
        r = r * np.float32(0.05)
    elif key.endswith("running_var"):
        r = np.float32(1) + np.float32(0.1) * np.abs(r)
    elif key.endswith("weight"):
        r = np.float32(1) + np.float32(0.1) * r
    else:
        r = r * np.float32(0.02)
    return torch.from_numpy(r)


def fill_by_rule(source: nn.Module | Mapping[str, Tensor], skip: Collection[str] = ()) -> dict[str, Tensor]:
    """Return a new state dict: float tensors by the rule, integer ones and the keys in `skip` as they are (copied).

    The module itself is left alone: load the result with `load_state_dict`. ValueError for an unknown key in `skip`.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    if unknown := set(skip) - set(state):
        raise ValueError(f"skip names keys that do not exist: {sorted(unknown)}")
    return {
        key: value.detach().clone()
        if key in skip or not value.is_floating_point()
        else rule_tensor(key, value.shape).to(device=value.device, dtype=value.dtype)
        for key, value in state.items()
    }
