"""Fingerprints of a network: sha256 hashes of everything its predictions depend on.

Cached counts are stored under these hashes, so that the counts of one network are never reported for another.
"""

import functools
import hashlib
import inspect
import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

VERSIONED_PACKAGES = ("builtins", "torch", "torchvision", "timm", "mae_dat")
"""Packages whose source is not hashed, because every result already records their versions."""


def state_sha256(module: nn.Module) -> str:
    """Return the hash of the names and values of a module's state dict, whatever device its tensors are on."""
    digest = hashlib.sha256()
    state: Mapping[str, Tensor] = module.state_dict()
    for key, value in sorted(state.items()):
        digest.update(f"{key} ".encode() + _tensor_bytes(value))
    return digest.hexdigest()


def _tensor_bytes(value: Tensor) -> bytes:
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{value.dtype} {tuple(value.shape)}".encode() + raw.numpy().tobytes()


def module_sha256(module: nn.Module) -> str | None:
    """Return the hash of all tensors and attributes of a module and its submodules, and of the source code of their
    classes and functions.

    Return None where such a hash would be incomplete: for a module without tensors, or with an attribute that another
    process could not load again (a lambda, a class defined in a function, a session of another runtime). Code that a
    method calls outside its class is not hashed.
    """
    content = io.BytesIO()
    pickler = _FingerprintPickler(content)
    try:
        pickler.dump(module)
    except Exception:  # each object that cannot be pickled raises an error of its own type
        return None
    return hashlib.sha256(content.getvalue()).hexdigest() if pickler.tensors else None


class _FingerprintPickler(pickle.Pickler):
    """Pickles a hash in place of each tensor, the source in place of code, and sorted members in place of a set.

    Pickle is used because it already visits every attribute of every submodule; the result is hashed, never loaded.
    """

    tensors = 0

    def persistent_id(self, value: Any) -> Any:
        """Return what is pickled in place of a value, or None to pickle the value itself."""
        if isinstance(value, Tensor):
            self.tensors += 1
            return hashlib.sha256(_tensor_bytes(value)).hexdigest()
        if isinstance(value, set | frozenset):
            return sorted(map(repr, value))
        is_code = inspect.isfunction(value) or (isinstance(value, type) and issubclass(value, nn.Module))
        if is_code and "<" not in value.__qualname__:  # lambdas and local functions close over values
            return f"{value.__module__}.{value.__qualname__}", _sources(value)
        return None


@functools.cache
def _sources(code: Any) -> list[str]:
    """Return the source of a function, or of a class and its base classes.

    Raises OSError or TypeError where there is no source.
    """
    definitions = code.__mro__ if isinstance(code, type) else [code]
    return [
        inspect.getsource(definition)
        for definition in definitions
        if definition.__module__.split(".")[0] not in VERSIONED_PACKAGES
    ]
