"""Objectives: a batch in, a dictionary with `loss` and its named parts out. The engine knows none of them.

An objective draws its randomness once per step (`prepare`: mask noise, mixed labels), so that every view of the batch,
the clean and the adversarial one, is judged by the same mask or the same targets (`loss`). `WithDAT` wraps any of them.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.data.image_set import Batch
from mae_dat.models.tokenizer.base import VisualTokenizer

logger = logging.getLogger(__name__)

Parts = dict[str, Tensor]


class Objective(ABC):
    """Maps (model, batch, generator) to a dictionary of scalars with `loss`."""

    @abstractmethod
    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """The image to learn from, (B, C, H, W) in [0, 1], and all that judges it, such as targets or mask noise:
        tensors or lists with a row for each image, alone or in a tuple."""

    @abstractmethod
    def loss(self, model: nn.Module, image: Tensor, context: Any) -> Tensor:
        """Mean loss of a view of the image, a float32 scalar."""

    def parts(self, model: nn.Module, image: Tensor, context: Any) -> Parts:
        """`loss` of a view, with what of it is worth to be logged."""
        return {"loss": self.loss(model, image, context)}

    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Parts:
        """The loss of one batch."""
        return self.parts(model, *self.prepare(model, batch, generator))

    def known_words(self, tokenizer: VisualTokenizer, context: Any) -> Tensor | None:
        """Words (B, h, w) of the image where `prepare` has had this tokenizer find them."""
        return None

    def begin(self, epoch: float) -> None:  # noqa: B027 - most keep no schedule
        """Is told, before each step, the fractional epoch that it stands at."""

    def observe(self, facts: Mapping[str, float]) -> None:  # noqa: B027 - most follow nothing
        """Is told a step's parts once they are read, the same on all ranks but for the losses: on a GPU that may be
        after the next step."""

    def state_dict(self) -> dict[str, Any]:
        """State to save in a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - most have none
        """State from a checkpoint."""


class ObjectiveWrapper(Objective):
    """An objective that passes views of its own making to another one."""

    objective: Objective

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """As the wrapped objective."""
        return self.objective.prepare(model, batch, generator)

    def loss(self, model: nn.Module, image: Tensor, context: Any) -> Tensor:
        """As the wrapped objective."""
        return self.objective.loss(model, image, context)

    def begin(self, epoch: float) -> None:
        """As the wrapped objective."""
        self.objective.begin(epoch)

    def observe(self, facts: Mapping[str, float]) -> None:
        """As the wrapped objective."""
        self.objective.observe(facts)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped objective's."""
        return {"objective": self.objective.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self.objective.load_state_dict(state["objective"])
