"""The commands as a user calls them, end to end on tiny generated images."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_runs import (
    FINETUNE,
    PRETRAIN,
    ROOT,
    draw_folder,
    environment,
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
    outcome_of,
    pretrain_in,
    run_script,
    save_tokenizer,
    verb,
)

from mae_dat.robustness.scores.results import read_results
from mae_dat.runtime.run_log import read_log
from mae_dat.storage.weight_files import read_weights

finetune_main = verb("finetune")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "light.safetensors")


def card(folder: Path) -> dict[str, Any]:
    """The facts beside exported weights."""
    facts: dict[str, Any] = json.loads((folder / "model.json").read_text())
    return facts


def test_three_commands_lead_from_images_to_a_report(
    images: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, first, second = ["--data_path", images], tmp_path / "one", tmp_path / "two"
    dat = ["--dat", "--tokenizer", tokenizer, "--dat_share", "0.1", "--images_every", "1"]
    done = run_script("main_pretrain.py", *PRETRAIN, *data, "--output_dir", first)
    assert done.returncode == 0, done.stderr
    assert "effective batch 8" in done.stderr
    assert "peak learning rate" in done.stderr
    done = run_script("main_finetune.py", *FINETUNE, *data, "--finetune", first, "--output_dir", second, *dat)
    assert done.returncode == 0, done.stderr
    assert "val acc1" in done.stderr
    record = read_log(second / "log.txt")[-1]
    assert record["train_changed_words"] > 0
    assert {"train_loss_clean", "train_loss_adversarial", "train_eps", "test_acc1"} <= record.keys()
    assert (second / "images" / "adversary.png").is_file()
    suite = ["--suite", "clean", "generated", "conflict", "--limit_corrupted", "4", "--num_workers", "0"]
    monkeypatch.chdir(tmp_path)
    given = [*map(str, data), "--eval", "--resume", str(second), *suite]
    evaluated = outcome_of(finetune_main, given, monkeypatch, capsys)
    assert evaluated.code == 0, evaluated.stderr
    assert not (tmp_path / "output_dir").exists()
    check_report(second / "evaluation")


def check_report(folder: Path) -> None:
    """A report of all clean images, of 4 of them under every corruption, and of conflicting textures."""
    assert "<html" in (folder / "report.html").read_text()
    (cells,) = read_results(folder / "results.json")["cells"].values()
    assert cells["clean"][""]["total"] == 20  # all: --limit_corrupted is for the corruptions
    assert len(cells["generated"]) == 75
    assert all(cell["total"] == 4 for cell in cells["generated"].values())
    assert 0 < cells["conflict"][""]["total"] <= 20


def test_evaluation_takes_size_and_model_from_the_weights(
    images: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--data_path", str(images), "--eval", "--num_workers", "0", "--resume"]
    assert outcome_of(finetune_main, [*given, str(classifier)], monkeypatch, capsys).code == 0
    found = outcome_of(finetune_main, [*given, str(classifier / "model.safetensors")], monkeypatch, capsys)
    trained = read_log(classifier / "log.txt")[-1]["test_acc1"]
    assert f"val acc1 {trained:.2f} %" in found.stderr


def test_a_missing_class_does_not_shift_the_others(
    images: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = card(classifier)["classes"]
    given = ["--eval", "--num_workers", "0", "--output_dir", str(tmp_path / "out"), "--resume", str(classifier)]
    hits = []
    for name in names:
        shutil.copytree(images / "val" / name, tmp_path / name / "val" / name)
        found = outcome_of(finetune_main, [*given, "--data_path", str(tmp_path / name)], monkeypatch, capsys)
        hits.append(float(found.stderr.partition("acc1 ")[2].split()[0]))
    total = read_log(classifier / "log.txt")[-1]["test_acc1"]
    assert sum(hits) / len(hits) == pytest.approx(total, abs=0.01)  # every class has two images


def test_an_interrupted_fine_tuning_is_evaluated_from_its_checkpoint(
    images: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--cls_token", "--ema_decay", "0.5", "--finetune", str(pretrained)]
    final = finetune_in(tmp_path / "out", images, *flags)
    (tmp_path / "out" / "model.safetensors").unlink()
    given = ["--data_path", str(images), "--eval", "--num_workers", "0", "--resume", str(tmp_path / "out")]
    found = outcome_of(finetune_main, [*given, "--output_dir", str(tmp_path / "new")], monkeypatch, capsys)
    assert f"val acc1 {final['test_acc1']:.2f} %" in found.stderr


def test_the_environment_names_the_images(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DAT_DATA", str(images))
    pretrain_in(tmp_path / "out", "")  # an empty --data_path counts as none
    assert card(tmp_path / "out")["steps"] == 3


def test_demo_means_generated_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DAT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("mae_dat.data.open.write_image_folder", draw_folder)
    pretrain_in(tmp_path / "out", "demo")
    assert card(tmp_path / "out")["steps"] == 3
    assert list((tmp_path / "home").glob("generated-*/train/disc/*.png"))


def test_pretraining_takes_a_flat_folder_and_other_shapes(tmp_path: Path) -> None:
    for index in range(8):
        Image.new("RGB", (70 + index, 50), (20 * index, 90, 10)).save(tmp_path / f"photo{index}.png")
    output = pretrain_in(tmp_path / "out", tmp_path, "--input_size", "16", "64", "--images_every", "1")
    assert card(output)["input_size"] == [16, 64]
    assert (output / "images" / "reconstruction.png").is_file()


def test_a_grid_is_resized_by_its_rows_and_columns(images: Path, tmp_path: Path, caplog: Any) -> None:
    wide = pretrain_in(tmp_path / "wide", images, "--input_size", "16", "64")  # 2 x 8 patches, as many as 4 x 4
    with caplog.at_level(logging.INFO):
        finetune_in(tmp_path / "out", images, "--finetune", str(wide))
    assert "position embedding resized from 2 x 8 to 4 x 4" in caplog.text


def test_gray_images_have_one_channel(images: Path, tmp_path: Path) -> None:
    gray = ["--in_chans", "1"]
    output = pretrain_in(tmp_path / "mae", images, *gray)
    assert read_weights(output / "model.safetensors").tensors["patch_embed.proj.weight"].shape[1] == 1
    final = finetune_in(tmp_path / "out", images, *gray, "--finetune", str(output))
    assert 0 <= final["test_acc1"] <= 100
    assert card(tmp_path / "out")["in_chans"] == 1


def test_options_of_fine_tuning_work_together(images: Path, pretrained: Path, tmp_path: Path) -> None:
    mixing = ["--mixup", "0.8", "--cutmix", "1.0", "--aa", "rand-m9-mstd0.5-inc1", "--reprob", "0.25"]
    update = ["--accum_iter", "2", "--ema_decay", "0.9", "--clip_grad", "1", "--epochs", "4", "--cls_token"]
    finetune_in(tmp_path / "out", images, "--finetune", str(pretrained), *mixing, *update)
    facts = card(tmp_path / "out")
    assert facts["global_pool"] is False
    assert facts["steps"] == 4, "updates: 24 images hold one of 16 in each epoch"
    assert [record["epoch"] for record in read_log(tmp_path / "out" / "log.txt")] == [0, 1, 2, 3]
    # What is exported is the average, not the weights of the last step.
    exported = read_weights(tmp_path / "out" / "model.safetensors").tensors
    last = torch.load(tmp_path / "out" / "checkpoint-00000004.pth", weights_only=True)
    assert torch.equal(exported["head.weight"], last["ema"]["net.head.weight"])
    assert not torch.equal(exported["head.weight"], last["model"]["net.head.weight"])


def test_dat_in_pretraining(images: Path, tokenizer: Path, tmp_path: Path) -> None:
    output = pretrain_in(
        tmp_path / "out", images, "--dat", "random", "--tokenizer", str(tokenizer), "--images_every", "1"
    )
    (record,) = read_log(output / "log.txt")
    assert record["train_loss"] == pytest.approx(record["train_loss_clean"] + record["train_loss_adversarial"])
    assert record["train_changed_words"] == pytest.approx(0.05, abs=0.02)
    assert (output / "images" / "adversary.png").is_file()


def test_a_rerun_goes_on_or_says_that_all_is_done(images: Path, tmp_path: Path, caplog: Any) -> None:
    pretrain_in(tmp_path / "out", images)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    with caplog.at_level(logging.INFO):
        pretrain_in(tmp_path / "out", images)
    assert "is complete" in caplog.text
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights
    with caplog.at_level(logging.INFO):
        pretrain_in(tmp_path / "out", images, "--epochs", "2", "--allow_change", "epochs")
    assert "resuming from" in caplog.text
    assert [record["epoch"] for record in read_log(tmp_path / "out" / "log.txt")] == [0, 1]
    assert card(tmp_path / "out")["steps"] == 6


def test_a_config_file_is_read_and_overridden(images: Path, tmp_path: Path) -> None:
    recipe = str(ROOT / "configs" / "small_pretrain.yaml")
    pretrain_in(tmp_path / "out", images, "--config", recipe)
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert "norm_pix_loss: true" in text  # the file's
    assert "batch_size: 8" in text  # the command line's
    again = pretrain_in(tmp_path / "again", images, "--config", str(tmp_path / "out" / "config.yaml"))
    ours, theirs = (read_weights(folder / "model.safetensors").tensors for folder in (tmp_path / "out", again))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("script", "groups"),
    [
        ("main_pretrain.py", ("Output", "Data", "Model", "Optimization", "Discrete Adversarial", "Distributed")),
        ("main_finetune.py", ("Output", "Data", "Model", "Augmentation", "Optimization", "Evaluation", "Distributed")),
    ],
)
def test_help_names_every_group(script: str, groups: tuple[str, ...]) -> None:
    done = run_script(script, "--help", COLUMNS="120")
    assert done.returncode == 0, done.stderr
    assert all(group in done.stdout for group in groups)
    assert "--data_path" in done.stdout
    assert "--config" in done.stdout


@pytest.mark.slow
def test_two_processes_have_one_writer(images: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [sys.executable, *torchrun, "main_pretrain.py", *PRETRAIN, "--data_path", str(images)]
    command += ["--output_dir", str(tmp_path / "out"), "--batch_size", "4", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (record,) = read_log(tmp_path / "out" / "log.txt")
    assert record["step"] == 3
    assert done.stderr.count("effective batch 8 (4 x 1 x 2 ranks)") == 1
    assert done.stderr.count("inputs of mae-dat pretrain:") == 1
    assert ", no workers, 2 ranks\n" in done.stderr
    assert len(list((tmp_path / "out").glob("events.out.tfevents.*"))) == 1
