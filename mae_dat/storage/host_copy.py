"""Copies of a training state in host memory that delay training as little as possible.

Small tensors are copied immediately, large ones by another thread during the next forward and backward pass:

    training thread    Snapshot(state) | forward, backward | wait() | optimizer step
    writing thread                     | copy_large() | torch.save(content) ... | release()

`wait` returns as soon as the large tensors are copied; the file is written during the following steps.
"""

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGE = 1 << 20
"""Size in bytes from which the other thread copies a storage."""


class HostBuffers:
    """Buffers of host memory, reused from one snapshot to the next; page-locked if they are filled from a GPU."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[Tensor]] = {}

    def take(self, size: int, pinned: bool) -> Tensor:
        """Return a buffer of shape (size,), uint8, with undefined content."""
        free = self._free.get((size, pinned))
        return free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=pinned)

    def give_back(self, buffer: Tensor, pinned: bool) -> None:
        """Accept a buffer from `take` for reuse; the caller must not read it any more."""
        self._free.setdefault((len(buffer), pinned), []).append(buffer)


class _Copy(NamedTuple):
    """A storage (`source`) and its copy (`host`), both as bytes."""

    host: Tensor
    source: Tensor
    by_thread: bool
    """Whether the other thread copies it, in `copy_large`."""


class Snapshot:
    """A copy of the current `state` (dictionaries and lists of tensors, numbers and strings) in host memory.

    `content` is complete after `copy_large`, which is called by another thread; `wait` blocks until the state may
    change. Tensors that share memory share it in the copy too, so that `torch.save` writes the same bytes for both.
    `copy_immediately` are the tensors that a forward pass changes, which cannot wait for the other thread: the running
    statistics of BatchNorm, a codebook.
    """

    def __init__(self, state: Mapping[str, Any], buffers: HostBuffers, copy_immediately: Iterable[Tensor] = ()) -> None:
        self._state, self._buffers = state, buffers  # the state stays alive until it is copied
        self._copies: dict[int, _Copy] = {}
        self._copies_issued = threading.Event()  # all copies are done, or (on a GPU) in the queue of a stream
        self._copy_event: torch.cuda.Event | None = None  # recorded behind the copies of the large tensors
        immediate_keys = {_storage_key(tensor) for tensor in copy_immediately}
        tensors = [tensor for tensor in _tensors(state) if _is_plain(tensor)]
        self._device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        memo: dict[int, Any] = {id(tensor): self._copy_of(tensor, immediate_keys) for tensor in tensors}
        # torch counts the changes of a tensor in `_version` (not in inference mode), which reveals a too early change.
        self._versions = [
            (tensor, tensor._version)
            for tensor in tensors
            if self._copies[_storage_key(tensor)].by_thread and not tensor.is_inference()
        ]
        for host, source, by_thread in self._copies.values():
            if not by_thread:
                host.copy_(source, non_blocking=source.is_cuda)
        # The side stream of `copy_large` waits for this event, so that it reads the state as it is now.
        self._start_event = torch.cuda.current_stream(self._device).record_event() if self._device else None
        self.content: Any = copy.deepcopy(state, memo)  # the tensors' copies are in `memo` already

    @property
    def size(self) -> int:
        """Size of all tensors in bytes."""
        return sum(len(copied.host) for copied in self._copies.values())

    def copy_large(self) -> None:
        """Copy the large tensors; return when `content` is complete. Raises RuntimeError if they changed meanwhile."""
        try:
            if self._start_event:
                side = torch.cuda.Stream(self._device)
                side.wait_event(self._start_event)
                with torch.cuda.stream(side):
                    self._copy_large_storages()
                self._copy_event = side.record_event()
            else:
                self._copy_large_storages()
        finally:
            self._copies_issued.set()
        if self._copy_event:
            self._copy_event.synchronize()
        self._state = {}

    def wait(self) -> None:
        """Block until the state may change; for a state on a GPU, make only the current stream wait for the copies."""
        self._copies_issued.wait()
        if self._copy_event:
            torch.cuda.current_stream(self._device).wait_event(self._copy_event)

    def release(self) -> None:
        """Return the memory for the next snapshot; `content` becomes None."""
        self.content = None
        for host, source, _ in self._copies.values():
            self._buffers.give_back(host, source.is_cuda)
        self._copies = {}

    def _copy_large_storages(self) -> None:
        for host, source, by_thread in self._copies.values():
            if by_thread:
                host.copy_(source, non_blocking=source.is_cuda)
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError("the state changed while it was copied: call before_change() before every update.")
        self._versions = []

    def _copy_of(self, tensor: Tensor, immediate_keys: set[int]) -> Tensor:
        """Return a tensor of the same shape in the copy of its storage, which is filled later."""
        storage, key = tensor.untyped_storage(), _storage_key(tensor)
        if key not in self._copies:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            host = self._buffers.take(storage.nbytes(), tensor.is_cuda)
            self._copies[key] = _Copy(host, source, by_thread=storage.nbytes() >= LARGE and key not in immediate_keys)
        copied = torch.empty(0, dtype=tensor.dtype).set_(
            self._copies[key].host.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        return copied.requires_grad_(tensor.requires_grad)


def _storage_key(tensor: Tensor) -> int:
    """Return a number that is equal for tensors that share memory; `torch.save` uses the same one."""
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
    """Return whether a tensor consists of storage, offset, size and stride only; others are copied as objects."""
    return type(tensor) is Tensor and tensor.layout is torch.strided and not (tensor.is_complex() or vars(tensor))
