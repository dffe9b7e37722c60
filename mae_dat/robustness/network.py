"""A network to evaluate, and the facts about it that are part of its results' key.

Wherever it comes from (see `open_networks`), it maps float pixels (B, 3, H, W) in [0, 1] to logits (B, K); the
normalization is inside.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mae_dat.attacks.checks import require_no_declared_normalization
from mae_dat.config.errors import ConfigError, NumericsError
from mae_dat.config.groups import ImageSize, image_size
from mae_dat.config.protocols import PROTOCOLS, ProtocolName
from mae_dat.data.transforms import default_crop_pct
from mae_dat.models.describe import WeightsOrigin
from mae_dat.models.modes import Network
from mae_dat.robustness.input_checks import ProbabilityModel, are_probabilities
from mae_dat.robustness.scores.results import ModelFacts

logger = logging.getLogger(__name__)

DEFAULT_SIZE = (224, 224)
"""Input height and width in pixels of networks whose own is unknown."""


@dataclass(frozen=True)
class EvalOptions:
    """How to feed images to the networks, where it differs from what a network's own settings say."""

    device: torch.device
    precision: torch.dtype | None = None
    """Data type of autocast; None for float32."""
    size: ImageSize | None = None
    """Height and width in pixels."""
    interpolation: str | None = None
    crop: float | None = None
    """The crop's side over the resized image's, above 0 and at most 1."""
    protocol: ProtocolName = "native"
    """It sets `crop` and `interpolation` where it fixes them."""

    def __post_init__(self) -> None:
        for name in ("crop", "interpolation"):
            fixed = getattr(PROTOCOLS[self.protocol], name)
            object.__setattr__(self, name, getattr(self, name) or fixed)
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ConfigError(f"--crop {self.crop}: give a share of the side above 0 and at most 1.")

    @property
    def precision_name(self) -> str:
        """The precision as it is recorded in the facts."""
        return "fp32" if self.precision is None else "bf16"

    def with_crop(self, facts: ModelFacts) -> ModelFacts:
        """Return the facts with the crop, if it differs from the usual one of this size, and the protocol, if it is not
        `native`."""
        if self.protocol != "native":
            facts = {**facts, "protocol": self.protocol}
        height, width = facts["size"]
        usual = self.crop is None or abs(self.crop - default_crop_pct((height, width))) < 1e-3
        return facts if usual or self.crop is None else {**facts, "crop": self.crop}


@dataclass(frozen=True)
class EvaluatedNetwork:
    """A network to evaluate, opened on its device."""

    name: str
    model: Network
    facts: ModelFacts
    outputs: int
    classes: tuple[str, ...] | None
    """The names of its classes, or None if unknown."""
    differentiable: bool
    device: torch.device
    identity: dict[str, str] | None = field(default_factory=dict)
    """Part of the cache key beside the facts; None if nothing distinguishes this network from another one."""
    origin: WeightsOrigin | None = None
    """The file of the weights, for the summary of the inputs; None if there is none."""
    normalization_is_known: bool = False
    """Whether the file of the weights records the normalization, so that it need not be checked on images."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of packages it needs beyond those of `mae_dat.runtime.environment`."""

    @property
    def size(self) -> ImageSize:
        """Height and width of its input in pixels."""
        height, width = self.facts["size"]
        return height, width

    @property
    def key(self) -> dict[str, Any] | None:
        """What its counts are cached under; None if they must not be cached."""
        facts = {key: value for key, value in self.facts.items() if key not in ("title", "source")}
        return None if self.identity is None else facts | self.identity


def create_evaluated_network(
    model: Network, facts: ModelFacts, classes: Sequence[str] | None, options: EvalOptions
) -> EvaluatedNetwork:
    """Return the network after a forward pass of two blank images, which shows its outputs and whether it has
    gradients. Probabilities, rows that are not negative and sum to one, are replaced by their logarithms.

    Raises ConfigError if it does not accept images of the size in `facts`, does not return logits (B, K), declares
    normalized inputs, or has another number of outputs than `classes`; NumericsError for NaN or infinite logits.
    """
    name = facts["title"]
    require_no_declared_normalization(model)
    blank = torch.zeros(2, 3, *image_size(tuple(facts["size"])), device=options.device)
    logits = _logits_of_blank(model, blank, name)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(blank):
        output = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(f"{name} gives {output} for {len(blank)} images, not logits of shape (2, classes).")
    if not logits.isfinite().all():
        raise NumericsError(
            f"{name} gives NaN or infinite logits for a blank image: its weights are damaged; check the checkpoint."
        )
    if are_probabilities(logits) and are_probabilities(_logits_of_blank(model, torch.rand_like(blank), name)):
        logger.info("%s gives probabilities: their logarithms are used as logits", name)
        model, facts = ProbabilityModel(model), {**facts, "outputs": "probabilities"}
    if classes is not None and len(classes) != logits.shape[1]:
        raise ConfigError(f"{name} has {logits.shape[1]} outputs and a list of {len(classes)} classes.")
    return EvaluatedNetwork(
        name=name,
        model=model,
        facts=options.with_crop(facts),
        outputs=logits.shape[1],
        classes=tuple(classes) if classes else None,
        differentiable=logits.requires_grad,
        device=options.device,
    )


def _logits_of_blank(model: Network, blank: Tensor, name: str) -> Any:
    """Return the model's output for blank images (2, 3, H, W). Raises ConfigError if it does not accept them."""
    count, channels, height, width = blank.shape
    message = f"{name} does not take images of {count} x {channels} x {height} x {width}"
    try:
        with torch.enable_grad():
            return model(blank.requires_grad_())
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{message}: {error}") from error
    except Exception as error:
        # onnxruntime is optional, so its exception types cannot be named here.
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{message}: {reason}. A graph that takes one image alone must be exported again with a dynamic batch "
            "axis (torch.onnx.export: dynamic_axes or dynamic_shapes)."
        ) from error
