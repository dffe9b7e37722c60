"""`mae-dat predict` and `mae_dat.predict`: the same logits as an evaluation, any model, any images, bad input."""

import csv
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated_models import Linear, dataset, saved, write_onnx, write_timm
from noise_images import noise
from quiet_evaluation import evaluate
from tiny_models import tiny
from tiny_runs import Outcome, draw_folder, outcome_of, verb
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError, ConfigError, DataError, NumericsError
from mae_dat.models.mae import build_mae
from mae_dat.models.weights.open import open_model
from mae_dat.prediction.predict import predict
from mae_dat.robustness.scores.calibration import fit_temperature
from mae_dat.robustness.suites.preprocessing import Preprocessing
from mae_dat.runtime.inputs import read_inputs
from mae_dat.storage.weight_files import write_weights

__all__ = ["dataset"]  # a fixture

NAMES = [f"kind {number}" for number in range(10)]
CPU = ["--device", "cpu", "--num_workers", "0", "--precision", "fp32"]
FILES = [
    "inputs.json",
    "predictions.csv",
    "predictions.jsonl",
    *["predictions.parquet"] * (find_spec("pyarrow") is not None),
]
QUIET: dict[str, Any] = {"progress": False, "device": "cpu", "num_workers": 0, "precision": "fp32"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "run" / "model.safetensors", 10, NAMES)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven noise images of different shapes, in folders of different depth."""
    folder = tmp_path / "photos"
    for number, name in enumerate(["a", "b", "deep/c", "deep/er/d", "e", "f", "g"]):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(32 + 3 * number, 60 - 4 * number, seed=number).save(path)
    return folder


def logits_of(model: Path, paths: list[Path]) -> Tensor:
    """The logits by hand."""
    images = [Preprocessing((32, 32), keep_size=True)(noise_of(path)) for path in paths]
    with torch.no_grad():
        return open_model(model).classifier()(torch.stack(images))


def noise_of(path: Path) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def ran(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Outcome:
    return outcome_of(verb("predict"), arguments, monkeypatch, capsys)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return [*csv.DictReader(file)]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


# ---- the same as an evaluation ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_logits_are_those_of_an_evaluation_bit_for_bit(tmp_path: Path, precision: str, num_workers: int) -> None:
    """The images of val/CLASS, none of which has the model's size."""
    for number in range(20):
        path = tmp_path / "val" / f"{number % 10}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(40 + number, 70 - number, seed=number).save(path)
    file = saved(tmp_path / "model.safetensors", 10)
    network = open_model(file).classifier()
    recorded: list[Tensor] = []
    network.register_forward_hook(lambda module, inputs, output: recorded.append(output.detach().float().clone()))
    options: dict[str, Any] = {"device": "cpu", "precision": precision, "num_workers": num_workers, "batch_size": 8}
    evaluate({"net": network}, "clean", tmp_path, input_size=32, **options)
    predictions = predict(file, tmp_path / "val", logits=True, **{**QUIET, **options})
    assert predictions.logits is not None
    starts = [
        start for start, part in enumerate(recorded) if [len(p) for p in recorded[start : start + 3]] == [8, 8, 4]
    ]
    passes = [torch.cat(recorded[start : start + 3]).numpy() for start in starts]
    assert any(np.array_equal(one, predictions.logits) for one in passes)


def test_files_hold_what_the_model_gives_by_hand(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [str(photos), "--checkpoint", str(model.parent), "--output_dir", str(out), "--top_k", "3", *CPU]
    verb("predict")([*arguments, "--temperature", "2", "--abstain_below", "0.5", "--batch_size", "3"])
    printed = capsys.readouterr().out
    paths = [photos / f"{name}.png" for name in ("a", "b", "deep/c", "deep/er/d", "e", "f", "g")]
    expected = (logits_of(model, paths) / 2).softmax(1)
    values, numbers = expected.topk(3)
    rows, lines = table(out), records(out)
    assert [row["file"] for row in rows] == [line["file"] for line in lines] == [str(path) for path in paths]
    assert list(rows[0]) == [
        "file",
        *(f"{name}_{k}" for k in (1, 2, 3) for name in ("class", "probability")),
        "abstained",
    ]
    for row, line, own, best in zip(rows, lines, numbers.tolist(), values, strict=True):
        assert [row[f"class_{k}"] for k in (1, 2, 3)] == line["classes"] == [NAMES[number] for number in own]
        assert [float(row[f"probability_{k}"]) for k in (1, 2, 3)] == line["probabilities"]
        assert line["probabilities"] == pytest.approx(best.tolist(), rel=1e-4)
        assert row["abstained"] == str(line["abstained"]).lower() == str(bool(best[0] < 0.5)).lower()
    abstained = int((values[:, 0] < 0.5).sum())
    assert 0 < abstained < 7
    last = printed.splitlines()[-1]
    assert re.fullmatch(
        rf"7 images predicted, {abstained} abstained, 0 unreadable in 0:0\d: {out}/predictions.csv", last
    )
    assert NAMES[numbers[0, 0]] in printed.splitlines()[1]
    assert sorted(path.name for path in out.iterdir()) == FILES


def test_python_returns_the_same_as_arrays(model: Path, photos: Path, tmp_path: Path) -> None:
    predictions = predict(model, photos, output_dir=tmp_path / "out", logits=True, top_k=2, abstain_below=0.9, **QUIET)
    paths = sorted(photos.glob("*.png"))
    expected = dict(zip(map(str, paths), logits_of(model, paths), strict=True))
    assert predictions.logits is not None
    assert predictions.probabilities.dtype == np.float32
    assert predictions.probabilities.shape == (7, 10)
    assert predictions.classes == NAMES
    for name, logits, probabilities in zip(
        predictions.files, predictions.logits, predictions.probabilities, strict=True
    ):
        np.testing.assert_allclose(probabilities, torch.from_numpy(logits).softmax(0), rtol=1e-5)
        if name in expected:
            np.testing.assert_allclose(logits, expected[name], rtol=1e-4, atol=1e-5)
    best = predictions.probabilities.argmax(1)
    confident = predictions.probabilities.max(1) >= 0.9
    assert predictions.labels() == [NAMES[k] if sure else None for k, sure in zip(best, confident, strict=True)]
    predictions.to_csv(tmp_path / "own.csv")
    assert (tmp_path / "own.csv").read_bytes() == (tmp_path / "out" / "predictions.csv").read_bytes()


def test_predictions_print_as_a_table_and_as_html(photos: Path) -> None:
    def model(image: Tensor) -> Tensor:
        return torch.tensor([[0.0, 2.0, 1.0]]).repeat(len(image), 1)

    names = ["<cat>", "dog & co", "bird"]
    predictions = predict(model, [photos] * 1, classes=names, input_size=32, **QUIET)
    lines = str(predictions).splitlines()
    assert lines[0].split() == ["file", "class", "probability", "next", "classes"]
    assert lines[1].startswith("a.png "), "the folder of all images is left out"
    assert "dog & co  66.5%        bird 24.5%, <cat> 9.0%" in lines[1]
    page = predictions._repr_html_()
    assert page.count("<tr>") == 8
    assert "dog &amp; co" in page
    assert "<cat>" not in page
    assert len(predict(model, [noise()] * 12, classes=names, input_size=32, **QUIET)._repr_html_()) > 0
    assert str(predict(model, [noise()] * 12, input_size=32, **QUIET)).splitlines()[-1] == "... 12 images in all"


# ---- models ----


def test_any_model_that_an_evaluation_takes(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, options = dataset / "val", {**QUIET, "logits": True}
    file = saved(tmp_path / "model.safetensors", 10, NAMES)
    ours = predict(file, images, **options)  # type: ignore[arg-type]
    opened = open_model(file)
    foreign = tmp_path / "foreign.pth"
    torch.save({"model": opened.model.net.state_dict()}, foreign)
    again = [
        predict(foreign, images, model="vit_demo_patch8", **options),  # type: ignore[arg-type]
        predict(opened, images, **options),  # type: ignore[arg-type]
        predict(opened.model, images, input_size=32, **options),  # type: ignore[arg-type]
        predict(lambda image: opened.model(image), images, input_size=32, **options),  # type: ignore[arg-type]
    ]
    for other in again:
        assert np.array_equal(ours.probabilities, other.probabilities)
    assert [other.classes[0] for other in again] == ["0", "kind 0", "0", "0"]
    linear = Linear()
    onnx = predict(write_onnx(linear, tmp_path / "linear.onnx"), images, **options)  # type: ignore[arg-type]
    by_hand = predict(linear, images, input_size=32, **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(onnx.probabilities, by_hand.probabilities, atol=1e-5)
    network = write_timm(tmp_path / "hub").eval()
    timm = predict(None, images, model=f"local-dir:{tmp_path / 'hub'}", pretrained=True, input_size=32, **options)  # type: ignore[arg-type]
    pixels = torch.stack([Preprocessing((32, 32), keep_size=True)(noise_of(Path(name))) for name in timm.files])
    with torch.no_grad():
        expected = network((pixels - 0.5) / 0.5)
    np.testing.assert_allclose(timm.logits, expected, rtol=1e-3, atol=1e-4)  # type: ignore[arg-type]


def test_a_released_name_on_images_of_its_classes(tmp_path: Path) -> None:
    """The demo's classifier on generated images, whose folders are named by their classes."""
    folder = draw_folder(tmp_path / "data", train=0, val=20, conflict=0, size=64)
    predictions = predict("mae_dat_demo", folder / "val", **QUIET)
    folders = [Path(name).parent.name for name in predictions.files]
    correct = sum(map(str.__eq__, folders, map(str, predictions.labels())))
    counts = evaluate({"demo": "mae_dat_demo"}, "clean", folder, device="cpu")["cells"]["demo"]["clean"][""]
    assert counts["correct"] == correct > 4
    assert set(folders) == set(predictions.classes)


def test_names_of_classes(photos: Path, tmp_path: Path) -> None:
    image, out = photos / "a.png", tmp_path / "out"
    predictions = predict(Linear(1000), image, input_size=32, **QUIET, output_dir=out)
    assert predictions.classes[:2] == ["tench", "goldfish"]
    shown = read_inputs(out / "inputs.json").rows["classes"]
    assert shown.endswith("(ImageNet's names, because the model has 1000 outputs)")
    assert predict(Linear(3), image, input_size=32, **QUIET, output_dir=out).classes == ["0", "1", "2"]
    assert read_inputs(out / "inputs.json").rows["classes"] == ("0 to 2 (numbers, because the model records no names)")
    named = predict(Linear(3), image, classes=["x", "y", "z"], input_size=32, **QUIET)
    assert named.columns().keys() == {"file", *(f"{name}_{k}" for k in (1, 2, 3) for name in ("class", "probability"))}
    file = tmp_path / "names.txt"
    file.write_text("x\ny\nz\n")
    from mae_dat.prediction.predict import read_class_names

    assert read_class_names(file) == ["x", "y", "z"]
    file.write_text("x\n\nz\n")
    with pytest.raises(DataError, match=r"--classes .*names\.txt: give one name a line"):
        read_class_names(file)


# ---- temperature ----


def test_calibration_fits_the_temperature_to_the_validation_images(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    classes = sorted(path.name for path in (dataset / "val").iterdir())
    file = saved(tmp_path / "model.safetensors", 10, classes)
    plain = predict(file, dataset / "val", logits=True, **QUIET)
    labels = torch.tensor([classes.index(Path(name).parent.name) for name in plain.files])
    assert plain.logits is not None
    temperature = fit_temperature(torch.from_numpy(plain.logits), labels)
    fitted = predict(file, dataset / "val", calibrate=dataset, **QUIET)
    assert fitted.temperature == pytest.approx(temperature)
    expected = (torch.from_numpy(plain.logits) / temperature).softmax(1)
    np.testing.assert_allclose(fitted.probabilities, expected, rtol=1e-5)
    assert f"temperature {temperature:.3f}, fitted on 20 images: NLL" in caplog.text
    (tmp_path / "own" / "val").mkdir(parents=True)
    for number, label in enumerate(map(str, plain.labels())):
        path = tmp_path / "own" / "val" / label / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(plain.files[number])
    assert predict(file, dataset / "val", calibrate=tmp_path / "own", **QUIET).temperature == 1
    assert "all 20 images are predicted correctly" in caplog.text
    with pytest.raises(DataError, match="10 class folders .* but the model has 3 outputs"):
        predict(Linear(3), dataset / "val", calibrate=dataset, input_size=32, **QUIET)
    unnamed = saved(tmp_path / "unnamed.safetensors", 10)
    for checkpoint, names in ((file, NAMES), (unnamed, None), (unnamed, classes)):
        again = predict(checkpoint, dataset / "val", classes=names, calibrate=dataset, **QUIET)
        assert again.temperature == fitted.temperature
    with pytest.raises(DataError, match="has class folders unknown to the model's classes"):
        predict(unnamed, dataset / "val", classes=NAMES, calibrate=dataset, **QUIET)


# ---- images ----


def test_unreadable_images_are_listed_and_change_no_other(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = predict(model, sorted(photos.glob("*.png")), batch_size=8, **QUIET)
    (photos / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
    (photos / "page\n.jpg").write_bytes(b"<!doctype html>")
    (photos / "link.jpg").symlink_to("nowhere")
    noise(1, 1500).save(photos / "line.png")
    frames = [noise(seed=seed) for seed in range(3)]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    given = [str(photos), str(photos / "moving.gif")]
    outcome = ran([*given, "--checkpoint", str(model), "--output_dir", str(out), *CPU], monkeypatch, capsys)
    assert outcome.code == 0
    assert f"5 images are unreadable: {out}/unreadable.txt lists them" in outcome.stderr
    lines = dict(line.split("\t") for line in (out / "unreadable.txt").read_text().splitlines())
    assert lines[f"{photos}/page\\n.jpg"] == "it is a web page or XML, not an image"
    assert lines[f"{photos}/link.jpg"] == "cannot be read (No such file or directory)"
    assert lines[f"{photos}/line.png"] == "one side is more than 1000 times the other"
    assert lines[f"{photos}/moving.gif"] == "it is animated or has several pages (3 frames)"
    assert "bad.jpg" in " ".join(lines)
    after = {row["file"]: row for row in table(out)}
    assert len(after) == 7
    for name, probability in zip(before.files, before.probabilities.max(1), strict=True):
        assert float(after[name]["probability_1"]) == pytest.approx(probability, rel=1e-5)
    ran([str(photos / "a.png"), "--checkpoint", str(model), "--output_dir", str(out), *CPU], monkeypatch, capsys)
    assert not (out / "unreadable.txt").exists()


def test_nothing_but_unreadable_images_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"nothing")
    flags = ["--checkpoint", str(model), "--output_dir", str(tmp_path / "out"), *CPU]
    outcome = ran([str(bad), *flags], monkeypatch, capsys)
    assert outcome.code == 65
    assert "no image can be read, of 1: " in outcome.stderr
    assert (tmp_path / "out" / "unreadable.txt").read_text() == f"{bad}\tit is not an image that can be read\n"


def test_an_interrupted_prediction_leaves_complete_lines_under_another_name(photos: Path, tmp_path: Path) -> None:
    out, network = tmp_path / "out", Linear(3)
    predict(network, photos / "a.png", output_dir=out, input_size=32, **QUIET)
    before = (out / "predictions.csv").read_bytes()
    network.most = network.seen + 2 + 6  # two blank images, then three batches of two
    with pytest.raises(KeyboardInterrupt):
        predict(network, photos, output_dir=out, input_size=32, batch_size=2, **QUIET)
    assert (out / "predictions.csv").read_bytes() == before
    partial = (out / "predictions.csv.partial").read_text().splitlines()
    assert len(partial) == 1 + 4  # the heading, and the two batches before the one that was computed last
    lines = (out / "predictions.jsonl.partial").read_text().splitlines()
    assert [len(json.loads(line)["classes"]) for line in lines] == [3] * 4
    network.most = float("inf")
    predict(network, photos, output_dir=out, input_size=32, batch_size=2, **QUIET)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert len(table(out)) == 7


def test_logits_that_are_not_finite_name_the_image(photos: Path) -> None:
    def model(image: Tensor) -> Tensor:
        bright = image.mean((1, 2, 3), keepdim=True)[:, :, 0, 0]
        return torch.cat([bright, torch.where(bright > 0, torch.nan, bright)], 1)

    with pytest.raises(NumericsError, match=r"model gave NaN or infinite logits for .*a\.png: .*--precision fp32"):
        predict(model, photos, input_size=32, **QUIET)


# ---- bad input ----


def test_bad_input_is_a_message(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, checkpoint = str(photos / "a.png"), ["--checkpoint", str(model)]
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    (tmp_path / "tar").mkdir()
    (tmp_path / "tar" / "0.tar").write_bytes(bytes(10240))
    (tmp_path / "two.txt").write_text("x\ny\n")
    pretraining = tmp_path / "pre.safetensors"
    facts = {"kind": "pretraining", "model": "mae_vit_demo_patch8", "input_size": [64, 64]}
    write_weights(pretraining, build_mae("mae_vit_demo_patch8").state_dict(), {"mae_dat": json.dumps(facts)})
    cases: list[tuple[list[str], int, str]] = [
        (checkpoint, 2, "mae-dat predict needs IMAGES"),
        ([photo], 64, "no model: give --checkpoint OUT"),
        ([photo, "--model", "resnet18"], 64, "no model: give --checkpoint OUT"),
        ([photo, *checkpoint, "--pretrained", "--model", "resnet18"], 64, "--checkpoint and --pretrained: give one"),
        (
            [photo, "--checkpoint", str(pretraining)],
            65,
            "is a pretraining, which has no classes yet: fine-tune it first",
        ),
        ([photo, "--checkpoint", str(tmp_path / "none.pth")], 66, "none.pth"),
        ([photo, *checkpoint, "--top_k", "0"], 64, "--top_k 0: give at least 1 class"),
        ([photo, *checkpoint, "--top_k", "two"], 2, "two"),
        ([photo, *checkpoint, "--temperature", "0"], 64, "--temperature 0: give a number above 0"),
        ([photo, *checkpoint, "--temperature", "nan"], 64, "--temperature nan"),
        ([photo, *checkpoint, "--temperature", "2", "--calibrate", "DIR"], 64, "give one of them"),
        ([photo, *checkpoint, "--calibrate", str(tmp_path / "no")], 66, "no does not exist"),
        (
            [photo, *checkpoint, "--calibrate", str(photos)],
            66,
            "photos has no folder val or valid or validation or test",
        ),
        ([photo, *checkpoint, "--abstain_below", "50"], 64, "--abstain_below 50: give a number from 0 to 1"),
        ([photo, *checkpoint, "--draw", "-1"], 64, "--draw -1: give 0 or more"),
        ([photo, *checkpoint, "--batch_size", "0"], 64, "--batch_size 0"),
        ([photo, *checkpoint, "--crop", "2"], 64, "--crop 2"),
        (
            [photo, *checkpoint, "--classes", str(tmp_path / "two.txt")],
            64,
            "--classes has 2 names, model has 10 outputs",
        ),
        ([photo, *checkpoint, "--classes", str(tmp_path / "no.txt")], 66, "--classes: no such file"),
        ([str(tmp_path / "photo"), *checkpoint], 66, f"did you mean {photos}?"),
        ([str(tmp_path / "no.jpg"), *checkpoint], 66, "no.jpg does not exist"),
        ([str(tmp_path / "empty"), *checkpoint], 65, "empty holds no images (.jpg"),
        ([str(tmp_path / "texts"), *checkpoint], 65, "only other files: .txt 1 (a.txt); check the path"),
        ([str(tmp_path / "tar"), *checkpoint], 66, "contains shards without their index: mae-dat pack --index"),
        ([str(tmp_path / "tar" / "0.tar"), *checkpoint], 66, "is a shard without its index: mae-dat pack --index"),
    ]
    for arguments, code, message in cases:
        outcome = ran([*arguments, "--output_dir", str(tmp_path / "out"), *CPU[:2]], monkeypatch, capsys)
        assert outcome.code == code, (arguments, outcome)
        assert message in outcome.stderr.replace("\n", " "), (arguments, outcome)
    assert not (tmp_path / "out" / "predictions.csv").exists()
    with pytest.raises(CheckpointError, match="is a pretraining, which has no classes yet"):
        predict(build_mae("mae_vit_demo_patch8"), photos, **QUIET)
    with pytest.raises(ConfigError, match="a checkpoint of type int is no model"):
        predict(3, photos, **QUIET)  # type: ignore[arg-type]


def test_a_module_in_training_stays_in_training(photos: Path) -> None:
    network = tiny(3).train()
    predict(network, photos / "a.png", **QUIET)
    assert all(module.training for module in network.modules() if isinstance(module, nn.Linear))
