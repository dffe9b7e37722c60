"""Single steps of a tokenizer's training on given images, as the loop makes them."""

from pathlib import Path

import torch
from torch import Tensor

from mae_dat.config.groups import RunConfig
from mae_dat.runtime.console import Console
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.world import World
from mae_dat.training.context import RunContext
from mae_dat.training.prefetch import Prefetcher
from mae_dat.training.setup import Reporting, TrainingSetup
from mae_dat.training.tokenizer.trainer import TokenizerObjective, TokenizerState, TokenizerTrainer, tokenizer_optim


class SingleSteps:
    """A trainer without images of its own; `step` gives it a batch."""

    def __init__(self, objective: TokenizerObjective, trainer: type[TokenizerTrainer] = TokenizerTrainer) -> None:
        self.objective = objective
        self.state = TokenizerState(objective.tokenizer, objective.build_optimizer(), objective)
        run = RunConfig(seed=objective.config.seed)
        setup = TrainingSetup(
            context=RunContext(run, World(), objective.device, None, Console(quiet=True)),
            optim=tokenizer_optim(objective.config),
            loader=[],
            steps_per_epoch=1,
            log=RunLog(Path(), enabled=False),
            reporting=Reporting("train the tokenizer"),
        )
        self.trainer = trainer(self.state, setup)

    def step(self, step: int, image: Tensor) -> dict[str, float]:
        """Makes one update on images (B, C, H, W) in [0, 1] and returns what is logged of it."""
        numbers = torch.arange(len(image))
        batch = {"image": image, "label": numbers, "index": numbers, "skipped": 0 * numbers}
        self.trainer.prefetcher = Prefetcher([batch], 1, lag=0)  # type: ignore[list-item]
        self.state.step = step
        self.trainer.model.train()
        self.trainer.train_step()
        self.trainer.read_reports(lag=0)
        return self.objective.logged(self.trainer.last_metrics)
