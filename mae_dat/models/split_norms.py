"""AdvProp's two sets of norms (Xie et al. 2020): one for clean views and one for adversarial ones, whose statistics
differ.

To work for every network, `split_norms` changes the class of each norm, in place, to a subclass made for it. The norm
keeps its place in the network, the keys of its tensors, and is still an instance of its old class, so optimizer,
checkpoints and timm's code need no changes; its auxiliary copy is a child with the key `auxiliary`. Wrapper modules
instead of the norms would change every key and break networks that access `norm.weight`. Evaluation and export use the
original norms.
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

_TIMM_NORMS = (
    *("RmsNorm", "RmsNormFp32", "RmsNorm2d", "RmsNorm2dFp32"),
    *("SimpleNorm", "SimpleNormFp32", "SimpleNorm2d", "SimpleNorm2dFp32"),
    *("EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2", "EvoNorm2dS0", "EvoNorm2dS1", "EvoNorm2dS2"),
    *("FilterResponseNormTlu2d", "FilterResponseNormAct2d"),
)  # timm's own classes, which are not subclasses of torch's; older versions lack some
NORMS: tuple[type[nn.Module], ...] = (
    *(nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(getattr(timm.layers, name) for name in _TIMM_NORMS if hasattr(timm.layers, name)),
)
AUXILIARY = "auxiliary"


class SplitNorm(nn.Module):
    """First base class of a split norm; the second one is the original class of the norm."""

    auxiliary: nn.Module
    uses_auxiliary = False
    """Whether the auxiliary copy is used instead."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, with the auxiliary copy if `uses_auxiliary`."""
        return self.auxiliary(x) if self.uses_auxiliary else super().forward(x)


def split_norms(model: nn.Module) -> None:
    """Add to each norm an auxiliary copy of its current state, in place. Build optimizer and averages afterwards.

    Raises ConfigError for a model without norms. Warns about modules with weights whose name suggests a norm, but whose
    class is unknown: both views share those.
    """
    norms = [part for part in model.modules() if isinstance(part, NORMS)]
    if not norms:
        raise ConfigError("this model has no norms to split: remove --split_norms and --at advprop.")
    shared = {
        type(part).__name__
        for part in model.modules()
        if "Norm" in type(part).__name__ and not isinstance(part, NORMS) and [*part.parameters(recurse=False)]
    }
    if shared:
        logger.warning("norms that are not split, but shared by both views: %s.", ", ".join(sorted(shared)))
    for norm in norms:
        norm.add_module(AUXILIARY, copy.deepcopy(norm))
        kind = type(norm)
        norm.__class__ = type(f"Split{kind.__name__}", (SplitNorm, kind), {})


@contextlib.contextmanager
def auxiliary_norms(model: nn.Module) -> Iterator[None]:
    """Use the auxiliary norms inside the block, if the model has any."""
    norms = [part for part in model.modules() if isinstance(part, SplitNorm)]
    try:
        for norm in norms:
            norm.uses_auxiliary = True
        yield
    finally:
        for norm in norms:
            norm.uses_auxiliary = False


def main_norms(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the auxiliary norms: that of the model before `split_norms`."""
    return {key: value for key, value in state.items() if f".{AUXILIARY}." not in f".{key}"}
