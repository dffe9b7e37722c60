"""An opened model in words, for the summary of a command's inputs."""

from collections.abc import Sequence

from mae_dat.config.groups import ImageSize
from mae_dat.models.describe import describe_model, describe_normalization
from mae_dat.models.weights.open import OpenedModel
from mae_dat.runtime.inputs import InputSummary


def add_opened_models(inputs: InputSummary, models: Sequence[OpenedModel]) -> None:
    """Add architecture and weights of models: of a single model in two rows, of several in a row for all."""
    for opened in models:
        text = describe_model(opened.plan.name, opened.model, opened.plan.num_classes)
        if len(models) == 1:
            inputs.add("model", text)
            inputs.add("weights", opened.file.origin.describe())
        else:
            inputs.add("models", f"{text}; {opened.file.origin.describe()}")


def describe_pixels(opened: OpenedModel, size: ImageSize | None = None) -> str:
    """Return the size (default: the model's own), channels and normalization of a model's input."""
    height, width = size or opened.input_size
    channels = "" if opened.plan.in_chans == 3 else f", {opened.plan.in_chans} channel"
    return f"{height} x {width} px{channels}, {describe_normalization(opened.model)}"
