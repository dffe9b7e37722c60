"""The training loop with real images, models and signals: what it resumes, sums, refuses and reports."""

import dataclasses
import json
import logging
import os
import signal
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from whole_runs import (
    CPU,
    RUNS,
    SIDE,
    TINY,
    _NaNAt,
    assert_equal_states,
    classifier,
    data_config,
    final_state,
    folder,
    records,
    run_config,
    run_mae,
    setup_for,
    signal_in_step,
    state_after,
    state_of,
    still_images,
    surroundings,
    tokenizer,
)

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.errors import ConfigError, DataError, InterruptError, NumericsError, RankError
from mae_dat.config.groups import AugmentConfig, MaskConfig, OptimConfig
from mae_dat.config.parse import run_command
from mae_dat.config.runs import PretrainConfig
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.data.image_set import Batch, ImageFolder
from mae_dat.data.loader import eval_loader
from mae_dat.data.sampler import TrainSampler
from mae_dat.data.transforms import EvalTransform
from mae_dat.models import mae
from mae_dat.models.mae import MaeSize, build_mae
from mae_dat.models.tokenizer import LightTokenizer
from mae_dat.runtime import signals as stopping
from mae_dat.runtime.console import Console
from mae_dat.runtime.inputs import read_inputs
from mae_dat.runtime.run_log import RunLog
from mae_dat.runtime.world import World, process_group
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.training.accuracy import evaluate_accuracy
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.objectives.reconstruction import MaskedReconstruction
from mae_dat.training.optim import learning_rate
from mae_dat.training.pretrain import run_pretraining
from mae_dat.training.state import TrainingState

__all__ = ["folder", "surroundings", "tokenizer"]  # fixtures

# ---- whole runs, stopped and resumed ----


@pytest.mark.parametrize(
    ("name", "step", "number"),
    [
        ("mae", 2, signal.SIGTERM),
        ("accumulation", 2, signal.SIGINT),
        ("mixup, EMA, drop path", 5, signal.SIGINT),
        ("DAT", 5, signal.SIGUSR1),
    ],
)
def test_a_stopped_run_resumes_as_if_nothing_had_happened(
    name: str, step: int, number: int, folder: Path, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = RUNS[name]
    train(folder, tmp_path / "whole", tokenizer)
    handlers = signal.getsignal(number)
    with (
        signal_in_step(step, number),
        pytest.raises(InterruptError, match=r"stopped at step \d of \d+.*stopped") as stopped,
    ):
        train(folder, tmp_path / "stopped", tokenizer)
    assert stopped.value.exit_code == (130 if number == signal.SIGINT else 75)
    assert signal.getsignal(number) == handlers, "the handlers from before are back"
    assert not (tmp_path / "stopped" / "model.safetensors").exists()
    between = final_state(tmp_path / "stopped")
    assert between["step"] == step + 1
    with caplog.at_level(logging.INFO):
        train(folder, tmp_path / "stopped", tokenizer)
    assert "resuming from" in caplog.text
    assert f"(resumes at step {step + 1} of " in read_inputs(tmp_path / "stopped" / "inputs.json").rows["output"]
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert_equal_states(resumed, whole)
    moved = [not torch.equal(value, whole["model"][key]) for key, value in between["model"].items()]
    assert any(moved), "the resumed part trained"
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")
    points = records(tmp_path / "stopped", "steps.jsonl")
    assert points == records(tmp_path / "whole", "steps.jsonl")
    assert len(points) == resumed["step"], "a point for every step of such a short epoch"
    epochs = 3 if name == "accumulation" else 2
    assert [record["epoch"] for record in records(tmp_path / "stopped")] == list(range(epochs))
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    if name == "DAT":
        assert resumed["objective"]["controller"]["eps"] != 0.1
    if name.startswith("mixup"):
        assert any(not torch.equal(value, resumed["ema"][key]) for key, value in resumed["model"].items())


def test_a_second_signal_stops_at_once(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Copies of one request that a scheduler and a launcher send within two seconds are one request; a second Ctrl-C is
    a second one always."""
    real = Trainer.train_step
    stopped: list[InterruptError] = []
    cases = {
        "copies": (signal.SIGTERM, signal.SIGTERM, 0.0, 3),
        "Ctrl-C twice": (signal.SIGINT, signal.SIGINT, 0.0, 2),
        "later": (signal.SIGTERM, signal.SIGUSR2, stopping.ECHO_S + 1, 2),
    }
    for name, (first, second, later, saved) in cases.items():

        def interrupted(trainer: Trainer, case: Any = (first, second, later)) -> None:
            if trainer.state.step == 2:
                os.kill(os.getpid(), case[0])
                now = time.monotonic()
                with pytest.MonkeyPatch.context() as clock:
                    clock.setattr(stopping.time, "monotonic", lambda: now + case[2])
                    os.kill(os.getpid(), case[1])
                    time.sleep(0)  # the handler runs here, at the latest
            real(trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train_step", interrupted)
            with pytest.raises(InterruptError) as caught:
                run_mae(folder, tmp_path / name, tokenizer, save_minutes=0)
        stopped.append(caught.value)
        found = newest_checkpoint(tmp_path / name)
        assert found is not None
        assert found.step <= saved, name
        assert not list((tmp_path / name).glob(".*.tmp")), "what was being written is given up and cleared away"
    assert [one.exit_code for one in stopped] == [75, 130, 75]
    assert ["at once" in str(one) for one in stopped] == [False, True, True]


def test_a_bad_image_stops_the_run_between_two_steps(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    """What was learned up to it is saved, and the run goes on once the image is mended."""
    images = write_image_folder(
        tmp_path / "images", FolderSettings(train=34, val=20, conflict=10, silhouette=10, size=SIDE)
    )
    run_mae(images, tmp_path / "whole", tokenizer)
    bad = TrainSampler(34, 8, 0, 1, 0, 0, 8)
    _, index = list(bad)[2][3]  # in the third step
    path = Path(ImageFolder(images / "train", EvalTransform((SIDE, SIDE)), labeled=False).samples[index][0])
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=rf"{path.name}.*truncated"):
        run_mae(images, tmp_path / "stopped", tokenizer)
    assert final_state(tmp_path / "stopped")["step"] == 2
    path.write_bytes(good)
    with pytest.raises(ConfigError, match="(?s)the same names with other sizes.*--allow_change images"):
        run_mae(images, tmp_path / "stopped", tokenizer)
    run_mae(images, tmp_path / "stopped", tokenizer, allow_change=("images",))
    assert_equal_states(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))
    assert records(tmp_path / "stopped") == records(tmp_path / "whole")


def test_the_best_and_every_nth_checkpoint_are_kept(folder: Path, tmp_path: Path) -> None:
    optim = OptimConfig(batch_size=16, epochs=7, warmup_epochs=0, lr=1e-3)
    scores = iter([3.0, 9.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    run = dataclasses.replace(run_config(tmp_path), keep=2, keep_every=3)
    setup = setup_for(
        still_images(folder), tmp_path, optim, at_epoch_end=lambda *_: {"test_acc1": next(scores)}, run=run
    )
    Trainer(state_of(classifier(), Classification(AugmentConfig(), 10)), setup).run()
    manifests = {path: json.loads(path.read_text()) for path in sorted(tmp_path.glob("checkpoint-*.json"))}
    assert {round(one["epoch"]): one["score"] for one in manifests.values()} == {2: 9.0, 3: 1.0, 6: 5.0, 7: 6.0}


def test_a_rerun_of_a_complete_run_trains_nothing(
    folder: Path, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_mae(folder, tmp_path, tokenizer)
    before = {name: (tmp_path / name).read_bytes() for name in ("log.txt", "model.safetensors")}
    with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda trainer: pytest.fail("trained"))
        run_mae(folder, tmp_path, tokenizer)
    assert "is complete (8 steps)" in caplog.text
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_unreadable_images_are_replaced_and_counted(
    folder: Path, tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = write_image_folder(
        tmp_path / "images", FolderSettings(train=34, val=20, conflict=10, silhouette=10, size=SIDE)
    )
    train = sorted((images / "train").glob("*/*.png"))
    for path in train[:2]:
        path.write_bytes(b"")
    optim = OptimConfig(batch_size=17, epochs=1, warmup_epochs=0)
    data = dataclasses.replace(data_config(images), on_bad="skip")
    config = PretrainConfig(run=run_config(tmp_path / "out"), data=data, mae=MaskConfig("mae_tiny"), optim=optim)
    with caplog.at_level(logging.WARNING):
        run_pretraining(config, Console(quiet=True))
    assert records(tmp_path / "out")[0]["skipped"] == 2
    assert "replaced in this epoch: 2 unreadable images" in caplog.text


# ---- single steps ----


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Losses, learning rates and gradients of the steps to come, as the optimizer sees them."""
    seen: list[dict[str, Any]] = []
    real_show, real_apply = Trainer.show_progress, Trainer.apply_gradient
    gradients: dict[str, Any] = {}

    def show(trainer: Trainer) -> None:
        real_show(trainer)
        seen.append({"loss": trainer.loss, "lr": trainer.state.optimizer.param_groups[-1]["lr"], **gradients})
        gradients.clear()

    def apply(trainer: Trainer) -> Tensor:
        gradients["gradient"] = flat_gradient(trainer.state.model)
        norm = real_apply(trainer)
        gradients["norm"] = float(norm)
        return norm

    monkeypatch.setattr(Trainer, "show_progress", show)
    monkeypatch.setattr(Trainer, "apply_gradient", apply)
    return seen


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_accumulated_batches_equal_one_large_batch(folder: Path, tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    def train(batch_size: int, accum_iter: int) -> list[dict[str, Any]]:
        steps.clear()
        optim = OptimConfig(batch_size=batch_size, accum_iter=accum_iter, epochs=1, warmup_epochs=0, lr=1e-3)
        objective = Classification(AugmentConfig(smoothing=0.1), 10)
        Trainer(state_of(classifier(), objective), setup_for(still_images(folder), tmp_path, optim)).run()
        return list(steps)

    whole, halves = train(8, 1), train(4, 2)
    assert len(whole) == len(halves) == 4
    for one, other in zip(whole, halves, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["lr"] == other["lr"]
        torch.testing.assert_close(one["gradient"], other["gradient"], rtol=1e-3, atol=1e-5)
        assert one["norm"] == pytest.approx(other["norm"], rel=1e-3)
    assert (whole[0]["gradient"] - halves[0]["gradient"]).abs().max() < 1e-6
    assert whole[0]["gradient"].abs().max() > 1e-3


def test_the_optimizer_gets_the_schedules_rate(folder: Path, tmp_path: Path, steps: list[dict[str, Any]]) -> None:
    optim = OptimConfig(batch_size=8, epochs=3, warmup_epochs=1.5, blr=0.01, min_lr=1e-5)
    state = state_of(classifier(), Classification(AugmentConfig(), 10))
    Trainer(state, setup_for(still_images(folder), tmp_path, optim)).run()
    expected = [learning_rate(step / 4, 0.01 * 8 / 256, 1e-5, 1.5, 3) for step in range(12)]
    assert [step["lr"] for step in steps] == pytest.approx(expected)
    assert steps[0]["lr"] == 0
    assert steps[6]["lr"] == pytest.approx(0.01 * 8 / 256)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(kind: str, folder: Path, tmp_path: Path) -> None:
    optim = OptimConfig(batch_size=8, epochs=2, warmup_epochs=0, lr=1e-3)
    before: dict[str, Tensor] = {}
    state = state_of(classifier(), _NaNAt(5, kind))

    def keep(state: TrainingState, epoch: int, log: RunLog) -> dict[str, float]:
        before.update({key: value.clone() for key, value in state.model.state_dict().items()})
        return {}

    images = still_images(folder)
    setup = setup_for(images, tmp_path, optim, at_epoch_end=keep)
    with pytest.raises(NumericsError, match="not finite at step 5") as error:
        Trainer(state, setup).run()
    sampler = list(TrainSampler(len(images), 8, 0, 1, 0, 5, 6))
    for _, index in sampler[0]:
        assert images.samples[index][0] in str(error.value), "the files are named"
    assert state.step == 5
    saved = final_state(tmp_path)
    assert_equal_states(dict(saved["model"]), before)
    # One more step was made after the epoch's end: only the batch with the fault left no mark.
    assert_equal_states(dict(state.model.state_dict()), state_after(5, folder, tmp_path / "clean", optim))


def test_a_loss_that_is_not_finite_has_its_exit_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = OptimConfig(batch_size=8, epochs=1, warmup_epochs=0, lr=1e-3)
    trainer = Trainer(state_of(classifier(), _NaNAt(1)), setup_for(still_images(folder), tmp_path, optim))
    with pytest.raises(SystemExit) as stopped:
        run_command(trainer.run)
    assert stopped.value.code == 76
    told = capsys.readouterr().err
    assert told.startswith("error: not finite at step 1")
    assert "--clip_grad" in told
    batch = list(TrainSampler(34, 8, 0, 1, 0, 0, 2))[1]
    assert all(still_images(folder).samples[index][0] in told for _, index in batch), "the files of the batch are named"
    assert "Traceback" not in told


def test_the_gradient_is_clipped_and_its_norm_logged_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    applied = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: None = None) -> None:
        tensors = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.cat([gradient.flatten() for gradient in tensors]).norm()))
        applied(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    logged: list[float] = []

    def at_epoch_end(state: TrainingState, epoch: int, log: RunLog) -> dict[str, float]:
        logged.append(state.totals["grad_norm"] / 4)
        return {}

    for limit in (None, 0.05):
        optim = OptimConfig(batch_size=8, epochs=1, warmup_epochs=0, lr=1e-6, clip_grad=limit)
        state = state_of(classifier(), Classification(AugmentConfig(), 10))
        setup = setup_for(still_images(folder), tmp_path / str(limit), optim, at_epoch_end=at_epoch_end)
        Trainer(state, setup).run()
    assert min(norms[:4]) > 0.06
    assert norms[4:] == pytest.approx([0.05] * 4, rel=1e-3)
    assert logged[1] == pytest.approx(logged[0], rel=0.01), "at so small a rate both see the same gradients"
    assert logged[0] == pytest.approx(sum(norms[:4]) / 4, rel=1e-4)


def test_an_epochs_record_holds_means_and_what_evaluation_returns(folder: Path, tmp_path: Path) -> None:
    optim = OptimConfig(batch_size=8, epochs=1, warmup_epochs=0, lr=1e-3)
    lines: list[dict[str, float]] = []
    seen: list[float] = []

    class Recording(Classification):
        def loss(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
            seen.append(float((value := super().loss(model, image, prepared)).detach()))
            return value

    setup = setup_for(still_images(folder), tmp_path, optim, at_epoch_end=lambda state, epoch, log: {"test_acc1": 12.5})
    setup = dataclasses.replace(setup, log=RunLog(tmp_path, enabled=True))
    model = classifier()
    Trainer(state_of(model, Recording(AugmentConfig(), 10)), setup).run()
    setup.log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert len(lines) == 1
    assert lines[0]["train_loss"] == pytest.approx(sum(seen) / 4)
    assert lines[0]["test_acc1"] == 12.5
    assert (lines[0]["epoch"], lines[0]["step"], lines[0]["skipped"]) == (0, 4, 0)
    assert lines[0]["n_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lines[0]["train_lr"] == pytest.approx(learning_rate(0.75, 1e-3, 0, 0, 1))
    assert model.training


# ---- accuracy ----


def expected_accuracy(model: nn.Module, images: ImageFolder, indices: list[int]) -> dict[str, float]:
    """Image by image, by hand."""
    hits, hits5, losses = 0, 0, 0.0
    by_label: dict[int, list[bool]] = {}
    for index in indices:
        sample = images[index]
        logits = model(sample["image"][None])[0].double()
        order = logits.argsort(descending=True).tolist()
        hits += order[0] == sample["label"]
        by_label.setdefault(sample["label"], []).append(order[0] == sample["label"])
        hits5 += sample["label"] in order[:5]
        losses -= float(logits.log_softmax(0)[sample["label"]])
    count = len(indices)
    return {
        "test_acc1": 100 * hits / count,
        "test_acc5": 100 * hits5 / count,
        "test_balanced_acc": 100 * statistics.fmean(map(statistics.fmean, by_label.values())),
        "test_loss": losses / count,
    }


@pytest.mark.parametrize("batch_size", [1, 7, 34, 64])
def test_accuracy_is_exact_for_any_batch_size(batch_size: int, folder: Path) -> None:
    images, model = still_images(folder), classifier()
    with torch.no_grad():
        expected = expected_accuracy(model.eval(), images, list(range(34)))
    found = evaluate_accuracy(model.train(), eval_loader(images, batch_size, 0, 1, 0), CPU, None)
    assert found == pytest.approx(expected, rel=1e-5)
    assert 0 < found["test_acc5"] < 100
    assert model.training, "the flag of before is back"


def test_accuracy_leaves_replaced_images_out(tmp_path: Path) -> None:
    root = write_image_folder(
        tmp_path / "images", FolderSettings(train=30, val=20, conflict=10, silhouette=10, size=SIDE)
    )
    images = ImageFolder(root / "val", EvalTransform((SIDE, SIDE)), on_bad="skip")
    bad = [3, 8, 9]
    for index in bad:
        Path(images.samples[index][0]).write_bytes(b"no image")
    model = classifier().eval()
    with torch.no_grad():
        expected = expected_accuracy(model, images, [index for index in range(20) if index not in bad])
    assert evaluate_accuracy(model, eval_loader(images, 6, 0, 1, 0), CPU, None) == pytest.approx(expected, rel=1e-5)
    for path, _ in images.samples[1:]:
        Path(path).write_bytes(b"no image")
    one = ImageFolder(root / "val", EvalTransform((SIDE, SIDE)), on_bad="skip", max_skips=30)
    loader = eval_loader(one, 4, rank=1, world_size=20, num_workers=0)  # only the image at 1, which is unreadable
    with pytest.raises(DataError, match="no image to evaluate"):
        evaluate_accuracy(model, loader, CPU, None)


# ---- two processes ----


class _NoiseOfImage(MaskedReconstruction):
    """The mask belongs to the image, so that it is the same however the batch is shared out."""

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        image, (target, noise) = super().prepare(model, batch, generator)
        own = [torch.Generator().manual_seed(int(index)) for index in batch["index"]]
        return image, (target, torch.stack([torch.rand(noise.shape[1], generator=one) for one in own]))


def train_pieces(folder: Path, output: Path, tokenizer: Path, world: World, rank_size: int) -> dict[str, Any]:
    """MAE, then MAE with DAT, then a fault on rank 1; what this rank saw of them."""
    mae.MAE_MODELS["mae_tiny"], mae.VIT_SIZES["vit_tiny"] = MaeSize(TINY, 16, 1, 2), TINY
    torch.set_num_threads(1)
    optim = OptimConfig(batch_size=rank_size, epochs=1, warmup_epochs=0, lr=3e-3)
    losses: list[float] = []
    real = Trainer.show_progress

    def show(trainer: Trainer) -> None:
        assert isinstance(trainer.model, DistributedDataParallel) == (world.size > 1)
        real(trainer)
        losses.append(trainer.loss)

    images = still_images(folder)
    seen: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "show_progress", show)
        torch.manual_seed(0)
        plain = state_of(build_mae("mae_tiny", img_size=SIDE), _NoiseOfImage(0.5, True))
        Trainer(plain, setup_for(images, output / "plain", optim, world)).run()
        seen.update(losses=losses[:], weights=plain.model.state_dict())
        if world.size == 1:
            return seen
        words = LightTokenizer.from_file(tokenizer, engine_weights(tokenizer)).freeze()
        config = DatConfig("released", share=0.05).attack
        assert config is not None
        dat = state_of(build_mae("mae_tiny", img_size=SIDE), WithDAT(words, config, _NoiseOfImage(0.5, True)))
        Trainer(dat, setup_for(images, output / "dat", optim, world)).run()
        seen.update(dat=dat.model.state_dict(), eps=dat.objective.state_dict()["controller"]["eps"])
        broken = state_of(classifier(), _NaNAt(2 if world.rank == 1 else 1000))
        try:
            Trainer(broken, setup_for(images, output / "broken", optim, world)).run()
        except (NumericsError, RankError) as error:
            seen.update(stopped=broken.step, told=str(error))
    return seen


def engine_weights(path: Path) -> Any:
    from mae_dat.storage.weight_files import read_weights

    return read_weights(path)


def one_of_two(rank: int, folder: Path, output: Path, tokenizer: Path, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = World(rank, 2, rank)
    with process_group(world, CPU):
        seen = train_pieces(folder, output, tokenizer, world, 4)
    torch.save(seen, output / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_processes_learn_what_one_does(folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (folder, tmp_path / "two", tokenizer, port), nprocs=2)
    ranks = [torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = train_pieces(folder, tmp_path / "one", tokenizer, World(), 8)
    for name in ("weights", "dat"):
        assert_equal_states(dict(ranks[0][name]), dict(ranks[1][name]))
    assert ranks[0]["eps"] == ranks[1]["eps"] != 0.1
    together = [sum(pair) / 2 for pair in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert together == pytest.approx(alone["losses"], abs=1e-5)
    assert len(together) == 4
    for key, value in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][key], value, rtol=0, atol=2e-4)
    assert [one["stopped"] for one in ranks] == [2, 2]
    assert "not finite at step 2" in ranks[0]["told"]
    assert newest_checkpoint(tmp_path / "two" / "plain") is not None
