"""The summary of the inputs: every command that opens data or weights logs it once, and stores what it logged."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import (
    FINETUNE,
    PRETRAIN,
    SMALL,
    draw_folder,
    one_thread,  # noqa: F401 - used by itself
    outcome_of,
    save_tokenizer,
    verb,
)
from whole_runs import signal_in_step

from mae_dat.robustness.scores.results import read_results
from mae_dat.runtime.inputs import INPUTS_WIDTH, InputSummary, read_inputs

Run = Callable[..., InputSummary]
CPU = ["--device", "cpu", "--num_workers", "0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes, with files that are not read."""
    root = draw_folder(tmp_path_factory.mktemp("data") / "images")
    (root / "train" / "disc" / "photo.heic").touch()
    (root / "val" / "disc" / "gone.png").symlink_to("/not/mounted.png")
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a verb, checks that it logged one table, as it is stored, and returns it."""

    def run_verb(words: str, *arguments: str | Path, stored: Path | None) -> InputSummary:
        outcome = outcome_of(verb(words), list(map(str, arguments)), monkeypatch, capsys)
        assert outcome.code == 0, outcome.stderr
        assert outcome.stderr.count("inputs of mae-dat ") == 1, outcome.stderr
        start = outcome.stderr.index("inputs of mae-dat ")
        lines = outcome.stderr[start:].split("\n")
        count = 1 + next(number for number, line in enumerate(lines[1:]) if not line.startswith("  "))
        assert max(map(len, lines[:count])) <= INPUTS_WIDTH
        if stored is not None:
            inputs = read_inputs(stored)
            assert inputs.table() == "\n".join(lines[:count])
            return inputs
        labels = [line[2:].split("  ")[0] for line in lines[1:count] if line[2] != " "]
        return InputSummary(lines[0], dict.fromkeys(labels, outcome.stderr))

    return run_verb


def test_a_pretraining(run: Run, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    inputs = run("pretrain", *PRETRAIN, "--data_path", images, "--output_dir", out, stored=out / "inputs.json")
    assert inputs.rows["training"] == "train/: 24 images"
    assert inputs.rows["data"] == f"{images}\nnot used: conflict/, val/"
    assert inputs.rows["left out"] == ".heic 1 (train/disc/photo.heic)"
    assert inputs.rows["model"].endswith(" parameters; mask ratio 0.75, target pixels")
    assert inputs.rows["weights"] == "random (no --init)"
    assert inputs.rows["output"] == f"{out} (new run, 3 steps)"


def test_a_fine_tuning_with_an_adversary(run: Run, images: Path, pretrained: Path, tmp_path: Path) -> None:
    out, tokenizer = tmp_path / "out", save_tokenizer(tmp_path / "light.safetensors")
    dat = ["--dat", "--dat_share", "0.1", "--tokenizer", tokenizer]
    given = [*FINETUNE, *dat, "--data_path", images, "--finetune", pretrained, "--output_dir", out]
    inputs = run("finetune", *given, stored=out / "inputs.json")
    assert inputs.rows["training"] == "train/: 24 images in 10 classes (2 to 3 each)"
    assert inputs.rows["validation"] == "val/: 20 images in 10 classes (2 each)"
    assert inputs.rows["classes"].startswith("0 arrow, 1 bolt, 2 cross, ")
    assert inputs.rows["classes"].endswith("9 triangle (folder names, sorted)")
    assert inputs.rows["left out"] == ("2 files: .heic 1 (train/disc/photo.heic), dangling links 1 (val/disc/gone.png)")
    assert inputs.rows["model"].startswith("vit_demo_patch8, ")
    assert inputs.rows["model"].endswith(" parameters, 10 classes")
    sha256 = json.loads((pretrained / "model.json").read_text())["sha256"]
    file = pretrained / "model.safetensors"
    assert inputs.rows["weights"] == f"{file} (mae_dat, MAE with decoder, sha256 {sha256[:12]})"
    assert inputs.rows["pixels"] == (
        "32 x 32 px, ImageNet's mean and std\n"
        "training: random crop of 8 to 100 % of the area, bicubic, flip\n"
        "validation: shorter side to 36, center crop 32 x 32, bicubic"
    )
    assert inputs.rows["tokenizer"].startswith(f"{tokenizer} (sha256 ")
    assert inputs.rows["tokenizer"].endswith("), factor 4, 64 words")
    assert inputs.rows["adversary"] == "released DAT: 10 % of the words changed, by adjusting eps"
    assert inputs.details["training"]["by_class"]["disc"] == 3
    assert inputs.details["validation"]["left_out"] == {"dangling links": 1}


def test_a_run_that_resumes_says_from_which_step(
    run: Run, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = ["finetune", *FINETUNE, "--data_path", str(images), "--output_dir", str(out)]
    with signal_in_step(1, signal.SIGTERM):
        stopped = outcome_of(verb("finetune"), given[1:], monkeypatch, capsys)
    assert stopped.code == 75
    assert read_inputs(out / "inputs.json").rows["output"] == f"{out} (new run, 3 steps)"
    inputs = run(*given, stored=out / "inputs.json")
    state = "resumes at step 2 of 3"
    weights = (
        "checkpoint-00000002.pth of the output folder\nthe run began with: random (no --finetune, no --pretrained)"
    )
    assert inputs.rows["weights"] == weights
    assert inputs.rows["output"] == f"{out} ({state})"
    again = outcome_of(verb("finetune"), given[1:], monkeypatch, capsys)
    assert f"{state}" not in again.stderr
    assert "(complete, 3 steps)" in again.stderr
    assert read_inputs(out / "inputs.json").rows["output"] == f"{out} ({state})", "the run that trained is kept"


def test_an_evaluation(run: Run, images: Path, classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = [
        "--checkpoint",
        classifier,
        "--data_path",
        images,
        "--suite",
        "clean",
        "words-random",
        "--limit",
        "2",
        *CPU,
    ]
    inputs = run("evaluate", *given, "--output_dir", out, stored=out / "inputs.json")
    assert inputs.rows["suites"] == "clean 2 (val/), words-random 5 x 2"
    assert inputs.rows["subset"] == "clean, words-random: 2 of 20 images (seed 0)"
    assert inputs.rows["classes"].endswith("(names stored with the model)")
    assert inputs.rows["left out"] == "dangling links 1 (val/disc/gone.png)"
    assert inputs.rows["output"] == f"{out} (new, 2 measurements)"
    results = read_results(out / "results.json")
    assert results["inputs"] == inputs.rows
    assert "| left out | dangling links 1 (val/disc/gone.png) |" in (out / "report.md").read_text()
    assert "dangling links 1 (val/disc/gone.png)" in (out / "report.html").read_text()
    inputs = run("evaluate", *given, "--output_dir", out, stored=out / "inputs.json")
    assert inputs.rows["output"] == f"{out} (resumes: 2 of 2 measurements stored)"


def test_several_models_have_a_row(run: Run, images: Path, classifier: Path, tmp_path: Path) -> None:
    out, copies = tmp_path / "out", [shutil.copytree(classifier, tmp_path / f"run{number}") for number in range(5)]
    given = ["--data_path", images, "--suite", "clean", *CPU, "--output_dir", out]
    inputs = run("evaluate", "--checkpoint", *copies, *given, stored=out / "inputs.json")
    lines = inputs.rows["models"].split("\n")
    assert [line.split(":")[0] for line in lines] == ["run0", "run1", "run2", "run3", "and 1 more"]
    assert len(inputs.details["models"]) == 5
    assert inputs.rows["pixels"].split("\n")[0] == "32 x 32 px, ImageNet's mean and std"


def test_the_accuracy_of_a_run(run: Run, images: Path, classifier: Path, tmp_path: Path) -> None:
    given = ["--eval", "--resume", classifier, "--data_path", images, *CPU, "--output_dir", tmp_path / "out"]
    inputs = run("finetune", *given, stored=None)
    assert [*inputs.rows] == ["data", "validation", "classes", "left out", "model", "weights", "pixels", "device"]
    out = tmp_path / "suites"
    flags = ["--suite", "clean", "conflict"]
    inputs = run("finetune", *given[:-1], out, *flags, stored=out / "inputs.json")
    assert inputs.command == "finetune --eval"
    assert inputs.rows["suites"] == "clean 20 (val/), conflict 20"


def test_features(run: Run, images: Path, classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--checkpoint", classifier, "--data_path", images, "--output_dir", out, *CPU]
    inputs = run("features", *given, "--knn", "3", stored=out / "inputs.json")
    assert [inputs.rows[name][:9] for name in ("train", "val")] == ["train/: 2", "val/: 20 "]


def test_a_prediction(run: Run, images: Path, classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--checkpoint", classifier, images / "train", images / "val" / "bolt", *CPU, "--output_dir", out]
    inputs = run("predict", *given, stored=out / "inputs.json")
    assert inputs.rows["images"] == f"26 images\n{images / 'train'}, {images / 'val' / 'bolt'}"
    assert inputs.rows["left out"] == f".heic 1 ({images / 'train' / 'disc' / 'photo.heic'})"
    assert inputs.rows["classes"].endswith("9 triangle (names in the checkpoint)")


@pytest.mark.parametrize("kind", ["reconstruction", "attention", "words", "adversary"])
def test_drawings(kind: str, run: Run, images: Path, pretrained: Path, classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = {"words": [], "reconstruction": ["--checkpoint", pretrained]}.get(kind, ["--checkpoint", classifier])
    given = [*model, "--images", images / "val", "--limit", "2", "--device", "cpu", "--output_dir", out]
    inputs = run(f"visualize {kind}", *given, stored=out / "inputs.json")
    assert inputs.rows["images"] == f"{images / 'val'}\n2 of 20 images, evenly spaced"
    assert ("weights" in inputs.rows) == (kind != "words")
    assert ("tokenizer" in inputs.rows) == (kind in ("words", "adversary"))


def test_an_analysis(run: Run, images: Path, classifier: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["--checkpoint", classifier, "--data_path", images, "--limit", "8", "--views", "reconstruction", *CPU]
    inputs = run("analyze", *given, "--output_dir", out, stored=out / "inputs.json")
    assert inputs.rows["validation"].endswith("8 of them, evenly spaced")


def test_tokenizers(run: Run, images: Path, tmp_path: Path) -> None:
    out, student = tmp_path / "out", tmp_path / "student"
    size = ["--input_size", "32", "--steps", "2", "--batch_size", "4", "--width", "16", *CPU]
    data = ["--data_path", images / "train", images / "val", "--val_path", images / "conflict"]
    inputs = run("tokenizer train", *data, *size, "--output_dir", out, stored=out / "inputs.json")
    assert inputs.rows["data"] == f"{images / 'train'}\n{images / 'val'}"
    assert inputs.rows["training"] == "train/: 24 images\nval/: 20 images"
    assert inputs.rows["left out"].startswith("2 files: ")
    teacher = out / "tokenizer.safetensors"
    given = ["--teacher", teacher, *data, *size, "--output_dir", student]
    inputs = run("tokenizer distill", *given, stored=student / "inputs.json")
    assert f"codebook and targets of {teacher} (sha256 " in inputs.rows["weights"]


def test_packing_and_scanning(run: Run, images: Path, tmp_path: Path) -> None:
    out, workers = tmp_path / "shards", ["--num_workers", "0"]
    inputs = run("pack", images, out, *workers, stored=out / "inputs.json")
    assert inputs.rows["val"] == "val/: 20 images in 10 classes (2 each)"
    assert inputs.rows["left out"].startswith("2 files: ")
    inputs = run("pack", "--index", out, stored=out / "inputs.json")
    assert inputs.rows["classes"] == "numbers (no --classes)"
    manifest = tmp_path / "manifest.jsonl"
    given = [images / "train", "--manifest", manifest, *workers]  # a dangling link, as in val, is a fault
    inputs = run("scan", *given, stored=tmp_path / "manifest.jsonl.inputs.json")
    assert inputs.rows["left out"] == ".heic 1 (disc/photo.heic)"
    run("scan", *given, "--verify", stored=None)


def test_a_conversion(run: Run, classifier: Path, tmp_path: Path) -> None:
    dest = tmp_path / "vit.safetensors"
    inputs = run("convert", classifier, dest, "--to", "timm", stored=tmp_path / "vit.safetensors.inputs.json")
    assert inputs.rows["output"] == f"{dest} (timm)"


def test_a_detector(run: Run, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = ["--model", "vit_demo_patch8", "--width", "16", "--anchor_size", "8", "--regions", "8", *SMALL]
    data = ["--data_path", images, "--limit", "2", "--device", "cpu", "--output_dir", out]
    inputs = run("detect", *model, *data, "--batch_size", "12", stored=out / "inputs.json")
    assert inputs.rows["training"] == "boxes.json: 24 images, 24 boxes in 10 classes"
    assert inputs.rows["validation"] == "boxes.json: 2 images, 2 boxes in 1 class"
    assert inputs.rows["classes"].endswith("(categories by id)")
    flags = ["--eval", "--resume", out, "--corrupted", "--severities", "1"]
    inputs = run("detect", *flags, *data, *CPU[2:], stored=out / "detection.json.inputs.json")
    assert inputs.rows["corruptions"] == "15 of ImageNet-C at severity 1, made at the images' own size"
