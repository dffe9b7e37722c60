"""What users get wrong: one message that names the file or value and the fix, an exit code, no traceback, no loss."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import (
    FINETUNE,
    PRETRAIN,
    ROOT,
    Outcome,
    draw_folder,
    environment,
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
    outcome_of,
    save_tokenizer,
    verb,
)

from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.runtime.run_log import read_log
from mae_dat.storage.checkpoint import newest_checkpoint

finetune_main, pretrain_main = verb("finetune"), verb("pretrain")

Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "images", train=20, conflict=0)


@pytest.fixture(scope="module")
def classifier(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("classifier")
    finetune_in(output, images)
    return output


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def call(*arguments: str | Path) -> Outcome:
        given = [*PRETRAIN, "--output_dir", str(tmp_path / "out"), *map(str, arguments)]
        return outcome_of(pretrain_main, given, monkeypatch, capsys)

    return call


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    def call(*arguments: str | Path) -> Outcome:
        given = [*FINETUNE, "--output_dir", str(tmp_path / "out"), *map(str, arguments)]
        return outcome_of(finetune_main, given, monkeypatch, capsys)

    return call


def refused(outcome: Outcome, *words: str | Path) -> None:
    """The command failed with one message that holds all of `words`."""
    assert outcome.code not in (0, 1), outcome.stderr
    assert "Traceback" not in outcome.stderr
    message = outcome.stderr.partition("error: ")[2] or outcome.stderr
    for word in words:
        assert str(word) in message, outcome.stderr


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# ---- images ----


def test_no_images_are_named(pretrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAE_DAT_DATA", raising=False)
    refused(pretrain(), "--data_path DIR", "MAE_DAT_DATA", "--data_path demo")


def test_no_such_folder(pretrain: Run, images: Path) -> None:
    wrong = images.parent / "imagse"
    refused(pretrain("--data_path", wrong), wrong, f"did you mean {images}")


def test_an_empty_folder(pretrain: Run, finetune: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(pretrain("--data_path", tmp_path / "empty"), tmp_path / "empty", "contains no images")
    refused(finetune("--data_path", tmp_path / "empty"), tmp_path / "empty", "train/<class>/*.jpg")


def test_a_class_without_an_image(finetune: Run, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "train" / "zebra").mkdir()
    refused(finetune("--data_path", tmp_path / "data"), tmp_path / "data/train/zebra", "no image", "delete the folder")


def write_text(path: Path) -> None:
    path.write_text("no image")


def write_web_page(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html></html>")


def write_truncated(path: Path) -> None:
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:600])


BAD_FILES = {
    "not an image": write_text,
    "web page": write_web_page,
    "damaged or truncated": write_truncated,
    "empty": Path.touch,
}


@pytest.mark.parametrize(("cause", "write"), BAD_FILES.items())
def test_a_bad_file_is_named(pretrain: Run, tmp_path: Path, cause: str, write: Callable[[Path], None]) -> None:
    for index in range(7):
        Image.new("RGB", (32, 32), (30 * index, 0, 0)).save(tmp_path / f"{index}.png")
    write(tmp_path / "bad.jpg")
    refused(pretrain("--data_path", tmp_path), tmp_path / "bad.jpg", cause, "--on_bad skip")


def test_a_bad_file_is_named_from_a_worker(pretrain: Run, tmp_path: Path) -> None:
    for index in range(8):
        (tmp_path / f"{index}.jpg").touch()
    Image.new("RGB", (32, 32)).save(tmp_path / "good.png")
    flags = ["--num_workers", "1", "--images_every", "0"]
    refused(pretrain("--data_path", tmp_path, *flags), ".jpg: the file is empty")


def test_bad_files_can_be_skipped_and_are_counted(finetune: Run, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "data")
    for name in sorted((images / "train").iterdir())[:3]:
        (tmp_path / "data" / "train" / name.name / "bad.jpg").touch()
    skip = ["--on_bad", "skip", "--batch_size", "2"]
    assert finetune("--data_path", tmp_path / "data", *skip).code == 0
    (record,) = read_log(tmp_path / "out" / "log.txt")
    assert 1 <= record["skipped"] <= 4  # 22 of 23 images are drawn; a bad one's successor may be drawn twice


def test_every_kind_of_image_is_read(pretrain: Run, tmp_path: Path) -> None:
    color = Image.effect_noise((40, 40), 80).convert("RGB")
    for index, mode in enumerate(("L", "1", "P", "CMYK", "YCbCr", "LA", "RGBA", "RGB")):
        suffix = "jpg" if mode in ("CMYK", "YCbCr") else "png"
        color.convert(mode).save(tmp_path / f"{index}.{suffix}")
    Image.new("I;16", (40, 40), 40000).save(tmp_path / "16bit.png")
    assert pretrain("--data_path", tmp_path, "--batch_size", "9").code == 0


# ---- sizes and values ----


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input_size", "30"], ("30 is not divisible by patch size 8", "use 24 or 32")),
        (["--input_size", "32", "32", "32"], ("--input_size", "32 32 32")),
        (["--in_chans", "5"], ("the 5 of --in_chans", "have to be TIFF")),
        (["--model", "mae_vit_demo_patch9"], ("mae_vit_demo_patch9", "did you mean mae_vit_demo_patch8")),
        (["--mask_ratio", "1.5"], ("--mask_ratio", "1.5")),
        (["--mask_ratio", "0.999"], ("0.999", "keeps 0 of 16 patches")),
        (["--batch_size", "64"], ("20 images", "64", "--batch_size")),
        (["--device", "gpu"], ("--device gpu", "cpu or auto")),
        (["--epoch", "3"], ("--epoch", "--epochs")),
    ],
)
def test_a_value_that_cannot_work(pretrain: Run, images: Path, flags: list[str], words: tuple[str, ...]) -> None:
    refused(pretrain("--data_path", images, *flags), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input_size", "30"], ("not divisible by patch size 8",)),
        (["--mixup", "0.8", "--batch_size", "5"], ("--batch_size must be even",)),
        (["--nb_classes", "3"], ("10 class folders", "--nb_classes is 3")),
        (["--aa", "autoaugmnt"], ("--aa autoaugmnt",)),
        (["--remode", "noise", "--reprob", "0.5"], ("noise", "pixel")),
        (["--model", "vit_tiny_patch16_244"], ("did you mean", "vit_tiny_patch16_224")),
        (["--model", "vit_tiny_patch16_224.nonsense"], ("vit_tiny_patch16_224.nonsense",)),
        (["--model", "vit_tiny_patch16_224", "--input_size", "40"], ("40 is not divisible by patch size 16",)),
        (["--eval"], ("--eval needs --resume",)),
    ],
)
def test_a_value_that_cannot_work_in_fine_tuning(
    finetune: Run, images: Path, flags: list[str], words: tuple[str, ...]
) -> None:
    refused(finetune("--data_path", images, *flags), *words)


def test_a_mistyped_key_of_a_config(pretrain: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("bach_size: 3\n")
    refused(pretrain("--config", tmp_path / "c.yaml"), tmp_path / "c.yaml", "bach_size", "did you mean batch_size")
    refused(pretrain("--config", tmp_path / "d.yaml"), tmp_path / "d.yaml", "did you mean", tmp_path / "c.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(pretrain: Run, images: Path) -> None:
    refused(pretrain("--data_path", images, "--device", "cuda"), "no usable CUDA device", "--device cpu")


def test_shapes_that_a_program_gets_wrong() -> None:
    model = MaskedAutoencoder(32, 8, 3, 16, 1, 2, 16, 1, 2)
    with pytest.raises(ValueError, match=r"takes \(B, 3, 32, 32\)"):
        model(torch.zeros(1, 1, 32, 32), 0.75, torch.zeros(1, 16))


# ---- tokenizers ----


def test_dat_without_a_tokenizer(pretrain: Run, images: Path, tmp_path: Path) -> None:
    flags = ["--data_path", images, "--dat", "--tokenizer", tmp_path / "none.ckpt"]
    refused(pretrain(*flags), tmp_path / "none.ckpt", "--tokenizer embedded")


def test_a_size_that_the_tokenizer_cannot_take(finetune: Run, images: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "coarse.safetensors", factor=16)
    flags = ["--data_path", images, "--dat", "--tokenizer", tokenizer, "--input_size", "40"]
    refused(finetune(*flags), "40 x 40", "factor 16", "--input_size 32 32")


def test_gray_images_and_a_tokenizer_of_color(pretrain: Run, images: Path, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "color.safetensors")
    flags = ["--data_path", images, "--dat", "--tokenizer", tokenizer, "--in_chans", "1"]
    refused(pretrain(*flags), "(B, 3, H, W)", "mae-dat tokenizer train")


def save_random(path: Path) -> Path:
    torch.save({"layer.weight": torch.zeros(3)}, path)
    return path


def save_numbers(path: Path) -> Path:
    torch.save([1, 2, 3], path)
    return path


def save_noise(path: Path) -> Path:
    path.write_bytes(bytes(range(1, 256)) * 9)
    return path


def save_page(path: Path) -> Path:
    path.write_text("<!DOCTYPE html><html><body>404</body></html>")
    return path


def save_code(path: Path) -> Path:
    """A pickle that would write a file if it were executed."""
    torch.save({"model": partial(Path.touch, path.with_name("executed"))}, path)
    return path


WRONG_FILES = [save_random, save_numbers, save_noise, save_page, save_code, save_tokenizer]


@pytest.mark.parametrize("save", WRONG_FILES[:-1])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_that_is_no_tokenizer(
    pretrain: Run, images: Path, tmp_path: Path, save: Callable[[Path], Path], suffix: str
) -> None:
    path = save(tmp_path / f"wrong{suffix}")
    refused(pretrain("--data_path", images, "--dat", "--tokenizer", path), path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("save", WRONG_FILES)
def test_a_file_that_is_no_pretraining(
    finetune: Run, images: Path, tmp_path: Path, save: Callable[[Path], Path]
) -> None:
    path = save(tmp_path / ("wrong.safetensors" if save is save_tokenizer else "wrong.pth"))
    refused(finetune("--data_path", images, "--finetune", path), path)
    assert not (tmp_path / "executed").exists()


def test_a_pretraining_is_no_tokenizer(finetune: Run, images: Path, pretrained: Path) -> None:
    path = pretrained / "model.safetensors"
    refused(finetune("--data_path", images, "--dat", "--tokenizer", path), path, "not a VQGAN")


# ---- checkpoints ----


def test_weights_of_another_width(finetune: Run, images: Path, tmp_path: Path) -> None:
    torch.save({"model": MaskedAutoencoder(32, 8, 3, 64, 2, 2, 16, 1, 2).state_dict()}, tmp_path / "narrow.pth")
    flags = ["--data_path", images, "--finetune", tmp_path / "narrow.pth"]
    refused(finetune(*flags), tmp_path / "narrow.pth", "of another shape", "choose the model")


def test_weights_that_are_not_there(finetune: Run, images: Path, tmp_path: Path) -> None:
    refused(finetune("--data_path", images, "--finetune", tmp_path / "none"), tmp_path / "none", "no such file")
    refused(finetune("--data_path", images, "--finetune", tmp_path), tmp_path, "model.safetensors")
    refused(finetune("--data_path", images, "--resume", tmp_path / "none.pth"), tmp_path / "none.pth")


def test_damaged_weights_are_refused(finetune: Run, images: Path, pretrained: Path, tmp_path: Path) -> None:
    shutil.copytree(pretrained, tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    refused(finetune("--data_path", images, "--finetune", tmp_path / "copy"), path, "sha256")


def test_classes_differ_from_the_head(finetune: Run, images: Path, classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data" / "val" / "disc").rename(tmp_path / "data" / "val" / "zebra")
    evaluate = ["--eval", "--data_path", tmp_path / "data"]
    refused(finetune(*evaluate, "--resume", classifier), tmp_path / "data/val", "zebra")
    # A foreign file does not name its classes, only their number.
    shutil.copytree(tmp_path / "data/val/zebra", tmp_path / "data/val/yak")
    tensors = torch.load(next(classifier.glob("checkpoint-*.pth")), weights_only=True)["model"]
    torch.save({"model": tensors}, tmp_path / "foreign.pth")
    refused(finetune(*evaluate, "--resume", tmp_path / "foreign.pth"), tmp_path / "data/val", "11 class", "10 out")


def test_a_pretraining_cannot_be_evaluated(finetune: Run, images: Path, pretrained: Path) -> None:
    refused(finetune("--eval", "--data_path", images, "--resume", pretrained), pretrained, f"--finetune {pretrained}")


def test_an_output_folder_of_another_model(finetune: Run, images: Path, pretrained: Path) -> None:
    before = contents(pretrained)
    outcome = finetune("--data_path", images, "--output_dir", pretrained)
    refused(outcome, pretrained / "checkpoint-00000002.pth", "does not fit", "another --output_dir")
    assert contents(pretrained) == before


# ---- output folders ----


def test_an_output_folder_that_cannot_be_written(pretrain: Run, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/mae_dat")):
        refused(pretrain("--data_path", images, "--output_dir", folder), folder, "--output_dir")
    assert (tmp_path / "file").read_text() == "in the way"
    flags = ["--data_path", images, "--log_dir", tmp_path / "file"]
    refused(pretrain(*flags), tmp_path / "file", "--log_dir")


def test_an_error_leaves_earlier_results_as_they_were(pretrain: Run, pretrained: Path, images: Path) -> None:
    before = contents(pretrained)
    for flags in (["--input_size", "30"], ["--device", "gpu"], ["--batch_size", "64"], ["--dat", "--tokenizer", "no"]):
        refused(pretrain("--data_path", images, "--output_dir", pretrained, "--epochs", "9", *flags))
    assert contents(pretrained) == before


# ---- Ctrl-C ----


def interrupt(process: subprocess.Popen[str], ready: Callable[[], bool]) -> str:
    """Sends SIGINT to the whole process group, as a terminal does, once `ready`; returns what was said."""
    deadline = time.monotonic() + 300
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=300)[1]


def test_ctrl_c_saves_and_says_so(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "main_pretrain.py", *PRETRAIN, "--data_path", str(images), "--output_dir", str(output)]
    command += ["--epochs", "100000", "--num_workers", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said = interrupt(process, lambda: len(read_log(output / "log.txt")) > 1)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "saved in" in said
    found = newest_checkpoint(output)
    assert found is not None
    assert found.step >= read_log(output / "log.txt")[-1]["step"] > 0
    assert json.loads((output / f"checkpoint-{found.step:08d}.json").read_text())["step"] == found.step
