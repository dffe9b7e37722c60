"""The interface of an objective: a batch in, a dictionary with `loss` and its named parts out.

The training loop knows nothing of masks, labels or adversaries. An objective draws its randomness once per step
(`prepare`: mask noise, mixed labels), so every view of the batch, clean or adversarial, is scored with the same mask or
the same targets (`loss`). `WithDAT` wraps any objective.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.data.image_set import Batch
from mae_dat.models.tokenizer.base import VisualTokenizer

Parts = dict[str, Tensor]
"""Scalars by name: `loss`, the terms it is made of, and what else is to be logged."""


class Objective(ABC):
    """Maps (model, batch, generator) to a dictionary of scalars with `loss`."""

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Return the image to learn from, (B, C, H, W) in [0, 1], and what else `loss` needs (`prepared`).

        That is targets, mask noise and the like: tensors or lists with a row for each image, or a tuple of these and
        of numbers. All randomness of the step is drawn here, from `generator`.
        """

    def prepare_views(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Return V views of the images, (B, V, C, H, W), and what `loss` needs for each of them.

        The batch holds the views as `image`, the clean one first, which `prepare` gets.
        """
        views = batch["image"]
        clean: Any = {**batch, "image": views[:, 0]}
        image, prepared = self.prepare(model, clean, generator)
        return torch.cat([image.unsqueeze(1), views[:, 1:]], 1), prepared

    @abstractmethod
    def loss(self, model: nn.Module, image: Tensor, prepared: Any) -> Tensor:
        """Compute the mean loss of a view (B, C, H, W) of the image, a float32 scalar."""

    def loss_per_image(self, model: nn.Module, image: Tensor, prepared: Any) -> Tensor:
        """Compute each image's own loss, (B,). Raises NotImplementedError if the objective has none."""
        raise NotImplementedError

    def parts(self, model: nn.Module, image: Tensor, prepared: Any) -> Parts:
        """Compute `loss` of a view (B, C, H, W), and the scalars to log with it."""
        return {"loss": self.loss(model, image, prepared)}

    def step(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """Compute the loss of one batch, with the scalars to log: what the training loop calls in every step."""
        return self.parts(model, *self.prepare(model, batch, generator))

    def known_words(self, tokenizer: VisualTokenizer, prepared: Any) -> Tensor | None:
        """Return the image's words (B, h, w) if `prepare` has already encoded them with this tokenizer."""
        return None

    def begin(self, epoch: float) -> None:  # noqa: B027 - most objectives have no schedule
        """Start a step at this fractional epoch."""

    def observe(self, metrics: Mapping[str, float]) -> None:  # noqa: B027 - most objectives adjust nothing
        """Read the parts of an earlier step, the same on all ranks except for the losses.

        On a GPU they arrive after the next step has been launched.
        """

    def logged(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return what the log shows of metrics that were averaged over several steps: all of them."""
        return dict(means)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most objectives have no state
        """Restore `state_dict`."""


class ObjectiveWrapper(Objective):
    """An objective that passes views of its own making to the `objective` it wraps."""

    objective: Objective

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """Return what the wrapped objective prepares."""
        return self.objective.prepare(model, batch, generator)

    def loss(self, model: nn.Module, image: Tensor, prepared: Any) -> Tensor:
        """Compute the wrapped objective's loss."""
        return self.objective.loss(model, image, prepared)

    def begin(self, epoch: float) -> None:
        """Start a step of the wrapped objective."""
        self.objective.begin(epoch)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Pass the metrics to the wrapped objective."""
        self.objective.observe(metrics)

    def logged(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return what the log shows of the wrapped objective's metrics."""
        return self.objective.logged(means)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped objective's state for a checkpoint."""
        return {"objective": self.objective.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.objective.load_state_dict(state["objective"])
