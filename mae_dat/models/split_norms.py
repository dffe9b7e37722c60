"""AdvProp's two sets of norms (Xie et al. 2020): one for clean views and one for adversarial ones, whose statistics
differ.

Each norm of a network keeps its place, its class and the keys of its tensors, and gets an auxiliary copy as a part of
its own, under the key `auxiliary`. What is evaluated and exported are the norms that were there before.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import timm.layers
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError

logger = logging.getLogger(__name__)

_TIMMS = (
    *("RmsNorm", "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32"),
    *("SimpleNorm", "SimpleNormFp32", "SimpleNorm2d", "SimpleNorm2dFp32"),
    *("EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2", "EvoNorm2dS0", "EvoNorm2dS1", "EvoNorm2dS2"),
    *("FilterResponseNormTlu2d", "FilterResponseNormAct2d"),
)  # timm's own, which derive from none of torch's; older ones lack some
NORMS: tuple[type[nn.Module], ...] = (
    *(nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(getattr(timm.layers, name) for name in _TIMMS if hasattr(timm.layers, name)),
)
AUXILIARY = "auxiliary"


class SplitNorm(nn.Module):
    """What the class of a norm becomes, in front of the class that it had."""

    auxiliary: nn.Module
    routed = False
    """Whether the auxiliary copy is in its place now."""

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, or its auxiliary copy's."""
        return self.auxiliary(x) if self.routed else super().forward(x)


def split_norms(model: nn.Module) -> None:
    """Gives each norm an auxiliary copy of itself, as it is now; in place. Build optimizer and averages afterwards.

    Raises ConfigError for a network without any, and warns of parts with weights that are norms by their name alone:
    both views share those.
    """
    norms = [part for part in model.modules() if isinstance(part, NORMS)]
    if not norms:
        raise ConfigError("this network has no norms to split: leave out --split_norms, and --at advprop.")
    shared = {
        type(part).__name__
        for part in model.modules()
        if "Norm" in type(part).__name__ and not isinstance(part, NORMS) and [*part.parameters(recurse=False)]
    }
    if shared:
        logger.warning("not split, and so shared by clean and adversarial views: %s.", ", ".join(sorted(shared)))
    for norm in norms:
        norm.add_module(AUXILIARY, copy.deepcopy(norm))
        kind = type(norm)
        norm.__class__ = type(f"Split{kind.__name__}", (SplitNorm, kind), {})


@contextlib.contextmanager
def auxiliary_norms(model: nn.Module) -> Iterator[None]:
    """Sends what passes through the model through the auxiliary norms, where it has any."""
    norms = [part for part in model.modules() if isinstance(part, SplitNorm)]
    try:
        for norm in norms:
            norm.routed = True
        yield
    finally:
        for norm in norms:
            norm.routed = False


def main_norms(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without the auxiliary norms: that of the network as it was before `split_norms`."""
    return {key: value for key, value in state.items() if f".{AUXILIARY}." not in f".{key}"}
