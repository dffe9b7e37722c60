"""A user's own shift as a function on images: what it gets, what it may return, and how it draws random numbers."""

import dataclasses
import hashlib
import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_dat.config.errors import ConfigError, DataError
from mae_dat.data.image_set import seeded
from mae_dat.robustness.corruptions.pixels import Image as Pixels

FunctionInput = Literal["tensor", "array", "pil"]
INPUTS: dict[str, str] = {
    "tensor": "a float tensor (3, H, W) in [0, 1]",
    "array": "a uint8 array (H, W, 3)",
    "pil": "an RGB PIL image",
}
"""What a function may take, by name. It returns the same type and size."""


@dataclasses.dataclass(frozen=True)
class ImageFunction:
    """A function that changes one image, and which type it takes and returns."""

    name: str
    function: Callable[[Any], Any]
    takes: FunctionInput

    @property
    def protocol(self) -> dict[str, str]:
        """The function in words, and the hash of its source if it has one: part of a result's key."""
        qualified = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        try:
            source = inspect.getsource(self.function)
        except (OSError, TypeError):
            source = repr(self.function)
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        return {"function": f"{qualified}, source {digest}", "takes": INPUTS[self.takes]}

    def __call__(self, pixels: Pixels, seed: int, index: int) -> Pixels:
        """Return the changed image, uint8 (H, W, 3), of pixels uint8 (H, W, 3); results are rounded to 8 bits.

        Python's, numpy's and torch's global generators are seeded by (seed, index), and restored afterwards. Raises
        DataError for a result of another type, size or range.
        """
        with seeded(seed, 0, index), torch.no_grad():
            try:
                result = self.function(self._as_input(pixels))
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise DataError(
                    f"the function {self.name} failed on {INPUTS[self.takes]}: {type(error).__name__}: {error}. "
                    f"{_ADVICE}"
                ) from error
        return self._as_pixels(result, pixels.shape)

    def _as_input(self, pixels: Pixels) -> Any:
        if self.takes == "array":
            return pixels.copy()
        if self.takes == "pil":
            return Image.fromarray(pixels)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float() / 255

    def _as_pixels(self, result: Any, shape: tuple[int, ...]) -> Pixels:
        expected = {"tensor": Tensor, "array": np.ndarray, "pil": Image.Image}[self.takes]
        if not isinstance(result, expected):
            raise DataError(f"the function {self.name} returned {_kind(result)}, not {INPUTS[self.takes]}. {_ADVICE}")
        if isinstance(result, Tensor):
            result = result.detach().cpu()
            if not result.is_floating_point() or not result.isfinite().all():
                raise DataError(f"the function {self.name} returned {_kind(result)}, not finite floats in [0, 1].")
            low, high = (float(end) for end in result.aminmax())
            if low < -1e-3 or high > 1 + 1e-3:
                raise DataError(
                    f"the function {self.name} returned values in [{low:.3g}, {high:.3g}], not in [0, 1]: end it with "
                    ".clamp(0, 1)."
                )
            pixels = (result.clamp(0, 1) * 255).round().to(torch.uint8)
            result = pixels.permute(1, 2, 0).numpy() if pixels.ndim == 3 else pixels.numpy()
        elif isinstance(result, Image.Image):
            result = np.array(result.convert("RGB"))
        if result.dtype != np.uint8:
            raise DataError(f"the function {self.name} returned {_kind(result)}, not {INPUTS[self.takes]}. {_ADVICE}")
        if result.shape != shape:
            raise DataError(f"the function {self.name} changed the size of an image from {shape} to {result.shape}.")
        return np.ascontiguousarray(result)


_ADVICE = (
    "Say what it takes by the type of its parameter (Tensor, np.ndarray or PIL.Image.Image), or by a pair such as "
    '(function, "array"): tensor, array or pil.'
)


def image_function(name: str, given: Any) -> ImageFunction:
    """Return the function of a suite, from a callable or a pair (callable, "tensor", "array" or "pil").

    Without such a word, the type of its first parameter decides; without one, it takes tensors. Raises ConfigError.
    """
    function, takes = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not callable(function):
        raise ConfigError(f"the suite {name!r} is {_kind(function)}, not a function on images, a folder or a CSV file.")
    if takes is None:
        takes = _annotated_input(function) or "tensor"
    if takes not in INPUTS:
        raise ConfigError(f"the suite {name!r} takes {takes!r}: choose tensor, array or pil.")
    return ImageFunction(name, function, takes)


def _annotated_input(function: Callable[..., Any]) -> FunctionInput | None:
    """Return what the type of a function's first parameter says that it takes; None if it says nothing."""
    called = function if inspect.isroutine(function) else getattr(function, "forward", type(function).__call__)
    try:
        hints = typing.get_type_hints(called)
        names = [name for name in inspect.signature(called).parameters if name != "self"]
    except (NameError, TypeError, ValueError):
        return None
    hint = hints.get(names[0]) if names else None
    origin = typing.get_origin(hint) or hint
    if not isinstance(origin, type):
        return None
    kinds: dict[type, FunctionInput] = {Tensor: "tensor", np.ndarray: "array", Image.Image: "pil"}
    return next((takes for kind, takes in kinds.items() if issubclass(origin, kind)), None)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
