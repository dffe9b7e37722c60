"""A copy of a training's state that costs the training next to nothing: small things are copied at once, large tensors
by another thread while the next forward and backward pass compute."""

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGE = 1 << 20
"""Bytes from which a tensor is worth another thread."""


class HostBuffers:
    """Host memory by size, used again from one snapshot to the next; page-locked where it is filled from a GPU."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[Tensor]] = {}

    def take(self, size: int, pinned: bool) -> Tensor:
        """(size,) bytes of any content."""
        free = self._free.get((size, pinned))
        return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    def give_back(self, buffer: Tensor, pinned: bool) -> None:
        """Takes back what `take` gave; nobody may look at it any more."""
        self._free.setdefault((len(buffer), pinned), []).append(buffer)


class _Copy(NamedTuple):
    """A storage, the host memory that it goes to (both as bytes), and whether another thread may copy it."""

    host: Tensor
    source: Tensor
    later: bool


class Snapshot:
    """`state` (dictionaries and lists of tensors, numbers and strings) as it is now, in host memory.

    After `copy_large`, which is for another thread, `content` is whole; `wait` blocks until the state may change.
    Tensors that share memory do so in the copy, so that `torch.save` makes the same bytes of both. `at_once` are the
    tensors that a forward pass changes: the running statistics of BatchNorm, a codebook.
    """

    def __init__(self, state: Mapping[str, Any], buffers: HostBuffers, at_once: Iterable[Tensor] = ()) -> None:
        self._state, self._buffers = state, buffers  # the state stays alive until it is copied
        self._copies: dict[int, _Copy] = {}
        self._taken = threading.Event()
        self._copied: torch.cuda.Event | None = None
        soon = {_identity(tensor) for tensor in at_once}
        tensors = [tensor for tensor in _tensors(state) if _is_plain(tensor)]
        self._device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        memo: dict[int, Any] = {id(tensor): self._copy_of(tensor, soon) for tensor in tensors}
        counted = [tensor for tensor in tensors if self._copies[_identity(tensor)].later and not tensor.is_inference()]
        self._versions = [(tensor, tensor._version) for tensor in counted]
        for host, source, later in self._copies.values():
            if not later:
                host.copy_(source, non_blocking=source.is_cuda)
        self._began = torch.cuda.current_stream(self._device).record_event() if self._device else None
        self.content: Any = copy.deepcopy(state, memo)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(len(copied.host) for copied in self._copies.values())

    def copy_large(self) -> None:
        """Copies the large tensors; returns when `content` is whole. Raises RuntimeError if they changed meanwhile."""
        try:
            if self._began:
                side = torch.cuda.Stream(self._device)
                side.wait_event(self._began)
                with torch.cuda.stream(side):
                    self._copy_later()
                self._copied = side.record_event()
            else:
                self._copy_later()
        finally:
            self._taken.set()
        if self._copied:
            self._copied.synchronize()
        self._state = {}

    def wait(self) -> None:
        """Blocks until the state may change; on a GPU only its stream waits."""
        self._taken.wait()
        if self._copied:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def release(self) -> None:
        """Gives the memory back for the next snapshot; `content` is gone."""
        self.content = None
        for host, source, _ in self._copies.values():
            self._buffers.give_back(host, source.is_cuda)
        self._copies = {}

    def _copy_later(self) -> None:
        for host, source, later in self._copies.values():
            if later:
                host.copy_(source, non_blocking=source.is_cuda)
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError("the state changed while it was copied: call before_change() before every update.")
        self._versions = []

    def _copy_of(self, tensor: Tensor, soon: set[int]) -> Tensor:
        """The tensor's place in the copy of its storage."""
        storage, key = tensor.untyped_storage(), _identity(tensor)
        if key not in self._copies:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            host = self._buffers.take(storage.nbytes(), tensor.is_cuda)
            self._copies[key] = _Copy(host, source, later=storage.nbytes() >= LARGE and key not in soon)
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        copied = torch.empty(0, dtype=tensor.dtype).set_(self._copies[key].host.untyped_storage(), *place)
        return copied.requires_grad_(tensor.requires_grad)


def _identity(tensor: Tensor) -> int:
    """The same for tensors that share memory; what `torch.save` goes by."""
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its storage, offset, size and stride and nothing else; other kinds are copied as objects."""
    return type(tensor) is Tensor and tensor.layout is torch.strided and not (tensor.is_complex() or vars(tensor))
