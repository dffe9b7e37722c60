"""Predictions of detectors: boxes in pixels of the original image, COCO's JSON, drawn images."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noise_images import noise
from PIL import Image
from tiny_runs import outcome_of, verb

from mae_dat.config.errors import ConfigError
from mae_dat.detection.coco import BoxTransform, Scene
from mae_dat.models.detector import build_detector
from mae_dat.models.weights.open import open_model
from mae_dat.prediction.box_files import draw_found
from mae_dat.prediction.predict import predict
from mae_dat.prediction.predictions import ImageBoxes
from mae_dat.storage.weight_files import write_weights

QUIET: dict[str, Any] = {"progress": False, "device": "cpu", "num_workers": 0, "precision": "fp32"}
SIZE = (32, 48)
CLASSES = ["=cell", "platelet", "rod"]


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained detector, whose boxes mean nothing, as a file of ours."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"width": 16, "anchor_size": 8.0, "regions": 8}
    model = build_detector("vit_demo_patch8", len(CLASSES), SIZE, **settings)
    facts = {"kind": "detector", "model": "vit_demo_patch8", "classes": CLASSES, "input_size": list(SIZE), **settings}
    path = tmp_path_factory.mktemp("detector") / "model.safetensors"
    write_weights(path, model.net.state_dict(), {"mae_dat": json.dumps(facts)})
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "more/a.jpg"]):
        noise(90 - 30 * number, 70, seed=number).save(folder / name, format="PNG")
    return folder


@pytest.mark.parametrize("size", [(64, 96), (100, 30), (31, 200), (7, 5)])
def test_boxes_return_to_the_original_image(size: tuple[int, int]) -> None:
    """What the transform does to true boxes is undone; what lies in the border is clipped."""
    height, width = size
    boxes = torch.tensor([[0.0, 0.0, width, height], [width * 0.25, height * 0.5, width * 0.75, height * 0.9]])
    labels = torch.ones(2, dtype=torch.int64)
    transform = BoxTransform(SIZE)
    image = Image.new("RGB", (width, height))
    _, truth = transform(image, Scene("", size, boxes, labels, labels.bool()))
    torch.testing.assert_close(
        transform.original_boxes(truth["boxes"].as_subclass(torch.Tensor), size), boxes, atol=1e-4, rtol=1e-5
    )
    everything = torch.tensor([[0.0, 0.0, SIZE[1], SIZE[0]]])
    assert transform.original_boxes(everything, size).tolist() == [[0, 0, width, height]]


def test_files_hold_what_the_detector_finds_by_hand(
    detector: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (photos / "bad.png").write_bytes(b"")
    flags = ["--checkpoint", str(detector), "--output_dir", str(out), "--device", "cpu", "--num_workers", "0"]
    verb("predict")([str(photos), *flags, "--precision", "fp32", "--score_threshold", "0.27", "--batch_size", "3"])
    printed = capsys.readouterr().out
    model, transform = open_model(detector).model, BoxTransform(SIZE)
    names = [photos / "a.png", photos / "b.png", photos / "more" / "a.jpg"]
    count = 0
    records = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    none = torch.zeros(0, dtype=torch.int64)
    for record, name in zip(records, names, strict=True):
        image = Image.open(name).convert("RGB")
        size = (image.height, image.width)
        pixels, _ = transform(image, Scene("", size, torch.zeros(0, 4), none, none.bool()))
        with torch.no_grad():
            (found,) = model(pixels[None])
        boxes = transform.original_boxes(found["boxes"], size)
        keep = (found["scores"] >= 0.27) & ((boxes[:, 2:] - boxes[:, :2]).amin(1) > 0)  # the rest is in the border
        boxes = boxes[keep]
        assert (record["file"], record["height"], record["width"]) == (str(name), *size)
        assert [box["class"] for box in record["boxes"]] == [CLASSES[label - 1] for label in found["labels"][keep]]
        np.testing.assert_allclose([box["box"] for box in record["boxes"]], boxes, atol=1e-2)
        count += int(keep.sum())
    assert 3 <= count < 300
    assert f"3 images predicted, {count} boxes of score 0.27 or more, 1 unreadable" in printed.splitlines()[-1]
    rows = (out / "predictions.csv").read_text().splitlines()
    assert rows[0] == "file,class,score,x_min,y_min,x_max,y_max"
    assert len(rows) == 1 + count
    assert {row.split(",")[1] for row in rows[1:]} <= {"'=cell", "platelet", "rod"}
    assert sorted(path.name for path in (out / "images").iterdir()) == ["a-2.jpg", "a.jpg", "b.jpg"]
    coco = pytest.importorskip("pycocotools.coco").COCO(str(out / "images.json"))
    results = coco.loadRes(str(out / "detections.json"))
    assert len(results.anns) == count
    assert [entry["file_name"] for entry in coco.loadImgs([1, 2, 4])] == list(map(str, names))
    first = results.loadAnns(results.getAnnIds(imgIds=[1]))[0]
    x, y, width, height = first["bbox"]
    assert coco.cats[first["category_id"]]["name"] == records[0]["boxes"][0]["class"]
    np.testing.assert_allclose([x, y, x + width, y + height], records[0]["boxes"][0]["box"], atol=0.02)


def test_python_returns_boxes(detector: Path, photos: Path, tmp_path: Path) -> None:
    predictions = predict(detector, photos, score_threshold=0, output_dir=tmp_path / "out", draw=1, **QUIET)
    assert predictions.boxes is not None
    assert predictions.probabilities.shape == (3, 0)
    for found in predictions.boxes:
        assert found.boxes.shape == (len(found.labels), 4)
        assert (found.boxes.dtype, found.labels.dtype, found.scores.dtype) == (np.float32, np.int64, np.float32)
        assert (np.diff(found.scores) <= 0).all()
        assert found.labels.min() >= 0
        assert found.labels.max() < 3
    assert [path.name for path in (tmp_path / "out" / "images").iterdir()] == ["a.jpg"]
    assert str(predictions).splitlines()[0].split() == ["file", "boxes", "highest", "score"]
    assert "=cell" in predictions._repr_html_()
    with pytest.raises(ConfigError, match=r"see Predictions\.boxes"):
        predictions.labels()
    predictions.to_csv(tmp_path / "own.csv")
    assert (tmp_path / "own.csv").read_bytes() == (tmp_path / "out" / "predictions.csv").read_bytes()
    opened = open_model(detector)
    again = predict(opened.model, noise(60, 70), score_threshold=0, classes=CLASSES, input_size=SIZE, **QUIET)
    same = predict(opened, noise(60, 70), score_threshold=0, **QUIET)
    assert again.boxes is not None
    assert same.boxes is not None
    assert np.array_equal(again.boxes[0].boxes, same.boxes[0].boxes)
    with pytest.raises(ConfigError, match="does not record its classes and its input size"):
        predict(opened.model, noise(), **QUIET)


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_detector_sees_images_upright_as_in_training(detector: Path, tmp_path: Path, orientation: int) -> None:
    """The stored image is turned, with the EXIF tag of a camera; the boxes are those of the upright one."""
    upright, exif = noise(60, 90, seed=1), Image.Exif()
    exif[0x0112] = orientation
    turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    upright.transpose(turn).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    stored = Image.open(tmp_path / "turned.png")
    images = [tmp_path / "upright.png", tmp_path / "turned.png", stored]
    first, *others = predict(detector, images, score_threshold=0.2, **QUIET).boxes or []
    assert first.size == (60, 90)
    for found in others:
        assert found.size == first.size
        np.testing.assert_array_equal(found.boxes, first.boxes)
    drawn = predict(detector, tmp_path / "turned.png", output_dir=tmp_path / "out", draw=1, **QUIET)
    assert len(drawn.boxes or []) == 1
    with Image.open(tmp_path / "out" / "images" / "turned.jpg") as picture:
        assert picture.size[0] > picture.size[1]


def test_what_does_not_go_with_a_detector(
    detector: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = [str(photos), "--checkpoint", str(detector), "--output_dir", str(out), "--device", "cpu"]
    (tmp_path / "names").write_text("x\n")
    for extra, code, message in [
        (["--temperature", "2"], 64, "--temperature is for classifiers; model.safetensors"),
        (["--calibrate", "DIR"], 64, "--calibrate is for classifiers"),
        (["--abstain_below", "0.5"], 64, "--abstain_below is for classifiers"),
        (["--crop", "0.9"], 64, "--interpolation and --crop are for classifiers"),
        (["--input_size", "64"], 64, "is a detector, which sees images at the size it was trained at"),
        (["--classes", str(tmp_path / "names")], 64, "--classes has 1 name,"),
        (["--score_threshold", "2"], 64, "--score_threshold 2: give a number from 0 to 1"),
    ]:
        outcome = outcome_of(verb("predict"), [*flags, *extra], monkeypatch, capsys)
        assert (outcome.code, message in outcome.stderr) == (code, True), outcome
    outcome = outcome_of(verb("predict"), [*flags, "--score_threshold", "1", "--no_draw"], monkeypatch, capsys)
    assert outcome.code == 0
    assert "no box has a score of 1 or more: lower --score_threshold" in outcome.stderr
    assert not (out / "images").exists()


def test_drawn_images_never_replace_an_input(detector: Path, photos: Path, tmp_path: Path) -> None:
    os.rename(photos / "more", photos / "images")
    before = (photos / "images" / "a.jpg").read_bytes()
    with pytest.raises(ConfigError, match=r"images/a\.jpg is one of the images to predict"):
        predict(detector, photos, output_dir=photos, **QUIET)
    predict(detector, photos / "b.png", output_dir=photos, **QUIET)
    assert (photos / "images" / "a.jpg").read_bytes() == before


def test_a_box_is_drawn_where_it_is() -> None:
    found = ImageBoxes(
        boxes=np.array([[100, 50, 300, 200]], np.float32),
        labels=np.array([1]),
        scores=np.array([0.9], np.float32),
        size=(480, 640),
        number=0,
    )
    drawn = np.asarray(draw_found(Image.new("RGB", (640, 480)), found, ["x", "y"])).astype(int)
    orange = np.array([0xD5, 0x5E, 0x00])
    rows, columns = np.nonzero(np.abs(drawn - orange).max(2) == 0)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == pytest.approx((100, 300, 50, 200), abs=2)
    assert draw_found(Image.new("RGB", (40, 20)), found, ["x", "y"]).size == (640, 320)
    assert draw_found(Image.new("RGB", (3200, 1600)), found, ["x", "y"]).size == (1600, 800)
