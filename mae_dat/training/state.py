"""The state of a training: what changes during a run, and exactly what a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.runtime.collectives import gather
from mae_dat.runtime.sharding import full_state_dict, load_model_state, load_optimizer_state
from mae_dat.training.objectives.base import Objective

_BATCH_NORM = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class TrainingState:
    """All that changes during a run, and exactly what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    ema: Any = None
    """timm's ModelEmaV3, or None."""
    step: int = 0
    """Updates done, since the start of the run."""
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the logged parts over the current epoch's images of this rank, with `images`, `updates` and `seconds`."""
    heard: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Steps and what they told, for the objective to observe before a step that is a fixed number of steps later:
    not when it is read, which depends on when the run was saved."""

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, whole on rank 0. Collective: what differs between ranks is gathered from all of them."""
        return {
            "model": full_state_dict(self.model.state_dict()),
            "optimizer": full_state_dict(self.optimizer.state_dict()),
            "objective": self.objective.state_dict(),
            "ema": full_state_dict(self.ema.module.state_dict()) if self.ema else None,
            "step": self.step,
            "ranks": gather({"totals": self.totals, "heard": self.heard, "statistics": on_cpu(self._statistics())}),
        }

    def load_state_dict(self, state: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
        """From a checkpoint. What differed between the ranks goes back to each of them; with another number of ranks
        now, rank 0 gets the sums, and all the mean of BatchNorm's statistics."""
        load_model_state(self.model, state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        if self.ema:
            load_model_state(self.ema.module, state["ema"] or state["model"])
        self.step = state["step"]
        told = state["ranks"]
        self.heard = told[rank if len(told) == ranks else 0].get("heard", [])
        if len(told) == ranks:
            self.totals, statistics = told[rank]["totals"], told[rank]["statistics"]
        else:
            names = told[0]["totals"] if rank == 0 else ()
            self.totals = {name: sum(one["totals"][name] for one in told) for name in names}
            statistics = {name: _mean([one["statistics"][name] for one in told]) for name in told[0]["statistics"]}
        for name, value in self._statistics().items():
            value.copy_(statistics[name])

    def _statistics(self) -> dict[str, Tensor]:
        """Running statistics of BatchNorm, which each rank gathers from its own images."""
        networks = {"model": self.model, **({"ema": self.ema.module} if self.ema else {})}
        buffers = {f"{name}.{key}": value for name, one in networks.items() for key, value in one.named_buffers()}
        return {name: value for name, value in buffers.items() if name.rpartition(".")[2] in _BATCH_NORM}

    @property
    def averaged(self) -> nn.Module:
        """The network to evaluate and export: the EMA's where there is one."""
        return self.ema.module if self.ema else self.model


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that another process can take."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack([value.double() for value in values]).mean(0)
