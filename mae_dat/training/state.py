"""The state of a training: what changes during a run, and exactly what a checkpoint holds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.runtime.collectives import gather
from mae_dat.runtime.sharding import full_state_dict, load_model_state, load_optimizer_state
from mae_dat.training.frozen_start import FrozenStart
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
    frozen_start: FrozenStart | None = None
    """Parameters that are not trained in the first epochs; a function of the step, so no checkpoint holds it."""
    step: int = 0
    """Updates since the start of the run."""
    totals: dict[str, float] = field(default_factory=dict)
    """Sums of the metrics over the current epoch's images of this rank, with `images`, `updates` and `seconds`."""
    point_sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Sum and number of the metrics since the last point of the log, the same on all ranks."""
    delayed_metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    """Steps and their metrics, which the objective has not observed yet.

    It observes them a fixed number of steps later. When the host reads them depends on when a checkpoint was saved, and
    a run that was stopped and resumed must equal one that was not.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint, complete on rank 0. Collective: what differs between the ranks is
        gathered."""
        rank_state = {
            "totals": self.totals,
            "heard": self.delayed_metrics,  # the key of older checkpoints
            "statistics": _on_cpu(self._batch_norm_statistics()),
        }
        return {
            "model": full_state_dict(self.model.state_dict()),
            "optimizer": full_state_dict(self.optimizer.state_dict()),
            "objective": self.objective.state_dict(),
            "ema": full_state_dict(self.ema.module.state_dict()) if self.ema else None,
            "step": self.step,
            "point_sums": self.point_sums,
            "ranks": gather(rank_state),
        }

    def load_state_dict(self, state: dict[str, Any], rank: int = 0, ranks: int = 1) -> None:
        """Load the content of a checkpoint on one of `ranks` ranks.

        What differed between the ranks goes back to each of them. With another number of ranks than before, rank 0 gets
        the sums, and all get the mean of BatchNorm's statistics.
        """
        load_model_state(self.model, state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        if self.ema:
            load_model_state(self.ema.module, state["ema"] or state["model"])
        self.step = state["step"]
        self.point_sums = state.get("point_sums", {})  # missing in checkpoints of older versions
        rank_states = state["ranks"]
        if len(rank_states) == ranks:
            rank_state = rank_states[rank]
            self.totals, statistics = rank_state["totals"], rank_state["statistics"]
        else:
            rank_state = rank_states[0]
            names = rank_state["totals"] if rank == 0 else ()
            self.totals = {name: sum(other["totals"][name] for other in rank_states) for name in names}
            statistics = {
                name: _mean([other["statistics"][name] for other in rank_states]) for name in rank_state["statistics"]
            }
        self.delayed_metrics = rank_state.get("heard", [])  # missing in checkpoints of older versions
        for name, buffer in self._batch_norm_statistics().items():
            buffer.copy_(statistics[name])

    def _batch_norm_statistics(self) -> dict[str, Tensor]:
        """Return the running statistics of BatchNorm, which each rank gathers from its own images."""
        models = {"model": self.model, **({"ema": self.ema.module} if self.ema else {})}
        buffers = {f"{name}.{key}": value for name, model in models.items() for key, value in model.named_buffers()}
        return {name: value for name, value in buffers.items() if name.rpartition(".")[2] in _BATCH_NORM}

    @property
    def averaged(self) -> nn.Module:
        """The model to evaluate and export: the EMA's where there is one."""
        return self.ema.module if self.ema else self.model


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors so that another process can receive them."""
    return {name: value.detach().cpu().clone() for name, value in tensors.items()}


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack([value.double() for value in values]).mean(0)
