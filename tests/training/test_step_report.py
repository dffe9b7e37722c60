"""What a step tells, read a step later: the same weights and logs, the same faults found, nothing unsound kept."""

import contextlib
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import exit_codes, start_ranks
from tiny_runs import one_thread
from whole_runs import (
    CPU,
    RUNS,
    _NaNAt,
    assert_equal_states,
    classifier,
    final_state,
    folder,
    records,
    setup_for,
    signal_in_step,
    state_after,
    state_of,
    still_images,
    surroundings,
    tokenizer,
)

from mae_dat.config.errors import DataError, InterruptError, NumericsError, RankError
from mae_dat.config.groups import AugmentConfig, OptimConfig
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.sampler import TrainSampler
from mae_dat.runtime.world import process_group, world_from_environment
from mae_dat.training import step_report as readback
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.optim import build_optimizer, step_optimizer, update_average
from mae_dat.training.step_report import DelayedReports, MicroBatch, RankRequests

__all__ = ["folder", "one_thread", "surroundings", "tokenizer"]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is one step behind, as it is with a GPU."""
    monkeypatch.setitem(readback.LAG, "cpu", 1)


@pytest.mark.parametrize("name", ["accumulation", "mixup, EMA, drop path"])
def test_reading_late_changes_nothing(
    name: str, folder: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lag in (0, 1):
        monkeypatch.setitem(readback.LAG, "cpu", lag)
        RUNS[name](folder, tmp_path / str(lag), tokenizer)
    states = [final_state(tmp_path / str(lag)) for lag in (0, 1)]
    delayed = [one["ranks"][0].pop("heard") for one in states]
    assert len(delayed[1]) > len(delayed[0]), "it is observed a step later"
    for one in states:
        for measured in ("seconds", "cpu_seconds"):
            one["ranks"][0]["totals"].pop(measured, None)
    assert_equal_states(*states)
    assert records(tmp_path / "0") == records(tmp_path / "1")
    weights = [(tmp_path / str(lag) / "model.safetensors").read_bytes() for lag in (0, 1)]
    assert weights[0] == weights[1]


def test_a_run_that_is_behind_resumes_bit_for_bit(late: None, folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    """DAT's strength follows what is read, so a checkpoint amid an epoch, which reads early, must not show."""
    RUNS["DAT"](folder, tmp_path / "whole", tokenizer)
    with signal_in_step(4, signal.SIGTERM), pytest.raises(InterruptError, match="at step 6 of 8"):
        RUNS["DAT"](folder, tmp_path / "stopped", tokenizer)
    assert final_state(tmp_path / "stopped")["step"] == 6, "all ranks hear of it a step later"
    RUNS["DAT"](folder, tmp_path / "stopped", tokenizer)
    assert_equal_states(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("step", [4, 5, 7])
def test_a_fault_that_is_read_late_has_changed_nothing(
    kind: str, step: int, late: None, folder: Path, tmp_path: Path
) -> None:
    """Amid an epoch, in its first step, and in its last one, which is read before anything is evaluated."""
    optim = OptimConfig(batch_size=8, epochs=2, warmup_epochs=0, lr=1e-3)
    state, images, evaluated = state_of(classifier(), _NaNAt(step, kind)), still_images(folder), []
    setup = setup_for(images, tmp_path, optim, at_epoch_end=lambda state, epoch, log: evaluated.append(epoch) or {})
    with pytest.raises(NumericsError, match=f"not finite at step {step} on rank 0") as error:
        Trainer(state, setup).run()
    (batch,) = TrainSampler(len(images), 8, 0, 1, 0, step, step + 1)
    assert all(images.samples[index][0] in str(error.value) for _, index in batch), "the files are named"
    assert state.step == step
    assert evaluated == [0]
    assert final_state(tmp_path)["step"] == 4
    assert all(bool(value.isfinite().all()) for value in final_state(tmp_path)["model"].values())
    assert_equal_states(dict(state.model.state_dict()), state_after(step, folder, tmp_path / "clean", optim))


def test_a_bad_image_is_heard_of_in_time(late: None, folder: Path, tmp_path: Path) -> None:
    """All steps before it are made; none is launched without its batch."""
    images = still_images(folder)
    bad = list(TrainSampler(34, 8, 0, 1, 0, 0, 8))[6][0]
    optim = OptimConfig(batch_size=8, epochs=2, warmup_epochs=0, lr=1e-3)

    class Torn(ImageFolder):
        def __getitem__(self, key: Any) -> Any:
            if key == bad:
                raise DataError("torn")
            return super().__getitem__(key)

    torn = Torn(folder / "train", images.transform)
    state = state_of(classifier(), Classification(AugmentConfig(), 10))
    with pytest.raises(DataError, match="torn"):
        Trainer(state, setup_for(torn, tmp_path, optim)).run()
    assert state.step == final_state(tmp_path)["step"] == 6


# ---- an update that is spoiled ----


@pytest.mark.parametrize(("opt", "fused"), [("adamw", True), ("adamw", False), ("sgd", True), ("lars", None)])
def test_a_spoiled_update_changes_neither_weights_nor_state(opt: str, fused: bool | None) -> None:
    model = classifier()
    optimizer = build_optimizer(model, 1e-3, 0.05, opt=opt)
    for group in optimizer.param_groups if fused is not None else ():
        group["fused"] = fused

    def update(scale: float, spoiled: float) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        step_optimizer(optimizer, torch.tensor(spoiled))

    def state() -> dict[str, Any]:
        kept = {number: dict(one) for number, one in optimizer.state_dict()["state"].items()}
        tensors = {**model.state_dict(), **{f"{n}.{k}": v for n, one in kept.items() for k, v in one.items()}}
        return {name: value.clone() for name, value in tensors.items()}

    start = state()
    update(0.1, 0.0)
    before = state()
    assert any(not torch.equal(value, start[name]) for name, value in before.items() if name in start)
    update(math.nan, 1.0)
    assert_equal_states(state(), before)
    update(0.1, 0.0)
    assert any(not torch.equal(value, before[name]) for name, value in state().items())


def test_a_spoiled_update_leaves_the_average() -> None:
    from timm.utils import ModelEmaV3

    model = classifier()
    ema, timms = ModelEmaV3(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        before = {name: value.clone() for name, value in ema.module.state_dict().items()}
        update_average(ema, model, step, torch.tensor(1.0))
        assert_equal_states(dict(ema.module.state_dict()), before)
        update_average(ema, model, step, torch.tensor(0.0))
        timms.update(model, step=step)
    for mine, theirs in zip(ema.module.parameters(), timms.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert any(not torch.equal(value, before[name]) for name, value in ema.module.state_dict().items())


def test_a_step_stays_spoiled() -> None:
    pending, requests = DelayedReports(CPU), RankRequests(save=True)
    for number, loss in enumerate((1.0, math.inf, 1.0)):
        batches = [MicroBatch([number], 0, {"loss": torch.tensor(loss), "share": torch.tensor(0.5)})]
        sums = pending.sum_over_ranks(batches, requests)
        pending.add(number, batches, None, 0.1, torch.tensor(2.0), sums)
    reports = list(pending.read(lag=0))
    assert [(one.bad_loss, one.update_skipped) for one in reports] == [(False, False), (True, True), (False, True)]
    assert reports[0].metrics == [{"loss": 1.0, "share": 0.5}]
    assert reports[0].requests == requests
    assert (reports[0].grad_norm, reports[0].lr) == (2.0, 0.1)
    assert reports[0].means == reports[0].metrics[0]


def test_means_are_over_the_micro_batches() -> None:
    pending = DelayedReports(CPU)
    batches = [MicroBatch([0], 0, {"loss": torch.tensor(loss), "share": torch.tensor(0.5)}) for loss in (1.0, 4.0)]
    pending.add(0, batches, None, 0.1, torch.tensor(2.0), pending.sum_over_ranks(batches, RankRequests()))
    (report,) = pending.read(lag=0)
    assert report.means == {"loss": 2.5, "share": 0.5}
    assert [metrics["loss"] for metrics in report.metrics] == [1.0, 4.0]


# ---- two ranks ----


def two_ranks(rank: int, folder: Path, output: Path) -> None:
    """One rank stops by a signal, then one has a fault, while both are a step behind."""
    from whole_runs import TINY, mae

    readback.LAG["cpu"] = 1
    mae.VIT_SIZES["vit_tiny"] = TINY
    images, world = still_images(folder), world_from_environment()
    optim = OptimConfig(batch_size=4, epochs=2, warmup_epochs=0, lr=1e-3)
    found: dict[str, Any] = {}
    with process_group(world, CPU):
        stopped = state_of(classifier(), Classification(AugmentConfig(), 10))
        real = Trainer.train_step

        def step(trainer: Trainer) -> None:
            if trainer.state is stopped and stopped.step == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            real(trainer)

        Trainer.train_step = step  # type: ignore[method-assign]
        try:
            Trainer(stopped, setup_for(images, output / "stopped", optim, world)).run()
        except InterruptError:
            found["stopped"] = stopped.step
        broken = state_of(classifier(), _NaNAt(2 if rank == 1 else 1000))
        try:
            Trainer(broken, setup_for(images, output / "broken", optim, world)).run()
        except (NumericsError, RankError) as error:
            found.update(broken=broken.step, told=str(error), weights=dict(broken.model.state_dict()))
    torch.save(found, output / f"rank{rank}.pt")


@pytest.mark.slow
def test_ranks_that_are_behind_agree(folder: Path, tmp_path: Path) -> None:
    codes = exit_codes(start_ranks(2, two_ranks, folder, tmp_path, log=tmp_path / "log"), 120)
    assert codes == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [one["stopped"] for one in ranks] == [4, 4]
    assert [one["broken"] for one in ranks] == [2, 2]
    assert all("not finite at step 2 on rank 1" in one["told"] for one in ranks)
    assert_equal_states(ranks[0]["weights"], ranks[1]["weights"])


# ---- a GPU ----


class _NoSync:
    """Launches steps under torch's check for operations that make the host wait."""

    def __init__(self) -> None:
        self.real_step, self.real_read, self.count = Trainer.train_step, Trainer.read_reports, 0

    def step(self, trainer: Trainer) -> None:
        self.count += 1
        with self.checked():
            self.real_step(trainer)

    def read(self, trainer: Trainer, lag: int) -> None:
        with self.checked():
            self.real_read(trainer, lag)

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error" if self.count > 2 else "default")  # the first ones allocate
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_no_step_makes_the_host_wait(
    clip_grad: float | None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, images = torch.device("cuda", 0), still_images(folder)
    optim = OptimConfig(batch_size=8, epochs=4, warmup_epochs=0, lr=1e-3, clip_grad=clip_grad)
    setup = setup_for(images, tmp_path, optim, device=device, precision=torch.bfloat16)
    steps = _NoSync()
    monkeypatch.setattr(Trainer, "train_step", lambda trainer: steps.step(trainer))
    monkeypatch.setattr(Trainer, "read_reports", lambda trainer, lag: steps.read(trainer, lag))
    state = state_of(classifier().to(device), Classification(AugmentConfig(mixup=0.8), 10))
    Trainer(state, setup).run()
    assert steps.count == state.step == 16
    assert bool(torch.stack([parameter.isfinite().all() for parameter in state.model.parameters()]).all())
