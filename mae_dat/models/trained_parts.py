"""Choose which parameters of a classifier are trained: `--train all|head|last:K|norms`.

The others are frozen. Parts without a trained parameter stay in evaluation mode, so that their drop path is off and
their BatchNorm keeps its statistics.
"""

from typing import Any

from timm.models import group_parameters
from torch import nn

from mae_dat.config.errors import ConfigError
from mae_dat.models.classifier import Classifier


def head_parameters(model: Classifier) -> list[nn.Parameter]:
    """Return the parameters of the head, or of both heads of a distilled model. Raises ConfigError without any."""
    net: Any = model.net
    heads = net.get_classifier()
    parameters = [p for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()]
    if not parameters:
        raise ConfigError(f"{type(net).__name__} has no head that can be trained alone.")
    return parameters


def select_trained(model: Classifier, part: str) -> None:
    """Freeze all parameters that do not belong to `part`.

    `head`: the last layer. `last:K`: the last K layers in timm's count (a transformer's blocks; the stem is the first
    layer), and what follows them. `norms`: every norm, and the head. `all` freezes nothing. Raises ConfigError for more
    layers than the model has.
    """
    if part == "all":
        return
    trained = {id(parameter) for parameter in head_parameters(model)}
    if part == "norms":
        norms = [module for module in model.net.modules() if "Norm" in type(module).__name__]
        trained |= {id(parameter) for norm in norms for parameter in norm.parameters(recurse=False)}
    elif part != "head":
        trained |= _last_layers(model.net, int(part.removeprefix("last:")))
    for parameter in model.net.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    model.evaluates_frozen = True
    model.train(model.training)


def _last_layers(net: Any, count: int) -> set[int]:
    """Return the ids of the parameters of the last `count` layers, and of those after the last layer."""
    layer_of: dict[str, int] = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    parameters = dict(net.named_parameters())
    after = max(layer_of.values())  # the group of the head
    layers = sorted({layer for layer in layer_of.values() if layer < after})
    if not 1 <= count <= len(layers):
        raise ConfigError(
            f"--train last:{count}: {type(net).__name__} has {len(layers)} layers; give last:1 to last:{len(layers)}."
        )
    first = layers[-count]
    return {id(parameters[name]) for name, layer in layer_of.items() if layer >= first}
