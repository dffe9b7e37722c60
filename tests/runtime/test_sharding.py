"""Models in shards (FSDP2) against copies (DDP) on two ranks: losses, checkpoints, galleries, accuracy, faults."""

import dataclasses
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import exit_codes, start_ranks
from safetensors.torch import load_file
from tiny_runs import MEASURED
from torch import Tensor, nn

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.errors import InterruptError, NumericsError, RankError, UserError
from mae_dat.config.groups import (
    AugmentConfig,
    ClassifierConfig,
    DataConfig,
    LaunchConfig,
    MaskConfig,
    OptimConfig,
    RunConfig,
)
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.loader import eval_loader
from mae_dat.data.transforms import EvalTransform
from mae_dat.models import mae
from mae_dat.models.classifier import build_classifier
from mae_dat.models.mae import MaeSize, ViTSize
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.runtime.blocks import model_blocks
from mae_dat.runtime.console import Console
from mae_dat.runtime.run_log import read_log
from mae_dat.runtime.sharding import full_state_dict, is_sharded, load_model_state, shard_model
from mae_dat.runtime.world import process_group, world_from_environment
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.training.accuracy import evaluate_accuracy, synchronized
from mae_dat.training.context import run_context
from mae_dat.training.finetune import run_finetuning
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.pretrain import run_pretraining

SIDE = 32
TINY = ViTSize(SIDE, 8, 32, 2, 2)
CPU = torch.device("cpu")


def small_models() -> None:
    mae.MAE_MODELS["mae_tiny"], mae.VIT_SIZES["vit_tiny"] = MaeSize(TINY, 16, 1, 2), TINY


# ---- on two ranks ----


def run_of(folder: Path, output: Path, shards: bool, **changes: Any) -> dict[str, Any]:
    run = RunConfig(output_dir=str(output), device="cpu", precision="fp32", images_every=0, hang_minutes=0)
    return {
        "run": dataclasses.replace(run, **changes),
        "data": DataConfig(data_path=str(folder), input_size=(SIDE,), num_workers=0),
        "launch": LaunchConfig(fsdp=shards),
    }


def run_mae(folder: Path, output: Path, shards: bool) -> None:
    optim = OptimConfig(batch_size=4, epochs=2, warmup_epochs=0, lr=3e-3, accum_iter=2, clip_grad=0.5)
    run_pretraining(
        PretrainConfig(mae=MaskConfig("mae_tiny"), optim=optim, **run_of(folder, output, shards)), Console(quiet=True)
    )


def run_dat(folder: Path, output: Path, shards: bool) -> None:
    """With an adversary, mixup, an average of the weights, galleries, and an uneven number of batches to evaluate."""
    config = FinetuneConfig(
        classifier=ClassifierConfig("vit_tiny", ema_decay=0.8, drop_path=0.2),
        augment=AugmentConfig(mixup=0.8),
        optim=OptimConfig(batch_size=4, epochs=2, warmup_epochs=0, lr=3e-3),
        dat=DatConfig("released", share=0.05, tokenizer=str(folder.parent / "tokenizer.safetensors")),
        **run_of(folder, output, shards, images_every=1),
    )
    run_finetuning(config, Console(quiet=True))


def run_probe(folder: Path, output: Path, shards: bool) -> None:
    config = FinetuneConfig(
        classifier=ClassifierConfig("vit_tiny", linear_probe=True, opt="lars"),
        optim=OptimConfig(batch_size=4, epochs=1, warmup_epochs=0, lr=3.0),
        **run_of(folder, output, shards),
    )
    run_finetuning(config, Console(quiet=True))


def run_resnet(folder: Path, output: Path, shards: bool) -> None:
    """BatchNorm's buffers, which are not sharded, and an average of them."""
    config = FinetuneConfig(
        classifier=ClassifierConfig("resnet18", ema_decay=0.8),
        optim=OptimConfig(batch_size=4, epochs=1, warmup_epochs=0, lr=1e-4, clip_grad=1.0),
        **run_of(folder, output, shards),
    )
    run_finetuning(config, Console(quiet=True))


RUNS = {"mae": run_mae, "dat": run_dat, "probe": run_probe, "resnet": run_resnet}


@contextmanager
def stopping_at(step: int, rank: int) -> Iterator[None]:
    """Send this rank, if it is rank 1, a signal in the middle of a step."""
    real = Trainer.train_step

    def interrupted(trainer: Trainer) -> None:
        if trainer.state.step == step and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", interrupted)
        with pytest.raises(InterruptError):
            yield


class _NaNAt(Classification):
    """A loss of NaN after `left` losses."""

    left = math.inf

    def loss(self, model: nn.Module, image: Tensor, prepared: Tensor) -> Tensor:
        self.left -= 1
        return super().loss(model, image, prepared) * (math.nan if self.left == 0 else 1.0)


def both_ways(rank: int, folder: Path, output: Path) -> None:
    """Every kind of run in copies and in shards: uninterrupted, and resumed in the other form."""
    small_models()
    for shards in (False, True):
        name = "shards" if shards else "copies"
        for kind, run in RUNS.items():
            run(folder, output / f"{kind}, {name}", shards)
        for kind, other in ("mae", not shards), ("dat", True):
            resumed = output / f"{kind}, {name} then {'shards' if other else 'copies'}"
            with stopping_at(3, rank):
                RUNS[kind](folder, resumed, shards)
            RUNS[kind](folder, resumed, other)
    torch.save(evaluation(rank, folder) | nan_on_rank_1(rank, folder, output / "nan"), output / f"rank{rank}.pt")


def evaluation(rank: int, folder: Path) -> dict[str, Any]:
    """Accuracy of shards where the ranks have different numbers of batches, or no image at all."""
    results: dict[str, Any] = {}
    with process_group(world_from_environment(), CPU):
        model = labeling_model()
        shard_model(model, world_from_environment(), CPU)
        images = ImageFolder(folder / "val", EvalTransform((SIDE, SIDE)))
        for count in (19, 1):
            images.samples = images.samples[:count]
            loader = eval_loader(images, 3, rank, 2, 0)
            results[f"batches of {count}"] = [counted for _, counted in synchronized(loader, model)]
            results[f"accuracy of {count}"] = evaluate_accuracy(model, loader, CPU, None)
    return results


def nan_on_rank_1(rank: int, folder: Path, output: Path) -> dict[str, Any]:
    """NaN on rank 1 in its 3rd step: the weights that are left, and those of the same run without it before step 3."""
    results: dict[str, Any] = {}
    real_step, real_read = Trainer.train_step, Trainer.read_reports

    def step(trainer: Trainer) -> None:
        state = trainer.state
        if state.step == 2:
            results["before"] = full_state_dict(state.model.state_dict())
            local = [value.to_local() for value in state.model.state_dict().values()]  # type: ignore[operator]
            results["share"] = sum(map(torch.numel, local)) / sum(map(torch.numel, state.model.parameters()))
            states = [one["exp_avg"].to_local().shape for one in state.optimizer.state.values()]
            results["states"] = sum(map(math.prod, states)) / sum(map(torch.numel, state.model.parameters()))
            state.objective.left = 1 if rank == 1 else math.inf  # type: ignore[attr-defined]
        real_step(trainer)

    def read(trainer: Trainer, lag: int) -> None:
        try:
            real_read(trainer, lag)
        except UserError as error:  # on both ranks alike, or the line below waits for ever
            after = full_state_dict(trainer.state.model.state_dict())
            results.update(after=after, code=error.exit_code, message=str(error))
            raise

    config = FinetuneConfig(
        classifier=ClassifierConfig("vit_tiny"),
        optim=OptimConfig(batch_size=4, epochs=1, warmup_epochs=0, lr=3e-3),
        **run_of(folder, output, True),
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises((NumericsError, RankError)):
        patch.setattr(Trainer, "train_step", step)
        patch.setattr(Trainer, "read_reports", read)
        patch.setattr("mae_dat.training.objectives.configured.Classification", _NaNAt)
        run_finetuning(config, Console(quiet=True))
    return results


def labeling_model() -> nn.Module:
    torch.manual_seed(0)
    model = build_classifier("vit_tiny", 10, (SIDE, SIDE), 0.0)
    nn.init.normal_(model.net.head.weight, std=0.05)  # its own start is near 0: all logits alike
    return model


# ---- their results ----


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folders of `both_ways`, and the results of its ranks."""
    root = tmp_path_factory.mktemp("parallel")
    write_image_folder(root / "images", FolderSettings(train=34, val=20, conflict=10, silhouette=10, size=SIDE))
    torch.manual_seed(0)
    tokenizer = LightTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32))
    tokenizer.save(root / "tokenizer.safetensors")
    codes = exit_codes(start_ranks(2, both_ways, root / "images", root, log=root / "log"), 240)
    assert codes == [0, 0], (root / "log-0").read_text() + (root / "log-1").read_text()
    return root


def records(output: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in record.items() if key not in MEASURED} for record in read_log(output / "log.txt")
    ]


def final_state(output: Path) -> dict[str, Any]:
    checkpoint = newest_checkpoint(output)
    assert checkpoint is not None
    return checkpoint.load()


def tensors_of(state: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a nested state, by its path."""
    if isinstance(state, dict | list):
        pairs = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: value for number, one in pairs for key, value in tensors_of(one, f"{name}/{number}").items()}
    return {name: state} if isinstance(state, Tensor) else {}


def assert_close(folder: Path, expected: Path, atol: float) -> None:
    mine, theirs = tensors_of(final_state(folder)), tensors_of(final_state(expected))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(RUNS))
def test_shards_learn_what_copies_do(kind: str, outputs: Path) -> None:
    copies, shards = outputs / f"{kind}, copies", outputs / f"{kind}, shards"
    assert len(records(copies)) >= 1
    for mine, theirs in zip(records(shards), records(copies), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert_close(shards, copies, 1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (copies, shards)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert value.shape == weights[1][name].shape
    assert sorted(path.name for path in (shards / "images").glob("*")) == (["adversary.png"] if kind == "dat" else [])


@pytest.mark.slow
def test_a_run_in_shards_resumes_bit_for_bit(outputs: Path) -> None:
    uninterrupted, resumed = outputs / "dat, shards", outputs / "dat, shards then shards"
    assert_close(resumed, uninterrupted, 0.0)
    assert records(resumed) == records(uninterrupted)
    assert (resumed / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "like"),
    [
        ("mae, copies then shards", "mae, copies"),
        ("mae, shards then copies", "mae, copies"),
        ("dat, copies then shards", "dat, copies"),
    ],
)
def test_a_checkpoint_resumes_in_the_other_form(run: str, like: str, outputs: Path) -> None:
    for mine, theirs in zip(records(outputs / run), records(outputs / like), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert_close(outputs / run, outputs / like, 1e-4)


@pytest.mark.slow
def test_accuracy_of_shards_is_exact_with_uneven_shares(outputs: Path) -> None:
    small_models()
    model = labeling_model()
    images = ImageFolder(outputs / "images" / "val", EvalTransform((SIDE, SIDE)))
    ranks = [torch.load(outputs / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [rank["batches of 19"] for rank in ranks] == [[True] * 4, [True] * 3 + [False]]
    assert [rank["batches of 1"] for rank in ranks] == [[True], [False]]
    for count in (19, 1):
        images.samples = images.samples[:count]
        expected = evaluate_accuracy(model, eval_loader(images, 5, 0, 1, 0), CPU, None)
        assert ranks[0][f"accuracy of {count}"] == ranks[1][f"accuracy of {count}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_nan_on_one_rank_stops_all_shards_before_the_weights_change(outputs: Path) -> None:
    ranks = [torch.load(outputs / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [rank["code"] for rank in ranks] == [76, 76]
    for name in ("share", "states"):
        assert [rank[name] for rank in ranks] == pytest.approx([0.5, 0.5], abs=0.05), "each rank has half of everything"
    assert all("not finite at step 2 on rank 1" in rank["message"] for rank in ranks)
    before, after = ranks[0]["before"], ranks[0]["after"]
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


# ---- a single process ----


def test_model_blocks() -> None:
    small_models()
    vit = build_classifier("vit_tiny", 10, (SIDE, SIDE), 0.0)
    assert [type(block).__name__ for block in model_blocks(vit)] == ["Block", "Block"]
    autoencoder = mae.build_mae("mae_tiny", img_size=SIDE)
    assert len(model_blocks(autoencoder)) == 3, "of the encoder and of the decoder"
    resnet = build_classifier("resnet18", 10, (SIDE, SIDE), 0.0)
    blocks = model_blocks(resnet)
    assert sum(p.numel() for block in blocks for p in block.parameters()) > 0.9 * sum(
        p.numel() for p in resnet.parameters()
    )
    assert not any(isinstance(block, nn.Sequential | nn.ModuleList) for block in blocks)
    assert not is_sharded(vit)


def test_a_single_rank_warns_that_it_shards_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = run_of(tmp_path, tmp_path / "output", True)
    with run_context(config["run"], config["launch"], Console(quiet=True)) as context:
        assert not context.sharded
    assert "--fsdp: a single rank" in caplog.text


def test_a_state_without_shards_is_returned_as_it_is() -> None:
    model = nn.Linear(3, 2)
    state = {"model": model.state_dict(), "list": [1, {"x": torch.ones(2)}], "step": 3}
    given = full_state_dict(state)
    assert given["model"]["weight"] is state["model"]["weight"]  # type: ignore[index]
    assert given["list"][0] == 1
    assert given["step"] == 3
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model_state(model, {"weight": torch.zeros(2, 3)})
