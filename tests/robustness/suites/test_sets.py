"""Benchmarks in folders laid out like the originals, built from generated images: labels, masks, protocols, and what
is refused."""

import dataclasses
import hashlib
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_folders import FEW, SIDE, reduced, validation_names, write, write_objectnet
from PIL import Image
from torchvision.transforms.functional import to_tensor

from mae_dat.config.errors import ConfigError, DataError, MissingInputError
from mae_dat.data.loader import eval_loader
from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS, EXTRA
from mae_dat.robustness.suites.catalogue import BENCHMARKS, C_BAR
from mae_dat.robustness.suites.imagenet import IMAGENET_A, IMAGENET_R, NO_CLASS, SIXTEEN, synsets_of
from mae_dat.robustness.suites.inventory import find_benchmark, inventory
from mae_dat.robustness.suites.labels import read_subset
from mae_dat.robustness.suites.preprocessing import Preprocessing
from mae_dat.robustness.suites.sets import BenchmarkSet, open_benchmark

SIZE = (32, 32)


def right_logits(found: BenchmarkSet, wrong: int = 0) -> torch.Tensor:
    """Logits (N, 1000) that are right for all but the first `wrong` images."""
    logits = torch.zeros(len(found), 1000)
    for index in range(len(found)):
        logits[index, (found.label(index) + (index < wrong)) % 1000] = 1
    return logits


def correct(found: BenchmarkSet, logits: torch.Tensor) -> int:
    return int(found.is_correct(found.class_mapping.predictions(logits), torch.arange(len(found))).sum())


# ---- the usual folders ----


def test_v2_labels_are_the_numbers_of_the_folders(tmp_path: Path) -> None:
    """All 10,000: sorted as text, folder 100 would be class 2."""
    write([tmp_path / str(number) / f"{k}.jpeg" for number in range(1000) for k in range(10)])
    (found,) = open_benchmark("imagenet-v2", tmp_path, SIZE)
    assert len(found) == 10_000
    assert [found.label(i) for i in range(0, 10_000, 10)] == list(range(1000))
    assert "/100/" in found.name_of(1000)
    assert found.label(1000) == 100
    assert correct(found, right_logits(found, wrong=7)) == 9993
    shutil.rmtree(tmp_path / "7")
    (tmp_path / "8" / "3.jpeg").unlink()
    with pytest.raises(DataError, match=r"1 of 1000 class folders .*\(7\).*\(8: 9\).* 9,989 of 10,000 images"):
        open_benchmark("imagenet-v2", tmp_path, SIZE)


@pytest.mark.parametrize(("name", "own", "other"), [("a", IMAGENET_A, IMAGENET_R), ("r", IMAGENET_R, IMAGENET_A)])
def test_a_and_r_have_their_own_200_classes(
    name: str, own: tuple[int, ...], other: tuple[int, ...], tmp_path: Path
) -> None:
    benchmark = dataclasses.replace(BENCHMARKS[f"imagenet-{name}"], images=200)
    write([tmp_path / "own" / wnid / "0.jpg" for wnid in synsets_of(own)])
    (found,) = open_benchmark(benchmark, tmp_path / "own", SIZE)
    assert [found.label(i) for i in range(200)] == list(own)
    logits = right_logits(found)
    logits[:, next(i for i in range(1000) if i not in own)] = 9  # wins wherever no mask is applied first
    assert correct(found, logits) == 200
    write([tmp_path / "other" / wnid / "0.jpg" for wnid in synsets_of(other)])
    with pytest.raises(DataError, match=r"114 folders are not classes of ImageNet-.*the folder of another benchmark"):
        open_benchmark(benchmark, tmp_path / "other", SIZE)


def test_counts_are_those_of_the_published_sets() -> None:
    counts = {name: (found.images, len(found.labels), found.per_class) for name, found in BENCHMARKS.items()}
    assert counts == {
        "imagenet": (50_000, 1000, 50),
        "imagenet-real": (50_000, 1000, 50),
        "imagenet-v2": (10_000, 1000, 10),
        "imagenet-a": (7500, 200, None),
        "imagenet-r": (30_000, 200, None),
        "imagenet-sketch": (50_889, 1000, None),
        "stylized": (50_000, 1000, 50),
        "objnet-113": (50_273, 0, None),
        "objnet-1000": (50_273, 0, None),
        "imagenet-c": (50_000, 1000, 50),
        "imagenet-c-bar": (50_000, 1000, 50),
        "imagenet-3dcc": (50_000, 1000, 50),
        "laion-c": (None, 16, None),
        "tiny-imagenet-c": (10_000, 0, 50),
        "cifar-10-c": (10_000, 0, 1000),
        "cifar-100-c": (10_000, 0, 100),
        "cue-conflict": (1280, 16, 80),
    }


def test_samples_through_a_loader(tmp_path: Path) -> None:
    write([tmp_path / name for name in validation_names()], side=70)
    (found,) = open_benchmark(reduced("imagenet"), tmp_path, SIZE)
    seen = [batch for rank in range(2) for batch in eval_loader(found, 2, rank, 2, 0)]
    index = torch.cat([batch["index"] for batch in seen])
    assert sorted(index.tolist()) == list(range(6))
    assert torch.equal(torch.cat([batch["label"] for batch in seen]), torch.div(index, 2, rounding_mode="floor"))
    assert seen[0]["image"].shape == (2, 3, 32, 32)
    (again,) = open_benchmark(reduced("imagenet"), tmp_path, (64, 64))
    before = found.fingerprint()
    assert again.fingerprint() == before
    write([tmp_path / validation_names()[2]], side=71)
    assert again.fingerprint() != before, "another image under the same name"
    assert torch.equal(pickle.loads(pickle.dumps(found))[3]["image"], found[3]["image"])


# ---- what is wrong ----


def test_a_folder_of_the_wrong_level_is_named_with_the_right_one(tmp_path: Path) -> None:
    write([tmp_path / "imagenet" / "val" / name for name in validation_names()])
    benchmark = reduced("imagenet")
    with pytest.raises(DataError, match="its subfolder val has: give that one"):
        open_benchmark(benchmark, tmp_path / "imagenet", SIZE)
    with pytest.raises(DataError, match="give the folder above"):
        open_benchmark(benchmark, tmp_path / "imagenet" / "val" / FEW[0], SIZE)
    with pytest.raises(DataError, match="no class folder of ImageNet, only imagenet"):
        open_benchmark(benchmark, tmp_path, SIZE)
    with pytest.raises(MissingInputError, match="did you mean"):
        open_benchmark(benchmark, tmp_path / "imagenett", SIZE)
    with pytest.raises(ConfigError, match="imagenet-sketch"):
        open_benchmark("imagenet-d", tmp_path, SIZE)


def test_too_few_too_many_and_misplaced_images(tmp_path: Path) -> None:
    names = validation_names()
    benchmark = reduced("imagenet")
    write([tmp_path / name for name in names])
    (tmp_path / names[0]).rename(tmp_path / "aside")
    with pytest.raises(DataError, match=f"{FEW[0]}: 1.*5 of 6 images are there.*--partial"):
        open_benchmark(benchmark, tmp_path, SIZE)
    (partial,) = open_benchmark(benchmark, tmp_path, SIZE, partial=True)
    assert len(partial) == 5
    assert partial.missing
    (tmp_path / "aside").rename(tmp_path / "aside.JPEG")
    with pytest.raises(DataError, match=r"next to the class folders \(aside.JPEG\)"):
        open_benchmark(benchmark, tmp_path, SIZE, partial=True)
    (tmp_path / "aside.JPEG").rename(tmp_path / names[0])
    assert open_benchmark(benchmark, tmp_path, SIZE, partial=True)[0].missing == []
    write([tmp_path / FEW[1] / "ILSVRC2012_val_00000009.JPEG"])
    with pytest.raises(DataError, match=f"{FEW[1]}: 3 images where ImageNet has 2"):
        open_benchmark(benchmark, tmp_path, SIZE, partial=True)
    with pytest.raises(DataError, match="7 images, ImageNet has 6"):
        open_benchmark(dataclasses.replace(benchmark, per_class=None), tmp_path, SIZE)
    (tmp_path / FEW[1] / "more").mkdir()
    with pytest.raises(DataError, match=r"contains folders \(more\)"):
        open_benchmark(benchmark, tmp_path, SIZE)


# ---- ImageNet-C ----


def write_c(root: Path, names: list[str], archives: bool = False) -> list[Path]:
    """Corrupted cells; with `archives` in the folders of the tar files."""
    categories = {name: category for category, members in CATEGORIES.items() for name in members}
    places = [root / (categories.get(name, "extra") if archives else "") / name for name in names]
    paths = [place / str(s) / name for place in places for s in range(1, 6) for name in validation_names()]
    write(paths)
    return paths


@pytest.mark.parametrize("archives", [False, True])
def test_imagenet_c_in_both_layouts(archives: bool, tmp_path: Path) -> None:
    names = list(CORRUPTIONS + EXTRA)
    random.shuffle(names)
    write_c(tmp_path, names, archives)
    cells = open_benchmark(reduced("imagenet-c"), tmp_path, (SIDE, SIDE))
    assert [found.cell[1:] for found in cells] == [(n, s) for n in CORRUPTIONS + EXTRA for s in range(1, 6)]
    assert len({id(found.listing) for found in cells}) == 1  # 95 lists of 50,000 paths would fill the memory
    assert cells[7].name_of(5).endswith("shot_noise/3/" + validation_names()[5])
    assert torch.equal(cells[0][0]["image"] * 255, (cells[0][0]["image"] * 255).round())  # as stored
    assert cells[0].protocol == {
        "reading": "1000 classes",
        "preprocessing": "40 x 40 as stored",
        "folder": tmp_path.name,
        "subset": "",
    }
    assert [
        found.cell.corruption for found in open_benchmark(reduced("imagenet-c"), tmp_path, SIZE, corruptions=["fog"])
    ] == ["fog"] * 5
    with pytest.raises(ConfigError, match="no corruption 'haze'"):
        open_benchmark(reduced("imagenet-c"), tmp_path, SIZE, corruptions=["haze"])


def test_what_is_missing_of_imagenet_c_is_named(tmp_path: Path) -> None:
    benchmark = reduced("imagenet-c")
    write_c(tmp_path, [*CORRUPTIONS, "saturate"])
    assert len(open_benchmark(benchmark, tmp_path, SIZE)) == 80  # held-out ones may be absent
    shutil.rmtree(tmp_path / "fog" / "3")
    shutil.rmtree(tmp_path / "snow")
    shutil.rmtree(tmp_path / "saturate" / "5")
    with pytest.raises(DataError, match="snow is missing; fog has no severity 3; saturate has no severity 5"):
        open_benchmark(benchmark, tmp_path, SIZE)
    cells = open_benchmark(benchmark, tmp_path, SIZE, partial=True)
    assert len(cells) == 73
    assert all("snow is missing" in found.missing for found in cells)
    with pytest.raises(DataError, match="imagenet-c-bar|no folder of a corruption"):
        open_benchmark(reduced("imagenet-c-bar"), tmp_path, SIZE)


def test_other_levels_and_contents_of_imagenet_c_are_refused(tmp_path: Path) -> None:
    benchmark = reduced("imagenet-c")
    paths = write_c(tmp_path, list(CORRUPTIONS))
    for inside in ("fog", "fog/2"):
        with pytest.raises(DataError, match="inside the folder of a corruption"):
            open_benchmark(benchmark, tmp_path / inside, SIZE)
    with pytest.raises(DataError, match="no folder of a corruption"):
        open_benchmark(benchmark, tmp_path.parent, SIZE)
    (tmp_path / "frost" / "6").mkdir()
    with pytest.raises(DataError, match="frost: 6: not a severity"):
        open_benchmark(benchmark, tmp_path, SIZE)
    (tmp_path / "frost" / "6").rmdir()
    paths[0].rename(paths[0].with_name("ILSVRC2012_val_00000009.JPEG"))
    with pytest.raises(DataError, match=r"gaussian_noise/2: lacks .*00000009.JPEG, unlike .*gaussian_noise/1"):
        open_benchmark(benchmark, tmp_path, SIZE)
    paths[0].with_name("ILSVRC2012_val_00000009.JPEG").rename(paths[0])
    shutil.copytree(tmp_path / "fog", tmp_path / "weather" / "fog")
    with pytest.raises(DataError, match="fog exists twice"):
        open_benchmark(benchmark, tmp_path, SIZE)


def test_images_of_another_size_are_refused_before_and_while_reading(tmp_path: Path) -> None:
    paths = write_c(tmp_path, list(CORRUPTIONS))
    paths[-1].unlink()
    write([paths[-1]], side=SIDE + 1)
    with pytest.raises(DataError, match=r"jpeg_compression/5.*: 41 x 41 px,.* stored at 40 x 40"):
        open_benchmark(reduced("imagenet-c"), tmp_path, SIZE)
    paths[-1].unlink()
    write([paths[-1]])
    cells = open_benchmark(reduced("imagenet-c"), tmp_path, SIZE)
    paths[-1].unlink()
    write([paths[-1]], side=SIDE + 1)
    with pytest.raises(DataError, match="41 x 41 px"):
        cells[-1][5]
    paths[-1].write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty; unpack it again"):
        cells[-1][5]
    with pytest.raises(DataError, match="is not a readable image"):
        open_benchmark(reduced("imagenet-c"), tmp_path, SIZE)


def test_imagenet_c_bar(tmp_path: Path) -> None:
    write_c(tmp_path, list(C_BAR))
    cells = open_benchmark(reduced("imagenet-c-bar"), tmp_path, SIZE)
    assert len(C_BAR) == 10
    assert len(cells) == 50
    assert cells[0].cell == ("imagenet-c-bar", "blue_noise_sample", 1)


def test_severities_of_imagenet_c_bar_named_by_their_strength(tmp_path: Path) -> None:
    """As its authors' generator names them: other strengths for each corruption, in the order of numbers."""
    write_c(tmp_path, list(C_BAR))
    strengths = dict.fromkeys(C_BAR, ("0.50", "2.00", "3.10", "9.15", "10.00")) | {C_BAR[3]: ("1", "2", "3", "4", "5")}
    for name, own in strengths.items():
        for severity, strength in enumerate(own, 1):
            (tmp_path / name / str(severity)).rename(tmp_path / name / strength)
    cells = open_benchmark(reduced("imagenet-c-bar"), tmp_path, SIZE)
    assert [found.cell[1:] for found in cells] == [(name, s) for name in C_BAR for s in range(1, 6)]
    assert [Path(found.root).name for found in cells] == [one for own in strengths.values() for one in own]
    (tmp_path / C_BAR[0] / "2.00").rename(tmp_path / "aside")
    with pytest.raises(DataError, match=r"blue_noise_sample: 4 severities named by their strength \(0.50, 3.10, 9.15"):
        open_benchmark(reduced("imagenet-c-bar"), tmp_path, SIZE, partial=True)
    (tmp_path / "aside").rename(tmp_path / C_BAR[0] / "severe")
    with pytest.raises(DataError, match="blue_noise_sample: .*not a severity of ImageNet-C-bar"):
        open_benchmark(reduced("imagenet-c-bar"), tmp_path, SIZE)


def test_the_list_of_robustbench_is_known_by_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text("n01440764/ILSVRC2012_val_00000293.JPEG\nval/n01440764/ILSVRC2012_val_00002138.JPEG\n")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    assert read_subset(file, digest) == {f"n01440764/ILSVRC2012_val_0000{number}.JPEG" for number in ("0293", "2138")}
    with pytest.raises(DataError, match="not RobustBench's list"):
        read_subset(file)
    with pytest.raises(MissingInputError, match="imagenet_test_image_ids"):
        read_subset(tmp_path / "none.txt")


def test_a_subset_needs_its_own_images_only(tmp_path: Path) -> None:
    write_c(tmp_path, list(CORRUPTIONS))
    names = validation_names()
    (tmp_path / "fog" / "2" / names[0]).unlink()
    cells = open_benchmark(reduced("imagenet-c"), tmp_path, SIZE, subset=[names[4], names[1]])
    assert {len(found) for found in cells} == {2}
    assert [cells[0].label(i) for i in range(2)] == [0, 2]
    assert cells[0].protocol["subset"] == "2 pictures of a list"
    assert not cells[0].missing
    (tmp_path / "fog" / "2" / names[1]).unlink()
    with pytest.raises(DataError, match="fog/2: 1 of the 2 listed images are missing"):
        open_benchmark(reduced("imagenet-c"), tmp_path, SIZE, subset=names[1:3])


# ---- protocols ----


def test_preprocessing_is_part_of_the_protocol() -> None:
    def text(name: str, side: int, *rest: str) -> str:
        known = BENCHMARKS[name]
        return str(Preprocessing((side, side), *(rest or ("bicubic",)), side=known.side, border=known.border))

    assert text("imagenet", 224) == "resized to cover 256 x 256 (bicubic), center crop 224 x 224"
    assert text("imagenet", 384, "bilinear") == "resized to cover 384 x 384 (bilinear), center crop 384 x 384"
    assert text("objnet-113", 224).startswith("border of 2 px cut, resized")
    assert text("imagenet-c", 224) == "224 x 224 as stored"
    assert text("imagenet-c", 384) == "224 x 224 as stored, resized to 384 x 384 (bicubic)"


def test_pixels_follow_the_protocol() -> None:
    """A stored image keeps its pixels and all of its field; others are resized even when they have the size."""
    pixels = np.random.default_rng(1).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    stored, other = Preprocessing((SIDE, SIDE), side=SIDE), Preprocessing((SIDE, SIDE))
    assert torch.equal(stored(picture), to_tensor(picture))
    cover, edge = 45, 2
    enlarged = picture.resize((cover, cover), Image.Resampling.BICUBIC)
    assert torch.equal(other(picture), to_tensor(enlarged.crop((edge, edge, edge + SIDE, edge + SIDE))))
    bilinear = dataclasses.replace(other, interpolation="bilinear")(picture)
    assert not torch.equal(bilinear, other(picture))
    larger = dataclasses.replace(stored, size_HW=(80, 80))(picture)
    assert torch.equal(larger, to_tensor(picture.resize((80, 80), Image.Resampling.BICUBIC)))
    framed = Image.new("RGB", (SIDE + 4, SIDE + 4), "red")
    framed.paste(picture, (2, 2))
    assert torch.equal(dataclasses.replace(stored, border=2)(framed), to_tensor(picture))


def test_a_protocol_says_what_happens_to_stored_images() -> None:
    """dat and timm resize and crop them like all others, as the released evaluations do; imagenet-c does not."""
    pixels = np.random.default_rng(1).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    stored = Preprocessing((224, 224), side=224)
    cropped = image.resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240))
    for protocol, crop, expected in (
        ("native", None, image),
        ("imagenet-c", None, image),
        ("dat", None, cropped),
        ("timm", 0.95, image.resize((235, 235), Image.Resampling.BICUBIC).crop((6, 6, 230, 230))),
    ):
        preprocessing = dataclasses.replace(stored, protocol=protocol, crop=crop)
        assert torch.equal(preprocessing(image), to_tensor(expected)), protocol
        assert str(preprocessing).startswith(f"protocol {protocol}: ") == (protocol != "native")
    kept = Preprocessing((224, 224), keep_size=True)
    assert torch.equal(kept(image), to_tensor(image))
    assert torch.equal(dataclasses.replace(kept, protocol="dat")(image), to_tensor(cropped))


# ---- ReaL, ObjectNet, cue conflict ----


def test_real_skips_and_counts_images_without_a_label(tmp_path: Path) -> None:
    write([tmp_path / "val" / name for name in validation_names()])
    labels: list[list[int]] = [[] for _ in range(50_000)]
    labels[0], labels[1], labels[3], labels[5] = [0], [7, 0, 400], [1], [9]
    benchmark = reduced("imagenet-real")
    with pytest.raises(MissingInputError, match=r"real\.json is missing"):
        open_benchmark(benchmark, tmp_path / "val", SIZE)
    (tmp_path / "real.json").write_text(json.dumps(labels))
    (found,) = open_benchmark(benchmark, tmp_path / "val", SIZE)
    assert (len(found), found.left_out) == (4, 2)
    for answers, expected in [((0, 400, 1, 9), 4), ((0, 1, 0, 0), 1), ((7, 7, 1, 2), 2)]:
        logits = torch.nn.functional.one_hot(torch.tensor(answers), 1000).float()
        assert correct(found, logits) == expected
    for bad, fault in [
        (labels[:-1], "not a list of 50000"),
        ([[1000], *labels[1:]], r"\[1000\] are not ImageNet classes"),
    ]:
        (tmp_path / "real.json").write_text(json.dumps(bad))
        with pytest.raises(DataError, match=fault):
            open_benchmark(benchmark, tmp_path / "val", SIZE)
    (tmp_path / "real.json").write_text("{")
    with pytest.raises(DataError, match="it is not JSON"):
        open_benchmark(benchmark, tmp_path / "val", SIZE)
    (tmp_path / "real.json").write_text(json.dumps(labels))
    first = tmp_path / "val" / validation_names()[0]
    first.rename(first.with_name("cat.JPEG"))
    with pytest.raises(DataError, match=r"cat.JPEG: the name of a validation image"):
        open_benchmark(benchmark, tmp_path / "val", SIZE)


def test_both_protocols_of_objectnet(tmp_path: Path) -> None:
    write_objectnet(tmp_path)
    facts = {"images": 313}
    (restricted,) = open_benchmark(dataclasses.replace(BENCHMARKS["objnet-113"], **facts), tmp_path / "images", SIZE)
    (free,) = open_benchmark(dataclasses.replace(BENCHMARKS["objnet-1000"], **facts), tmp_path / "images", SIZE)
    for found in (restricted, free):
        assert (len(found), found.left_out, len(found.classes)) == (113, 200, 113)
        assert [found.label(i) for i in range(113)] == list(range(113))
    logits = torch.zeros(113, 1000)
    logits[torch.arange(12), 2 * torch.arange(12) + 1] = 1  # the second of two classes is as right as the first
    logits[torch.arange(12, 113), 100 + torch.arange(12, 113)] = 1
    assert (correct(restricted, logits), correct(free, logits)) == (113, 113)
    logits[:50, 999] = 2  # no class of ObjectNet
    assert (correct(restricted, logits), correct(free, logits)) == (113, 63)
    assert free.class_mapping.predictions(logits)[0, 0] == NO_CLASS
    assert restricted.protocol["reading"] != free.protocol["reading"]
    assert restricted.protocol["preprocessing"].startswith("border of 2 px cut")


def test_objectnet_refuses_missing_or_foreign_mappings(tmp_path: Path) -> None:
    write_objectnet(tmp_path)
    with pytest.raises(DataError, match="313 of 50,273 images"):
        open_benchmark("objnet-113", tmp_path / "images", SIZE)
    file = tmp_path / "mappings" / "objectnet_to_imagenet_1k.json"
    mapping = json.loads(file.read_text())
    file.write_text(json.dumps(mapping | {"Thing 3": "no such name"}))
    with pytest.raises(DataError, match="contradict each other at 'no such name'"):
        open_benchmark("objnet-113", tmp_path / "images", SIZE)
    del mapping["Thing 3"]
    file.write_text(json.dumps(mapping))
    with pytest.raises(DataError, match=r"do not have 113 classes \(125"):
        open_benchmark("objnet-113", tmp_path / "images", SIZE)
    file.unlink()
    with pytest.raises(MissingInputError, match=r"objectnet_to_imagenet_1k\.json is missing"):
        open_benchmark("objnet-113", tmp_path / "images", SIZE)


def test_cue_conflict_counts_shapes_and_textures(tmp_path: Path) -> None:
    names = list(SIXTEEN)
    paths = [f"{shape}/{shape}{i}-{names[(k + i) % 16]}2.png" for k, shape in enumerate(names) for i in range(3)]
    write([tmp_path / path for path in paths])
    benchmark = dataclasses.replace(BENCHMARKS["cue-conflict"], images=48, per_class=3, side=SIDE)
    (found,) = open_benchmark(benchmark, tmp_path, (SIDE, SIDE))
    assert (len(found), found.left_out) == (32, 16)  # of each three one has equal cues
    logits = torch.full((32, 1000), -9.0)
    for index in range(32):
        shape, texture = (names[int(i)] for i in found.targets[index])
        cue = [shape, texture, next(n for n in names if n not in (shape, texture))][index % 3]
        logits[index, SIXTEEN[cue][0]] = 9
    answers, index = found.class_mapping.predictions(logits), torch.arange(32)
    assert int(found.is_correct(answers, index).sum()) == 11
    assert int(found.is_texture(answers, index).sum()) == 11
    (tmp_path / "cat" / "dog1-cat1.png").write_bytes((tmp_path / paths[0]).read_bytes())
    with pytest.raises(DataError, match=r"cat/dog1-cat1.png: expected <shape>/<shape>"):
        open_benchmark(dataclasses.replace(benchmark, images=49, per_class=None), tmp_path, SIZE)


# ---- finding ----


def test_benchmarks_are_found_by_their_usual_names(tmp_path: Path) -> None:
    for folder in ("ImageNet-C", "imagenet_a", "imagenetV2-matched-frequency-format-val", "ILSVRC2012/val"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("imagenet-sketch/sketch", "objectnet-1.0/images", "val"):
        (tmp_path / folder).mkdir(parents=True)
    expected = {
        "imagenet": "ILSVRC2012/val",  # `val` alone could be anybody's
        "imagenet-c": "ImageNet-C",
        "imagenet-a": "imagenet_a",
        "imagenet-v2": "imagenetV2-matched-frequency-format-val",
        "imagenet-sketch": "imagenet-sketch/sketch",
        "imagenet-r": None,
    }
    assert {name: find_benchmark(tmp_path, name) for name in expected} == {
        name: path and tmp_path / path for name, path in expected.items()
    }
    assert find_benchmark(tmp_path / "ImageNet-C", "imagenet-c") == tmp_path / "ImageNet-C"
    rows = {row.benchmark.name: row for row in inventory(tmp_path)}
    assert rows["imagenet-real"].folder is None
    assert "real.json is missing" in rows["imagenet-real"].reason
    assert "folder_to_objectnet_label.json is missing" in rows["objnet-113"].reason
    (tmp_path / "imagenet_c").mkdir()
    with pytest.raises(DataError, match="may each be ImageNet-C"):
        find_benchmark(tmp_path, "imagenet-c")
    assert list(rows) == list(BENCHMARKS)
    assert rows["imagenet-a"].folder == tmp_path / "imagenet_a"
    assert rows["imagenet-r"] == (BENCHMARKS["imagenet-r"], None, "no folder imagenet-r, in any spelling")
    with pytest.raises(MissingInputError):
        inventory(tmp_path / "nowhere")
