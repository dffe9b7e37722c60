"""Parameters that stay as they are in the first epochs of a training."""

from collections.abc import Iterable

from torch import nn

from mae_dat.config.groups import ClassifierConfig
from mae_dat.models.classifier import Classifier
from mae_dat.models.trained_parts import head_parameters, select_trained


class FrozenStart:
    """Freezes parameters until an epoch, such as the encoder while its new decoder is trained alone.

    They belong to the optimizer's groups from the start, without a gradient and so without a state of their own.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], epochs: float, before_schedule: bool = False) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.epochs = epochs
        self.schedule_start = epochs if before_schedule else 0.0
        """The epoch at which the learning rate's schedule starts; before it the rate is at its peak."""
        self.is_frozen = False

    def set_epoch(self, epoch: float) -> bool:
        """Freeze or unfreeze for a step at this fractional epoch; return whether anything changed."""
        frozen = epoch < self.epochs
        changed, self.is_frozen = frozen != self.is_frozen, frozen
        if changed:
            for parameter in self.parameters:
                parameter.requires_grad_(not frozen)
        return changed


def freeze_parts(model: Classifier, settings: ClassifierConfig) -> FrozenStart | None:
    """Freeze what `--train` leaves out; return what is also frozen in the first epochs, None for nothing.

    Raises ConfigError for a model without these parts.
    """
    if not settings.linear_probe:  # it has frozen the rest already
        select_trained(model, settings.train)
    if not settings.probe_epochs:
        return None
    head = {id(parameter) for parameter in head_parameters(model)}
    model.evaluates_frozen = True
    return FrozenStart(
        [p for p in model.parameters() if id(p) not in head], settings.probe_epochs, before_schedule=True
    )
