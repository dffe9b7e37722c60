"""Parameters that stay as they are in the first epochs of a training."""

from collections.abc import Iterable

from torch import nn


class FrozenStart:
    """Freezes parameters until an epoch, such as the encoder while its new decoder is trained alone.

    They belong to the optimizer's groups from the start, without a gradient and so without a state of their own.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], epochs: float) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.epochs = epochs
        self.is_frozen = False

    def set_epoch(self, epoch: float) -> bool:
        """Freeze or unfreeze for a step at this fractional epoch; return whether anything changed."""
        frozen = epoch < self.epochs
        changed, self.is_frozen = frozen != self.is_frozen, frozen
        if changed:
            for parameter in self.parameters:
                parameter.requires_grad_(not frozen)
        return changed
