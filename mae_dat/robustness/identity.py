"""What a network is known by, so that a number is never shown for another one: hashes of all that its answers depend
on."""

import functools
import hashlib
import inspect
import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.storage.files import sha256_of

RECORDED = ("builtins", "torch", "torchvision", "timm", "mae_dat")
"""Packages whose code is told by the versions that stand beside every result."""


def state_sha256(module: nn.Module) -> str:
    """Of names and values of a module's weights, wherever they lie."""
    digest = hashlib.sha256()
    state: Mapping[str, Tensor] = module.state_dict()
    for key, value in sorted(state.items()):
        digest.update(f"{key} ".encode() + _content(value))
    return digest.hexdigest()


def _content(value: Tensor) -> bytes:
    pixels = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{value.dtype} {tuple(value.shape)}".encode() + pixels.numpy().tobytes()


def module_sha256(module: nn.Module) -> str | None:
    """Of all tensors and attributes of a module and of its parts, and of the source of their classes and functions.

    None where that cannot be all: without any tensor, or with something that no other process could load again, as a
    lambda, a class within a function, a session of another runtime. What a method calls outside its class is not seen.
    """
    content = io.BytesIO()
    pickler = _Pickler(content)
    try:
        pickler.dump(module)
    except Exception:  # what cannot be pickled says so by an error of its own kind
        return None
    return hashlib.sha256(content.getvalue()).hexdigest() if pickler.tensors else None


class _Pickler(pickle.Pickler):
    """Writes of a tensor its hash, of code its source, of a set its members in order."""

    tensors = 0

    def persistent_id(self, value: Any) -> Any:
        """What is written instead of a value; None for what is written as usual."""
        if isinstance(value, Tensor):
            self.tensors += 1
            return hashlib.sha256(_content(value)).hexdigest()
        if isinstance(value, set | frozenset):
            return sorted(map(repr, value))
        code = inspect.isfunction(value) or (isinstance(value, type) and issubclass(value, nn.Module))
        if code and "<" not in value.__qualname__:  # the others close over values
            return f"{value.__module__}.{value.__qualname__}", _sources(value)
        return None


@functools.cache
def _sources(code: Any) -> list[str]:
    """Of a function, or of a class and all that it inherits from. Raises OSError, TypeError where there is none."""
    every = code.__mro__ if isinstance(code, type) else [code]
    return [inspect.getsource(one) for one in every if one.__module__.split(".")[0] not in RECORDED]


def onnx_sha256(path: Path, graph: Any) -> str:
    """Of a graph's file and, where its tensors lie in files beside it, of those too; `graph` is the `ModelProto`."""
    beside = sorted(set(_external_files(graph)))
    if not beside:
        return sha256_of(path)
    told = (f"{name} {sha256_of(path.parent / name)}\n" for name in (path.name, *beside))
    return hashlib.sha256("".join(told).encode()).hexdigest()


def _external_files(message: Any) -> Iterator[str]:
    """Names of files that any tensor within a protobuf message lies in."""
    for field, value in message.ListFields():
        if field.name == "external_data":
            yield from (entry.value for entry in value if entry.key == "location")
        elif field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _external_files(part)
