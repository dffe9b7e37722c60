"""Ranks whose clocks differ save together: what a checkpoint holds is gathered from all of them."""

import time
import types
from pathlib import Path

import pytest
from ranks import exit_codes, start_ranks

from mae_dat.config.groups import DataConfig, MaskConfig, OptimConfig, RunConfig
from mae_dat.config.runs import PretrainConfig
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.models import mae
from mae_dat.models.mae import MaeSize, ViTSize
from mae_dat.runtime.console import Console
from mae_dat.training import clock
from mae_dat.training.loop import Trainer
from mae_dat.training.pretrain import run_pretraining


def train_with_own_clock(rank: int, folder: Path, output: Path) -> None:
    mae.MAE_MODELS["mae_tiny"] = MaeSize(ViTSize(32, 8, 32, 2, 2), 16, 1, 2)
    saved = []
    real = Trainer.save
    Trainer.save = lambda self: (saved.append(self.state.step), real(self))[1]  # type: ignore[method-assign]
    seconds = iter(range(0, 1_000_000, 100)) if rank == 0 else iter([0.001 * tick for tick in range(1000)])
    clocks = types.SimpleNamespace(monotonic=lambda: next(seconds), process_time=time.process_time)
    clock.time = clocks  # type: ignore[assignment]
    run = RunConfig(str(output), device="cpu", precision="fp32", images_every=0, hang_minutes=0, save_minutes=1)
    data = DataConfig(str(folder), input_size=(32,), num_workers=0)
    optim = OptimConfig(batch_size=2, epochs=1, warmup_epochs=0, lr=1e-3)
    run_pretraining(PretrainConfig(run=run, data=data, mae=MaskConfig("mae_tiny"), optim=optim), Console(quiet=True))
    assert saved == [1, 2, 3, 4, 5], saved


@pytest.mark.slow
def test_the_first_clock_that_says_so_makes_all_ranks_save(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "images", FolderSettings(train=20, val=20, conflict=0, silhouette=0, size=32))
    ranks = start_ranks(2, train_with_own_clock, tmp_path / "images", tmp_path / "out", log=tmp_path / "log")
    codes = exit_codes(ranks, 60)
    assert codes == [0, 0], [(tmp_path / f"log-{rank}").read_text()[-2000:] for rank in (0, 1)]
