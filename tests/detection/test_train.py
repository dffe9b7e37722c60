"""Object detection: COCO's files, the pyramid, the attacked total loss, average precision, and runs to the end."""

import json
import math
import os
import shlex
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import equal_states
from tiny_runs import (
    ROOT,
    draw_folder,
    one_thread,  # noqa: F401 - used by itself
    save_tokenizer,
)
from torch import Tensor, nn
from torch.utils.data import default_collate
from torchvision.ops import FrozenBatchNorm2d

from mae_dat.attacks.discrete import DiscreteAdversary
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.commands.detect import DetectConfig
from mae_dat.config.errors import ConfigError, DataError, InterruptError, MissingInputError
from mae_dat.config.parse import load_config
from mae_dat.detection.annotation_checks import decode_upright
from mae_dat.detection.coco import PADDING_LABEL, BoxTransform, CocoImages, CocoSplit, find_annotations
from mae_dat.detection.measure import coco_scores, corruption_summary
from mae_dat.detection.objective import DetectionObjective, ground_truth
from mae_dat.detection.train import (
    build_configured_detector,
    detect,
    measure_detector,
    open_coco_images,
    start_detector,
)
from mae_dat.models.detector import Detector, SimpleFeaturePyramid, build_detector
from mae_dat.models.mae import build_mae
from mae_dat.models.tokenizer import LightConfig, LightTokenizer, load_tokenizer
from mae_dat.models.tokenizer.padded import PaddedTokenizer
from mae_dat.robustness.corruptions import CORRUPTIONS
from mae_dat.runtime.console import Console
from mae_dat.runtime.run_log import read_log
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.training.loop import Trainer
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.optim import build_optimizer

TINY = ["--model", "vit_demo_patch8", "--width", "16", "--anchor_size", "8", "--regions", "8", "--drop_path", "0.2"]
TINY += ["--input_size", "32", "--batch_size", "4", "--epochs", "2", "--warmup_epochs", "0", "--num_workers", "0"]
TINY += ["--lr", "5e-4", "--clip_grad", "1", "--scale_jitter", "0.8", "1.25", "--precision", "fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("boxes") / "data", train=12, val=4, conflict=0)


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained")
    flags = [
        "--epochs",
        "5",
        "--limit",
        "1",
        "--lr",
        "1e-3",
        "--eval_every",
        "100",
        "--images_every",
        "0",
        "--drop_path",
        "0",
    ]
    detect(config_for(folder, output, *flags), Console(quiet=True))
    return output


def test_what_fine_tuning_refuses_is_refused_here() -> None:
    with pytest.raises(ConfigError, match="--dat_free does not go with --fsdp"):
        load_config(DetectConfig, ["--dat", "--dat_free", "--fsdp"])


def config_for(folder: Path, output: Path, *flags: str) -> DetectConfig:
    given = [*TINY, "--data_path", str(folder), "--output_dir", str(output), *flags]
    return load_config(DetectConfig, given)


def weights_in(output: Path) -> dict[str, Tensor]:
    found = newest_checkpoint(output)
    assert found is not None
    return found.load()["model"]


# ---- data ----


COCO: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "train/disc/00000.png", "width": 32, "height": 32},
        {"id": 3, "file_name": "train/square/00001.png", "width": 32, "height": 32},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 90, "bbox": [4, 6, 10, 12], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [20, 20, 12.5, 12], "iscrowd": 1},
    ],
    "categories": [{"id": 90, "name": "late"}, {"id": 5, "name": "early"}],
}


def coco_file(tmp_path: Path, folder: Path, change: Callable[[Any], object] = lambda content: None) -> CocoSplit:
    content = json.loads(json.dumps(COCO))
    change(content)
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return CocoSplit(path, folder)


def test_coco_ids_become_labels_crowds_are_flagged_and_empty_images_stay(tmp_path: Path, folder: Path) -> None:
    images = CocoImages(coco_file(tmp_path, folder), BoxTransform((32, 32)))
    assert images.classes == ["early", "late"]
    full, empty = images[0], images[1]
    assert full["labels"].tolist() == [2, 1]
    assert full["crowd"].tolist() == [False, True]
    # The second leaves its image by half a pixel, as rounding does.
    assert full["boxes"].tolist() == [[4, 6, 14, 18], [20, 20, 32, 32]]
    assert empty["labels"].tolist() == [PADDING_LABEL, PADDING_LABEL]
    batch = default_collate([full, empty])
    assert [one["labels"].tolist() for one in ground_truth(batch)] == [[2], []]
    assert [one["iscrowd"].tolist() for one in ground_truth(batch, crowd=True)] == [[0, 1], []]


def setting(where: str, **values: Any) -> Callable[[Any], object]:
    return lambda content: content[where][0].update(values)


@pytest.mark.parametrize(
    "change, message",
    [
        (setting("images", file_name="train/disc/none.png"), "none.png does not exist"),
        (setting("annotations", bbox=[4, 6, 0, 12]), "annotation 1 .* without area"),
        (setting("annotations", bbox=[30, 6, 10, 12]), "annotation 1 .* outside .* 32 x 32"),
        (setting("annotations", bbox=[4, 6, math.nan, 12]), "not \\(x, y, width, height\\)"),
        (setting("annotations", bbox=[32.5, 6, 0.5, 5]), "outside of its image"),
        (setting("annotations", category_id=6), "unknown category 6"),
        (setting("annotations", image_id=8), "image 8, which is not listed"),
        (setting("annotations", bbox=None), "annotation 1 has the box None, not"),
        (setting("annotations", bbox=["4", "6", "10", "12"]), r"annotation 1 has the box \['4', .* not \(x, y"),
        (setting("annotations", bbox=[None, 6, 10, 12]), r"annotation 1 has the box \[None, 6"),
        (setting("annotations", bbox=[0.1, 0.2, 0.5, 0.5]), "annotation 1 .* seems to be relative to the image"),
        (setting("annotations", iscrowd="yes"), "annotation 1 has iscrowd 'yes', not 0 or 1"),
        (lambda content: content["annotations"][0].pop("bbox"), "annotation 1 has the box None"),
        (setting("annotations", iscrowd=1), "all 2 are crowds"),
        (setting("annotations", iscrowd="1"), "all 2 are crowds"),
        (setting("annotations", image_id=[7]), r"annotation 1 has the image_id \[7\], not a number"),
        (setting("annotations", category_id={}), "annotation 1 has the category_id {}, not a number"),
        (setting("annotations", iscrowd=[1]), r"annotation 1 has the iscrowd \[1\], not a number"),
        (setting("images", id=[7]), r"is not a COCO file: images\[0\].id must be a whole number or text, not a list"),
        (setting("images", file_name=None), r"images\[0\].file_name must be text, not null"),
        (setting("images", file_name="a" * 5000), "does not exist"),
        (setting("images", file_name="a\0"), "does not exist"),
        (setting("images", width=64), "has 32 x 32 pixels, but its JSON has 64 x 32"),
        (setting("categories", id=None), r"categories\[0\].id must be a whole number or text, not null"),
        (setting("categories", id="9"), "is not a COCO file: '<' not supported"),
        (lambda content: content.update(images={}), "images must be a list, not an object"),
        (lambda content: content.update(annotations=[3]), r"annotations\[0\] must be an object .* not 3"),
        (setting("images", id=3), "image 3 .* has an id that occurs 2 times"),
        (setting("images", width=None), "image 7 .* has the size None x 32"),
        (setting("categories", name="early"), "two categories 'early'"),
        (lambda content: content.pop("categories"), "categories is missing"),
        (lambda content: content.update(annotations=[]), "no usable box"),
    ],
)
def test_problems_of_the_data_are_reported_before_training(
    tmp_path: Path, folder: Path, change: Callable[[Any], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        CocoImages(coco_file(tmp_path, folder, change), BoxTransform((32, 32)))


def test_bad_boxes_are_skipped_and_logged_on_request(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def add_bad_box(content: Any) -> None:
        content["annotations"].append({**content["annotations"][0], "id": 3, "bbox": [4, 6, 0, 12]})

    split = coco_file(tmp_path, folder, add_bad_box)
    images = CocoImages(split, BoxTransform((32, 32)), on_bad="skip")
    assert images[0]["labels"].tolist() == [2, 1]
    assert "1 entry skipped" in caplog.text


@pytest.mark.parametrize(
    ("where", "values"),
    [("annotations", {"bbox": None}), ("images", {"height": None}), ("annotations", {"iscrowd": "x"})],
)
def test_entries_that_can_be_skipped_are(tmp_path: Path, folder: Path, where: str, values: dict[str, Any]) -> None:
    def spoil(content: Any) -> None:
        content["annotations"].append({**content["annotations"][0], "id": 3, "image_id": 3, "iscrowd": "0"})
        content[where][0].update(values)

    images = CocoImages(coco_file(tmp_path, folder, spoil), BoxTransform((32, 32)), on_bad="skip")
    assert images.ignored_files.counts == {"entries of the JSON": 1}
    assert images.class_counts()[1] == 1


def test_images_with_exif_orientation_are_turned_upright(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A white square under its box; the file is stored turned, with the tag that turns it upright."""
    from PIL import Image, ImageDraw

    upright = Image.new("RGB", (48, 32))
    ImageDraw.Draw(upright).rectangle((4, 6, 13, 17), fill="white")
    stored = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.transpose(turn).save(tmp_path / "one.png", exif=exif)
        path = tmp_path / "coco.json"
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 6, 10, 12]}
        image = {"id": 1, "file_name": "one.png", "width": 48, "height": 32}
        categories = [{"id": 1, "name": "square"}]
        path.write_text(json.dumps({"images": [image], "annotations": [box], "categories": categories}))
        images = CocoImages(CocoSplit(path, tmp_path), BoxTransform((32, 48)))
        assert images[0]["image"][:, 6:18, 4:14].min() > 0.99
        assert images[0]["image"].mean() == pytest.approx(120 / (48 * 32))
        assert "1 of 1 images have an EXIF orientation" in caplog.text
        caplog.clear()


def test_an_image_of_another_size_than_its_json_says_and_a_class_unknown_to_training(
    tmp_path: Path, folder: Path
) -> None:
    split = coco_file(tmp_path, folder, setting("images", width=64))
    with pytest.raises(DataError, match="2 entries|has no usable box"):
        CocoImages(split, BoxTransform((32, 32)), on_bad="skip")
    with pytest.raises(DataError, match=r"has \(32, 32\)|has 32 x 32 pixels, but its JSON has 64 x 32: repair one"):
        decode_upright(str(sorted((folder / "train").rglob("*.png"))[0]), (32, 64))
    with pytest.raises(DataError, match="'late' is not one of the training's"):
        CocoImages(coco_file(tmp_path, folder), BoxTransform((32, 32)), classes=["early"])


def test_layouts_of_coco_and_their_absence(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no boxes for val"):
        find_annotations(tmp_path, "val")
    (tmp_path / "annotations").mkdir()
    for name, pictures_in in (("instances_val2017", "val2017"), ("val", "val")):
        (tmp_path / "annotations" / f"{name}.json").write_text("{}")
        assert find_annotations(tmp_path, "val").folder == tmp_path / pictures_in


def test_boxes_move_with_their_pixels(tmp_path: Path) -> None:
    """A bright rectangle stays under its box through flip, jitter and crop; the sample is a function of its key."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (60, 40))
    ImageDraw.Draw(canvas).rectangle((10, 8, 29, 27), fill="white")  # inclusive
    canvas.save(tmp_path / "one.png")
    content = {
        "images": [{"id": 1, "file_name": "one.png", "width": 60, "height": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 8, 20, 20]}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    split = CocoSplit(tmp_path / "coco.json", tmp_path)
    augmented = CocoImages(split, BoxTransform((48, 64), (0.7, 1.5)))
    plain = CocoImages(split, BoxTransform((48, 64)))
    seen = []
    for sample in (plain[0], *(augmented[(epoch, 0)] for epoch in range(12))):
        assert sample["image"].shape == (3, 48, 64)
        if sample["labels"].tolist() == [PADDING_LABEL]:
            continue
        rows, columns = (sample["image"][0] > 0.5).nonzero().unbind(1)
        extent = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
        assert (extent - sample["boxes"][0]).abs().max() <= 1.0
        seen.append(tuple(sample["boxes"][0].tolist()))
    assert len(set(seen)) > 8  # that it is augmented at all
    again = CocoImages(split, BoxTransform((48, 64), (0.7, 1.5)))[(3, 0)]
    assert torch.equal(again["image"], augmented[(3, 0)]["image"])


# ---- models ----


@pytest.mark.parametrize("patch, strides", [(8, [4, 8, 16, 32, 64]), (16, [4, 8, 16, 32, 64])])
def test_simple_feature_pyramid(patch: int, strides: list[int]) -> None:
    maps = SimpleFeaturePyramid(16, 8, patch)(torch.randn(1, 16, 128 // patch, 192 // patch))
    assert {name: tuple(one.shape[1:]) for name, one in maps.items()} == {
        name: (8, 128 // stride, 192 // stride) for name, stride in zip([*"0123", "pool"], strides, strict=True)
    }


def test_detector_starts_from_a_pretraining(tmp_path: Path, folder: Path) -> None:
    """Of 64 px into another grid: every block is the encoder's, the position embedding resized."""
    source = build_mae("mae_vit_demo_patch8").state_dict()
    torch.save({"model": source}, tmp_path / "mae.pth")
    config = config_for(folder, tmp_path, "--finetune", str(tmp_path / "mae.pth"), "--input_size", "40", "80")
    trunk: Any = start_detector(config, 3)[0].net.backbone.trunk  # type: ignore[union-attr]
    own = trunk.state_dict()
    assert own["pos_embed"].shape == (1, 1 + 8 * 12, 128)  # padded to 64 x 96 inside
    shared = [name for name in own if name != "pos_embed"]
    assert len(shared) > 50
    assert all(torch.equal(own[name], source[name]) for name in shared)


def test_torchvision_names_and_what_does_not_go_together(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fasterrcnn_resnet50_fpn"):
        build_detector("fasterrcnn_resnet50", 3, (64, 64))
    for flags in (["--pretrained"], ["--model", "fcos_resnet50_fpn", "--finetune", "x"], ["--scale_jitter", "2", "1"]):
        with pytest.raises((ConfigError, SystemExit)):
            config_for(folder, tmp_path, *flags)


def frozen(module: nn.Module) -> nn.Module:
    """The module with torchvision's FrozenBatchNorm2d, as with pretrained weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features))
        else:
            frozen(child)
    return module


# ---- the objective ----


def batch_of(folder: Path, tmp_path: Path, *flags: str, count: int = 4) -> tuple[Any, Detector]:
    config = config_for(folder, tmp_path, *flags)
    images = open_coco_images(config, "train")
    torch.manual_seed(0)
    return default_collate([images[index] for index in range(count)]), build_configured_detector(
        config, len(images.classes)
    )


@pytest.mark.parametrize("kind", ["released", "symbolic"])
def test_the_total_loss_is_attacked(folder: Path, trained: Path, kind: Any) -> None:
    """Odd sizes too; and no attack leaves a trace in the detector. A step in pixels may land in other regions and need
    not raise so small a detector's loss; chosen words must, where as many random ones do not."""
    batch, model = batch_of(folder, trained, "--input_size", "30", "31", count=12)
    model.load_state_dict(weights_in(trained))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokenizer = PaddedTokenizer(load_tokenizer("embedded"), (30, 31))
    attack = AttackConfig(kind, eps=0.5, share=0.1 if kind == "symbolic" else None, random_start=0.0)
    objective = WithDAT(tokenizer, attack, DetectionObjective())
    image, prepared = objective.prepare(model, batch, torch.Generator().manual_seed(0))

    def found_by(objective: WithDAT) -> DiscreteAdversary:
        return objective.adversary(model, image, prepared, torch.Generator().manual_seed(0))

    found = found_by(objective)
    assert found.adversarial.shape == image.shape == (12, 3, 30, 31)
    assert found.words.shape == (12, 8, 8)
    assert 0.005 < float(found.changed_share) < 0.15
    if kind == "symbolic":
        chance = found_by(WithDAT(tokenizer, replace(attack, kind="random"), DetectionObjective()))
        with torch.no_grad():
            views = (found.reconstruction, found.adversarial, chance.adversarial)
            clean, attacked, random = (float(objective.loss(model, view, prepared)) for view in views)
        assert attacked > clean + max(0.05 * clean, 2 * (random - clean))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert equal_states(before, model.state_dict())


@pytest.mark.parametrize(
    "flags",
    [
        ["released", "--dat_eps", "0.5", "--dat_at", "image", "--dat_free"],
        ["paper", "--dat_eps", "10"],
        ["random"],
        ["symbolic", "--dat_batch_share", "0.5"],
    ],
    ids=lambda flags: flags[0],
)
def test_every_form_of_the_step_trains_every_parameter(folder: Path, trained: Path, flags: list[str]) -> None:
    batch, model = batch_of(folder, trained)
    attack = config_for(folder, trained, "--dat", *flags).dat.attack
    assert attack is not None
    objective = WithDAT(load_tokenizer("embedded"), attack, DetectionObjective())
    parts = objective.step(model.train(), batch, torch.Generator().manual_seed(0))
    parts["loss"].backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert float(parts["changed_words"]) > 0
    assert ("loss_clean" in parts) == (flags[0] != "paper")


def test_views_of_a_batch_share_their_chance(folder: Path, tmp_path: Path) -> None:
    """torchvision's sampling and drop path: the same image has the same loss, and the global generator is left."""
    batch, model = batch_of(folder, tmp_path)
    objective = DetectionObjective()
    image, context = objective.prepare(model.train(), batch, torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    one, other = objective.loss(model, image, context), objective.loss(model, image, context)
    assert torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(one, objective.loss(model, image, (context[0], context[1] + 1)))
    parts = objective.step(model, batch, torch.Generator().manual_seed(0))
    assert torch.allclose(parts["loss"], sum(value for name, value in parts.items() if name != "loss"))


def test_frozen_batch_norm_stays_frozen_and_evaluation_gives_losses_too() -> None:
    torch.manual_seed(0)
    model = Detector(frozen(build_detector("fasterrcnn_mobilenet_v3_large_320_fpn", 2, (64, 64)).net))
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    assert any(name.endswith("running_mean") for name in buffers)
    batch: Any = {
        "image": torch.rand(2, 3, 64, 64),
        "boxes": torch.tensor([[[8.0, 8, 40, 48]], [[0.0, 0, 0, 0]]]),
        "labels": torch.tensor([[1], [PADDING_LABEL]]),
        "crowd": torch.zeros(2, 1, dtype=torch.bool),
    }
    model.eval()
    loss = DetectionObjective().step(model, batch, torch.Generator().manual_seed(0))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert not any(module.training for module in model.modules())
    assert equal_states(buffers, dict(model.named_buffers()))


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_boxes_are_computed_in_float32_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    model = build_detector(name, 2, (64, 64)).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model(torch.rand(1, 3, 64, 64))
    assert len(found["boxes"]) > 0
    assert not torch.equal(found["boxes"], found["boxes"].bfloat16().float())


def test_padding_leaves_what_fits_as_it_is() -> None:
    torch.manual_seed(0)
    inner = LightTokenizer(LightConfig(factor=4, width=16, num_words=64)).freeze()
    image = torch.rand(2, 3, 16, 24)
    assert torch.equal(PaddedTokenizer(inner, (16, 24)).reconstruct(image), inner.reconstruct(image))
    odd = PaddedTokenizer(inner, (15, 21))
    image = image[..., :15, :21]
    padded = nn.functional.pad(image, (0, 3, 0, 1), mode="replicate")
    assert torch.equal(odd.reconstruct(image), inner.reconstruct(padded)[..., :15, :21])
    with pytest.raises(ValueError, match="built for"):
        odd.encode(padded)


# ---- average precision ----


def test_perfect_predictions_have_an_average_precision_of_one() -> None:
    boxes = torch.tensor([[2.0, 2, 20, 20], [30, 30, 60, 50]])
    there = {"boxes": boxes, "labels": torch.tensor([1, 2]), "iscrowd": torch.tensor([0, 0])}
    found = {"boxes": boxes, "labels": torch.tensor([1, 2]), "scores": torch.tensor([0.9, 0.8])}
    assert coco_scores([(found, there)]) == {"map": 1.0, "map_50": 1.0, "map_75": 1.0}
    shifted = {**found, "boxes": boxes + torch.tensor([6.0, 0, 6, 0])}  # IoU 0.5 and 0.67
    result = coco_scores([(shifted, there)])
    assert result["map_50"] == pytest.approx(1.0)
    assert result["map_75"] == 0
    # What is found in a crowd is neither right nor wrong.
    extra = {**found, "boxes": torch.cat([boxes, boxes[:1] + 1]), "labels": torch.tensor([1, 2, 1])}
    extra["scores"] = torch.tensor([0.7, 0.8, 0.9])
    crowd = torch.cat([boxes, torch.tensor([[0.0, 0, 25, 25]])])
    flagged = {"boxes": crowd, "labels": torch.tensor([1, 2, 1]), "iscrowd": torch.tensor([0, 0, 1])}
    assert coco_scores([(extra, {name: value[:2] for name, value in flagged.items()})])["map"] < 1
    assert coco_scores([(extra, flagged)])["map"] == 1


def test_corruptions_are_measured_stored_and_not_done_twice(folder: Path, trained: Path, tmp_path: Path) -> None:
    """mPC and rPC from a stored file, through the command; the second time nothing is measured but what was lost."""
    given = ["--eval", "--corrupted", "--severities", "3", "--limit", "2", "--resume", str(trained)]
    config = config_for(folder, tmp_path, *given)
    result = measure_detector(config, Console(quiet=True))
    path = tmp_path / "detection.json"
    stored = json.loads(path.read_text())
    assert set(stored["cells"]) == {"clean", *(f"{name}/3" for name in CORRUPTIONS)}
    assert stored["cells"] == result["cells"]
    del stored["cells"]["fog/3"]
    stored["cells"]["snow/3"]["map"] = 0.25  # to be found again
    path.write_text(json.dumps(stored))
    again = measure_detector(config, Console(quiet=True))["cells"]
    assert again["snow/3"]["map"] == 0.25
    assert again["fog/3"] == result["cells"]["fog/3"]
    images = open_coco_images(config, "val")
    one, other = images.corrupted("fog", 3)[0]["image"], images.corrupted("fog", 3)[0]["image"]
    assert torch.equal(one, other)
    assert not torch.equal(one, images[0]["image"])


def test_mpc_is_a_mean_over_corruptions_and_severities() -> None:
    cells = {"clean": {"map": 0.5}, "fog/1": {"map": 0.4}, "fog/5": {"map": 0.1}, "snow/1": {"map": 0.1}}
    assert corruption_summary(cells) == pytest.approx({"clean": 0.5, "mpc": 0.2, "rpc": 0.4})


# ---- runs ----


def test_the_settings_of_a_run_are_a_config(folder: Path, trained: Path) -> None:
    config = DetectConfig.from_yaml(trained / "config.yaml")
    assert (config.data.data_path, config.run.output_dir) == (str(folder), str(trained))
    words = shlex.split(config.command())
    assert words[:2] == ["mae-dat", "detect"]
    assert load_config(DetectConfig, words[2:]) == config


def test_training_lowers_the_loss(trained: Path) -> None:
    losses = [record["train_loss"] for record in read_log(trained / "log.txt")]
    assert losses[-1] < 0.8 * losses[0]


def test_resume_amid_an_epoch_is_bitwise(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer.safetensors")
    flags = ["--dat", "--tokenizer", str(tokenizer), "--dat_eps", "2", "--images_every", "0", "--limit", "1"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    detect(config_for(folder, straight, *flags), Console(quiet=True))
    real = Trainer.train_step

    def interrupted(trainer: Trainer) -> None:
        if trainer.state.step == 3:  # the first of the second epoch's three
            os.kill(os.getpid(), signal.SIGTERM)
        real(trainer)

    with monkeypatch.context() as patch, pytest.raises(InterruptError, match="stopped at step 4 of 6"):
        patch.setattr(Trainer, "train_step", interrupted)
        detect(config_for(folder, broken, *flags), Console(quiet=True))
    detect(config_for(folder, broken, *flags), Console(quiet=True))
    assert equal_states(weights_in(straight), weights_in(broken))
    record = read_log(straight / "log.txt")[-1]
    assert {"train_loss_clean", "train_loss_adversarial", "train_changed_words", "test_map"} <= record.keys()


@pytest.mark.parametrize("name", ["detect_small", "detect_vit_base"])
def test_recipes_are_read_and_built(name: str) -> None:
    config = load_config(DetectConfig, ["--config", str(ROOT / "configs" / f"{name}.yaml")])
    with torch.device("meta"):
        model = build_configured_detector(config, 3)
        groups = build_optimizer(model, 0.0, 0.1, config.detector.layer_decay).param_groups
    scales = {group["lr_scale"] for group in groups}
    assert max(scales) == 1.0
    assert min(scales) == pytest.approx(config.detector.layer_decay ** (13 if "base" in name else 6))
    spared = {entry for group in groups if group["weight_decay"] == 0 for entry in group["param_names"]}
    assert "net.backbone.trunk.pos_embed" in spared
