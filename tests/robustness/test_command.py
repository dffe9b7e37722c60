"""Every suite in one command: real folders, real networks, counts held against a plain loop over the images."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from benchmark_folders import FEW, SIDE, reduced, validation_names, write_objectnet
from built_suites import open_sources, suite_from
from evaluated_models import Linear, dataset, draw, imagenet, saved, write_onnx, write_timm
from PIL import Image
from quiet_evaluation import evaluate
from ranks import exit_codes, start_ranks
from tiny_runs import ROOT, environment, outcome_of, run_script, verb
from torch import Tensor, nn
from torchvision.transforms import functional
from torchvision.transforms.functional import to_tensor
from word_curves import word_accuracy

from mae_dat.attacks.discrete import image_generator
from mae_dat.attacks.pixel import PIXEL_ATTACKS, pixel_adversary
from mae_dat.attacks.word_budget import WordAttack
from mae_dat.config.commands.pack import PackConfig
from mae_dat.config.errors import CheckpointError, ConfigError, DataError, MissingInputError, NumericsError, UserError
from mae_dat.data.loader import eval_loader
from mae_dat.data.shards.pack import pack
from mae_dat.models.classifier import Classifier, pretrained_timm
from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA, as_stored, corrupt_image, image_seed
from mae_dat.robustness.measure import ImagePass, PassImages, measure_passes
from mae_dat.robustness.report.measurements import corruption_counts
from mae_dat.robustness.scores.corruption_error import mce
from mae_dat.robustness.scores.results import Results, read_results
from mae_dat.robustness.suites.catalogue import BENCHMARKS, C_BAR
from mae_dat.robustness.suites.choose import choose_suites
from mae_dat.robustness.suites.imagenet import IMAGENET_A, IMAGENET_R, SIXTEEN, SYNSETS, synsets_of
from mae_dat.robustness.suites.preprocessing import Preprocessing
from mae_dat.robustness.suites.sets import BenchmarkSet
from mae_dat.runtime.console import Console
from mae_dat.runtime.world import World

__all__ = ["dataset", "imagenet"]  # fixtures

CPU = torch.device("cpu")


def printed(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command shows on its standard output."""
    verb("evaluate")(arguments)
    return capsys.readouterr().out


def cells(results: Results, suite: str, name: str = "Linear") -> dict[str, Any]:
    return dict(results["cells"][name][suite])


# ---- counts ----


def test_the_command_measures_what_lies_in_a_folder(
    imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two checkpoints side by side; every count as a plain loop over the files finds it."""
    from mae_dat.models.weights.open import open_model

    files = [saved(tmp_path / name / "model.safetensors", side=SIDE, seed=i) for i, name in enumerate("ab")]
    flags = ["--checkpoint", *map(str, files), "--data_path", str(imagenet), "--output_dir", str(tmp_path / "out")]
    flags += ["--num_workers", "0", "--precision", "fp32", "--device", "cpu", "--baseline", "b/model"]
    asked = ["imagenet", "imagenet-a", "imagenet-v2", "imagenet-c", "cue-conflict", "fgsm-1/255"]
    headline = printed([*flags, "--suite", *asked], monkeypatch, capsys)
    results = read_results(tmp_path / "out" / "results.json")
    assert list(results["models"]) == ["b/model", "a/model"]
    assert "imagenet-r" in results["not_measured"]
    assert (tmp_path / "out" / "report.html").is_file()
    model = open_model(files[0]).classifier()
    found = results["cells"]["a/model"]

    def to_tensor_of(path: Path) -> Tensor:
        return Preprocessing((SIDE, SIDE), side=SIDE if "ImageNet-C" in str(path) else None)(Image.open(path))

    def answers(paths: list[Path], classes: tuple[int, ...] = tuple(range(1000))) -> list[int]:
        with torch.no_grad():
            logits = model(torch.stack([to_tensor_of(path) for path in paths]))
        return [classes[i] for i in logits[:, list(classes)].argmax(1).tolist()]

    val = sorted((imagenet / "imagenet" / "val").rglob("*.JPEG"))
    labels = [SYNSETS.index(path.parent.name) for path in val]
    assert found["imagenet"][""]["correct"] == sum(map(int.__eq__, answers(val), labels))
    own = sorted((imagenet / "imagenet-a").rglob("*.jpg"))
    truth = [SYNSETS.index(path.parent.name) for path in own]
    assert found["imagenet-a"][""]["correct"] == sum(map(int.__eq__, answers(own, IMAGENET_A), truth))
    for cell in ("fog/3", "jpeg_compression/5"):
        stored = sorted((imagenet / "ImageNet-C" / cell).rglob("*.JPEG"))
        assert found["imagenet-c"][cell]["correct"] == sum(map(int.__eq__, answers(stored), labels))
    assert len(found["imagenet-c"]) == 75
    assert {count["total"] for count in found["imagenet-c"].values()} == {6}
    categories, told = list(SIXTEEN), {"shape": 0, "texture": 0, "total": 0}
    for path in (imagenet / "cue-conflict").rglob("*.png"):
        shape, texture = (word.rstrip("0123456789") for word in path.stem.split("-"))
        if shape != texture:
            with torch.no_grad():
                shares = model(to_tensor(Image.open(path))[None])[0].double().softmax(0)
            answer = categories[int(torch.stack([shares[list(SIXTEEN[name])].mean() for name in categories]).argmax())]
            told["total"] += 1
            told["shape"] += answer == shape
            told["texture"] += answer == texture
    assert found["cue-conflict"][""] == {**told, "correct": told["shape"]}
    with torch.no_grad():
        five = model(torch.stack([to_tensor_of(path) for path in val])).topk(5).indices.tolist()
    assert found["imagenet"][""]["top5"] == sum(label in own for label, own in zip(labels, five, strict=True))
    assert results["suites"]["a/model"]["cue-conflict"]["left_out"] == 16
    assert set(results["calibration"]["a/model"]) == {"imagenet", "imagenet-a", "imagenet-v2"}
    verb("report")([str(tmp_path / "out")])
    assert capsys.readouterr().out == headline + f"{tmp_path / 'out' / 'report.html'}\n"
    scores = corruption_counts(results, "a/model", "imagenet-c")
    for relative, title in [(False, "mCE"), (True, "relative mCE")]:
        (line,) = (line for line in headline.splitlines() if f": {title}" in line)
        assert f"{mce(scores, relative=relative):.1f}" in line


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ReaL, R, Sketch, Stylized, ObjectNet and C-bar with few classes, laid out like the originals."""
    root, names, few_of_r = tmp_path / "others", validation_names(), synsets_of(IMAGENET_R)[:4]
    labels = dict(zip(few_of_r, IMAGENET_R, strict=False))
    for name in ("imagenet-real", "stylized", "imagenet-c-bar"):
        monkeypatch.setitem(BENCHMARKS, name, reduced(name))
    monkeypatch.setitem(BENCHMARKS, "imagenet-sketch", reduced("imagenet-sketch", per_class=None))
    monkeypatch.setitem(BENCHMARKS, "imagenet-r", reduced("imagenet-r", images=12, labels=labels, per_class=None))
    for name in ("objnet-113", "objnet-1000"):
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], images=313))
    draw([root / "ILSVRC2012" / "val" / name for name in names], side=70)
    real = [[0, 2], [1], [], [0], [2], [1, 2]] + [[]] * 49_994
    (root / "ILSVRC2012" / "real.json").write_text(json.dumps(real))
    draw([root / "imagenet-r" / wnid / f"{k}.jpg" for wnid in few_of_r for k in range(3)], side=50)
    draw([root / "imagenet-sketch" / "sketch" / name for name in names], side=50)
    draw([root / "stylized-imagenet" / "val" / name for name in names])
    write_objectnet(root / "objectnet-1.0")
    objects = sorted(path.parent for path in (root / "objectnet-1.0" / "images").rglob("*.png"))
    for folder in objects:  # one image under many names
        (folder / "0.png").unlink()
    draw([folder / "0.png" for folder in objects], side=60)
    draw([root / "ImageNet-C-bar" / c / str(s) / name for c in C_BAR for s in range(1, 6) for name in names])
    return root


def taught(image: Tensor, answers: list[int]) -> Linear:
    """A network of ImageNet's classes that gives these answers for these images, as far as it can."""
    network = Linear(1000)
    features = network[1](network[0](image))
    network[2].weight.data = torch.linalg.lstsq(features, nn.functional.one_hot(torch.tensor(answers), 1000).float())[
        0
    ].T
    network[2].bias.data.zero_()
    return network


def test_the_other_suites_count_what_a_plain_loop_counts(others: Path) -> None:
    """Right, for two images of three, are the labels that this test reads from the folders and files itself."""
    real = json.loads((others / "ILSVRC2012" / "real.json").read_text())
    members = {f"thing_{i:03d}": [2 * i, 2 * i + 1] if i < 12 else [100 + i] for i in range(113)}
    overlap = sorted(number for own in members.values() for number in own)
    every, usual = list(range(1000)), {"": lambda path: [SYNSETS.index(path.parent.name)]}
    objects = {"": lambda path: members.get(path.parent.name, [])}
    cells_of_c_bar = {f"{name}/{severity}": usual[""] for name in C_BAR for severity in range(1, 6)}
    suites: dict[str, tuple[str, dict[str, Any], Sequence[int], int]] = {
        "imagenet-real": ("ILSVRC2012/val", {"": lambda path: real[int(path.stem[-8:]) - 1]}, every, 5),
        "imagenet-r": ("imagenet-r", usual, IMAGENET_R, 12),
        "imagenet-sketch": ("imagenet-sketch/sketch", usual, every, 6),
        "stylized": ("stylized-imagenet/val", usual, every, 6),
        "objnet-113": ("objectnet-1.0/images", objects, overlap, 113),
        "objnet-1000": ("objectnet-1.0/images", objects, every, 113),
        "imagenet-c-bar": ("ImageNet-C-bar", cells_of_c_bar, every, 6),
    }
    hits = {}
    for name, (folder, truths, counted, total) in suites.items():

        def pixels(path: Path, name: str = name) -> Tensor:
            image, cut = Image.open(path).convert("RGB"), 2 if name.startswith("objnet") else 0
            image = image.crop((cut, cut, image.width - cut, image.height - cut))
            if name not in ("stylized", "imagenet-c-bar"):  # which are stored at their size
                image = functional.resize(image, [SIDE * 8 // 7], functional.InterpolationMode.BICUBIC)
            return to_tensor(functional.center_crop(image, [SIDE]))

        places = {cell: sorted((others / folder / cell).glob("*/*.*")) for cell in truths}
        asked = [(cell, path, truths[cell](path)) for cell, paths in places.items() for path in paths]
        asked = [one for one in asked if one[2]]
        image = torch.stack([pixels(path) for _, path, _ in asked])
        network = taught(image, [truth[0] if at % 3 else 999 for at, (_, _, truth) in enumerate(asked)])
        network[2].bias.data[0] += 0.2  # of no class of R
        with torch.no_grad():
            answers = [counted[one] for one in network(image)[:, list(counted)].argmax(1).tolist()]
        right = dict.fromkeys(truths, 0)
        for (cell, _, truth), answer in zip(asked, answers, strict=True):
            right[cell] += answer in truth
        results = cells(evaluate(network, name, others, input_size=SIDE), name)
        assert {cell: (own["correct"], own["total"]) for cell, own in results.items()} == {
            cell: (count, total) for cell, count in right.items()
        }
        hits[name] = sum(right.values())
        assert 0 < hits[name] < total * len(truths), name
    assert hits["objnet-1000"] < hits["objnet-113"]


def test_corruptions_are_made_from_the_image_as_the_network_gets_it(dataset: Path) -> None:
    network = Linear()
    results = cells(evaluate(network, "generated", dataset, input_size=32, held_out=True, seed=3), "generated")
    assert len(results) == 5 * len(CORRUPTIONS + EXTRA)
    paths = sorted((dataset / "val").rglob("*.png"))
    names = sorted({path.parent.name for path in paths})
    for name, severity in [("fog", 2), ("impulse_noise", 5)]:
        pixels = [np.array(Image.open(path).convert("RGB")) for path in paths]
        seeds = [image_seed(3, index, name, severity) for index in range(len(pixels))]
        made = [as_stored(corrupt_image(p, name, severity, seed)) for p, seed in zip(pixels, seeds, strict=True)]
        with torch.no_grad():
            five = network(torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255).topk(5).indices.tolist()
        truth = [names.index(path.parent.name) for path in paths]
        right = sum(best[0] == label for best, label in zip(five, truth, strict=True))
        top5 = sum(label in best for best, label in zip(five, truth, strict=True))
        assert results[f"{name}/{severity}"] == {"correct": right, "total": 20, "top5": top5}
        clean = suite_from(open_sources(dataset), "clean").passes[0].images
        image_pass = ImagePass(clean, (f"{name}/{severity}",), corruption=name, severities=(severity,), seed=3)
        assert np.array_equal(PassImages([image_pass])[0, 7]["images"][0].permute(1, 2, 0), made[7])


SOME = ("clean", "generated", "pgd-5-1/255", "words-random", "words-symbolic")


def test_counts_depend_neither_on_batches_nor_on_workers(dataset: Path) -> None:
    network = Linear()
    expected = evaluate(network, SOME, dataset, input_size=32)
    assert 0 < cells(expected, "generated")["fog/3"]["correct"] < 20
    for batch_size, workers in [(1, 0), (7, 0), (64, 2)]:
        again = evaluate(network, SOME, dataset, input_size=32, batch_size=batch_size, num_workers=workers)
        assert again["cells"] == expected["cells"]
        assert again["calibration"]["Linear"]["clean"] == pytest.approx(expected["calibration"]["Linear"]["clean"])


class Ranks:
    """An all-reduce between threads."""

    def __init__(self, size: int) -> None:
        self.barrier, self.tables, self.size = threading.Barrier(size, timeout=60), {}, size

    def reduce(self, rank: int) -> Callable[[Tensor], Tensor]:
        def total(table: Tensor) -> Tensor:
            self.tables[rank] = table
            self.barrier.wait()
            summed = torch.stack([self.tables[one] for one in range(self.size)]).sum(0)
            self.barrier.wait()
            return summed

        return total

    def run(self, network: Callable[[Tensor], Tensor], passes: list[ImagePass]) -> list[Any]:
        """What every rank finds, or the error that it ends with."""
        found: list[Any] = [None] * self.size

        def act(rank: int) -> None:
            options = {"batch_size": 4, "device": CPU, "world": World(rank, self.size), "reduce": self.reduce(rank)}
            try:
                todo = [(image_pass, ["net"]) for image_pass in passes]
                found[rank] = [new["net"] for _, new in measure_passes({"net": network}, todo, **options)]
            except UserError as error:
                found[rank] = error

        threads = [threading.Thread(target=act, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@pytest.mark.parametrize("size", [2, 3, 7, 23])
def test_counts_are_the_same_on_all_ranks(size: int, dataset: Path) -> None:
    """23 ranks leave three without an image."""
    network, sources = Linear().eval(), open_sources(dataset)
    passes = [one for name in ("clean", "fgsm-1/255", "words-random") for one in suite_from(sources, name).passes]
    passes.append(suite_from(sources, "generated").passes[9])
    (expected,) = Ranks(1).run(network, passes)
    for found in Ranks(size).run(network, passes):
        assert [one.counts for one in found] == [one.counts for one in expected]
        assert found[0].calibration == pytest.approx(expected[0].calibration)


def test_a_nan_on_one_rank_is_an_error_on_all_that_names_network_and_cell(dataset: Path) -> None:
    passes = list(suite_from(open_sources(dataset), "clean").passes)
    ill = passes[0].images[5]["image"].mean()

    def network(image: Tensor) -> Tensor:
        means = image.mean((1, 2, 3))
        return torch.where((means - ill).abs() < 1e-6, torch.nan, means)[:, None].expand(-1, 10)

    for found in Ranks(3).run(network, passes):
        assert isinstance(found, NumericsError)
        assert re.search(r"net gave NaN or infinite logits for 1 of the first 1\d images of clean", str(found))
    with pytest.raises(NumericsError, match="network gave NaN"):
        evaluate(network, "clean", dataset, input_size=32)


@pytest.mark.parametrize(("bad", "after"), [(torch.nan, 0), (torch.inf, 6), (-torch.inf, 6)])
@pytest.mark.parametrize("suite", ["clean", "generated", "words-random"])
def test_logits_that_are_not_finite_stop_an_evaluation_in_their_batch(
    bad: float, after: int, suite: str, dataset: Path
) -> None:
    def network(image: Tensor) -> Tensor:
        nonlocal seen
        seen += len(image)
        logits = image.flatten(1)[:, :10].clone()
        logits[:, 3:5] = bad if seen > after else 0.0
        return logits

    (image_pass, *_) = suite_from(open_sources(dataset), suite).passes
    seen = 0
    with pytest.raises(NumericsError, match="NaN or infinite logits"):
        list(measure_passes({"network": network}, [(image_pass, ["network"])], batch_size=2, device=CPU))
    assert seen <= after + 2 * len(image_pass.cells)


def _two_ranks(rank: int, arguments: list[str]) -> None:
    verb("evaluate")(arguments)


@pytest.mark.slow
def test_two_real_ranks_write_what_one_does(dataset: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "net.safetensors", 10)
    flags = ["--checkpoint", str(file), "--data_path", str(dataset), "--num_workers", "0", "--suite", *SOME]
    flags += ["--rescore", "0"]
    ranks = start_ranks(
        2, _two_ranks, [*flags, "--output_dir", str(tmp_path / "two"), "--device", "cpu", "--precision", "fp32"]
    )
    assert exit_codes(ranks, 240) == [0, 0]
    two = read_results(tmp_path / "two" / "results.json")
    one = evaluate({"net": file}, SOME, dataset, device="cpu")
    for key in ("cells", "calibration", "suites", "checks"):
        assert two[key] == one[key]  # type: ignore[literal-required]


def test_a_limit_takes_the_same_images_with_the_same_chance(dataset: Path) -> None:
    network = Linear()
    results = evaluate(network, ("clean", "generated"), dataset, input_size=32, limit=8, seed=1)
    assert {count["total"] for suite in ("clean", "generated") for count in cells(results, suite).values()} == {8}
    assert results["suites"]["Linear"]["clean"]["protocol"]["subset"] == "8 of 20 pictures (seed 1)"
    few, whole = (
        suite_from(open_sources(dataset, limit=limit, seed=1), "clean").passes[0].images for limit in (8, None)
    )
    assert [few.name_of(i) for i in range(8)] == [whole.name_of(number) for number in few.folder_indices]
    assert [few.label(i) for i in range(8)] == [whole.label(number) for number in few.folder_indices]
    passes = [ImagePass(one, ("fog/2",), corruption="fog", severities=(2,)) for one in (few, whole)]
    made = PassImages(passes)
    assert torch.equal(made[0, 3]["images"], made[1, few.folder_indices[3]]["images"])


def test_limits_mean_the_same_for_every_suite(dataset: Path) -> None:
    sources = open_sources(dataset, limit=8, limit_corrupted=3)
    counts = {
        name: {len(image_pass.images) for image_pass in suite_from(sources, name).passes}
        for name in ("clean", "generated", "fgsm-1/255")
    }
    assert counts == {"clean": {8}, "generated": {3}, "fgsm-1/255": {3}}
    sources = open_sources(dataset, limit=2, limit_corrupted=3)
    assert {len(suite_from(sources, name).passes[0].images) for name in ("clean", "generated")} == {2}


# ---- going on ----


def test_images_in_shards_count_as_in_folders(dataset: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    pack(PackConfig(str(dataset), str(packed), num_workers=0), Console(quiet=True))
    names, options = ("clean", "fgsm-1/255"), {"input_size": 32, "num_workers": 1}
    results = evaluate(Linear(), names, packed, **options)
    assert results["cells"] == evaluate(Linear(), names, dataset, **options)["cells"]
    assert choose_suites(["all"], open_sources(packed)) == choose_suites(["all"], open_sources(dataset))
    few, all_ = (suite_from(open_sources(packed, limit=limit), "clean") for limit in (8, None))
    assert few.facts["fingerprint"] != all_.facts["fingerprint"]
    content = next(packed.glob("val/*.tar")).read_bytes()
    at = content.index(b"\x89PNG")
    next(packed.glob("val/*.tar")).write_bytes(content[:at] + bytes(64) + content[at + 64 :])
    with pytest.raises(DataError, match=r"member .* unpack it again$"):
        evaluate(Linear(), "clean", packed, **options)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(dataset: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"input_size": 32, "batch_size": 20, "output_dir": tmp_path}
    network = Linear()
    network.most = 20 * 32 + 30  # amid the seventh of the 15 corruptions, after a look at blank images and a check
    with pytest.raises(KeyboardInterrupt):
        evaluate(network, ("clean", "generated"), dataset, **options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert 4 < len(kept) < 15
    assert not (tmp_path / "results.json").exists()
    network.most, network.seen = float("inf"), 0
    results = evaluate(network, ("clean", "generated"), dataset, **options)
    assert 0 < network.seen < 20 * 60
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert results["cells"] == evaluate(network, ("clean", "generated"), dataset, input_size=32)["cells"]
    network.seen = 0
    assert evaluate(network, ("clean", "generated"), dataset, **options)["cells"] == results["cells"]
    assert network.seen < 150  # the checks of the network itself, among them those of its normalization
    damaged = next(iter(kept))
    damaged.write_text(damaged.read_text()[:50])
    assert evaluate(network, ("clean", "generated"), dataset, **options)["cells"] == results["cells"]


def test_what_changes_is_measured_anew(dataset: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"input_size": 32, "output_dir": tmp_path}
    first = evaluate(Linear(), ("clean", "fgsm-1/255"), dataset, **options)
    before = len(list((tmp_path / "cells").iterdir()))
    other = evaluate(Linear(seed=1), ("clean", "fgsm-1/255"), dataset, **options)
    assert other["cells"] != first["cells"]
    assert len(list((tmp_path / "cells").iterdir())) == 2 * before
    evaluate(Linear(), "clean", dataset, **options, interpolation="bilinear")
    assert len(list((tmp_path / "cells").iterdir())) == 2 * before + 1
    evaluate(Linear(), "words-random", dataset, **options)
    evaluate(Linear(), "words-random", dataset, **options, seed=1)
    assert len(list((tmp_path / "cells").iterdir())) == 2 * before + 3

    def nameless(image: Tensor) -> Tensor:  # has no weights to be known by
        return image.flatten(1)[:, :10]

    evaluate(nameless, "clean", dataset, **options)
    assert len(list((tmp_path / "cells").iterdir())) == 2 * before + 3
    again = Path(shutil.copytree(dataset, tmp_path / "again"))
    evaluate(Linear(), "clean", again, **options)
    assert len(list((tmp_path / "cells").iterdir())) == 2 * before + 3, "the same images, wherever they lie"
    for path in (again / "val").rglob("*.png"):  # other images under the same names
        Image.open(path).rotate(90).save(path)
    evaluate(Linear(), "clean", again, **options)
    assert len(list((tmp_path / "cells").iterdir())) == 2 * before + 4


# ---- networks ----


def test_onnx_files_count_as_the_network_that_they_were(dataset: Path, tmp_path: Path) -> None:
    network = Linear()
    file = write_onnx(network, tmp_path / "linear.onnx")
    results = evaluate({"onnx": file, "torch": network}, ("clean", "generated", "fgsm-1/255"), dataset, input_size=32)
    assert cells(results, "clean", "onnx") == cells(results, "clean", "torch")
    assert cells(results, "generated", "onnx") == cells(results, "generated", "torch")
    assert results["models"]["onnx"]["parameters"] == 490
    assert "fgsm-1/255" not in results["cells"]["onnx"]
    assert results["not_measured"]["fgsm-1/255"] == "onnx gives no gradient"
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"bad\.onnx cannot be run as ONNX"):
        evaluate(tmp_path / "bad.onnx", "clean", dataset)
    with pytest.raises(ConfigError, match="does not take images of 2 x 3 x 48 x 48"):
        evaluate(file, "clean", dataset, input_size=48)


def test_onnx_files_of_a_fixed_batch_are_run_at_it_or_refused_with_the_fix(dataset: Path, tmp_path: Path) -> None:
    network = Linear()
    expected = cells(evaluate(network, "clean", dataset, input_size=32), "clean")
    for batch in (1, 3, 8):
        file = write_onnx(network, tmp_path / "fixed.onnx", batch)
        assert cells(evaluate({"onnx": file}, "clean", dataset, batch_size=7), "clean", "onnx") == expected
    with pytest.raises(ConfigError, match=r"does not take images of 2 x 3 x 32 x 32.*with a dynamic batch axis"):
        evaluate(write_onnx(network, tmp_path / "traced.onnx", flat=1), "clean", dataset)


def test_timms_own_names_reach_timm(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network, out = write_timm(tmp_path / "net").eval(), tmp_path / "out"
    arguments = [
        "--data_path",
        str(dataset),
        "--suite",
        "clean",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--output_dir",
        str(out),
    ]
    source = f"local-dir:{tmp_path / 'net'}"
    printed(["--model", source, "--pretrained", *arguments, "--input_size", "32"], monkeypatch, capsys)
    ours = Classifier(network, (0.5,) * 3, (0.5,) * 3)
    expected = evaluate({"net": ours}, "clean", dataset, input_size=32, device="cpu")["cells"]["net"]
    (found,) = read_results(out / "results.json")["cells"].values()
    assert found == expected
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # timm itself says that it finds nothing
    for flags, message in [
        (["--model", "hf-hub:timm/no_such_model", "--pretrained"], r"hf-hub:timm/no_such_model is not available: .*"),
        (["--checkpoint", "hf-hub:timm/resnet18"], "--model hf-hub:timm/resnet18 --pretrained"),
        (["--checkpoint", "timm/resnet18"], "--model hf-hub:timm/resnet18 --pretrained"),
        (["--model", "timm/resnet18", "--pretrained"], "Use 'hf-hub:timm/resnet18'"),
        (["--model", f"local-dir:{tmp_path / 'none'}", "--pretrained"], "none is not available: Config file not found"),
    ]:
        outcome = outcome_of(verb("evaluate"), [*flags, *arguments], monkeypatch, capsys)
        assert outcome.code in (64, 66), flags
        assert re.search(message, outcome.stderr), outcome.stderr
    write_timm(tmp_path / "features", classes=0)
    with pytest.raises(ConfigError, match="features has no classes"):
        pretrained_timm(f"local-dir:{tmp_path / 'features'}")


def test_timms_weights_are_measured_with_timms_crop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network's input as timm's own evaluation makes it; ours, and what --crop asks for, beside it."""
    network, out = write_timm(tmp_path / "net").eval(), tmp_path / "out"
    paths = [tmp_path / "data" / "val" / f"{label}" / f"{k}.png" for label in range(10) for k in range(3)]
    draw(paths, side=90)
    made = timm.data.create_transform(**timm.data.resolve_model_data_config(network) | {"input_size": (3, 32, 32)})
    with torch.no_grad():
        answers = network(torch.stack([made(Image.open(path)) for path in paths])).argmax(1).tolist()  # type: ignore[operator]
    flags = ["--model", f"local-dir:{tmp_path / 'net'}", "--pretrained", "--data_path", str(tmp_path / "data")]
    flags += [
        "--suite",
        "clean",
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--input_size",
        "32",
        "--output_dir",
        str(out),
    ]
    flags += ["--precision", "fp32"]
    printed(flags, monkeypatch, capsys)
    results = read_results(out / "results.json")
    (counts,), (facts,), (suites,) = (results[key].values() for key in ("cells", "models", "suites"))  # type: ignore[literal-required]
    assert counts["clean"][""]["correct"] == sum(a == int(p.parent.name) for a, p in zip(answers, paths, strict=True))
    assert facts["crop"] == 0.95
    expected = (
        "if not 32 x 32: resized to cover 33 x 33 (bicubic), center crop 32 x 32, the network's own share of 0.95"
    )
    assert suites["clean"]["protocol"]["preprocessing"] == expected
    assert "| crop | 0.95 of the side |" in (out / "report.md").read_text()
    printed([*flags, "--crop", "0.875"], monkeypatch, capsys)
    again = read_results(out / "results.json")
    assert "crop" not in next(iter(again["models"].values()))
    assert len(list((out / "cells").iterdir())) == 2
    ours = evaluate(Classifier(network, (0.5,) * 3, (0.5,) * 3), "clean", tmp_path / "data", input_size=32)
    assert "crop" not in ours["models"]["Classifier"]
    assert ours["cells"]["Classifier"] == next(iter(again["cells"].values()))
    with pytest.raises(ConfigError, match=r"--crop 1\.5: give a share"):
        evaluate(Linear(), "clean", tmp_path / "data", input_size=32, crop=1.5)


def test_attacks_are_checked_and_symbolic_words_beat_random_ones(dataset: Path) -> None:
    results = evaluate(Linear(), ("fgsm-1/255", "words-random", "words-symbolic"), dataset, input_size=32)
    checks = results["checks"]["Linear"]
    assert {check["name"] for check in checks["gradient attacks"]} >= {"gradients", "PGD beats FGSM"}
    assert all(check["passed"] for check in checks["words-symbolic"])
    assert list(cells(results, "words-random")) == [
        "0",
        "0.01",
        "0.05",
        "0.1",
        "0.2",
    ]  # of 64 words, 1 and 2 % are one word


def knowing(pictures: BenchmarkSet) -> Linear:
    """A network that has learned every image by heart, and is far off beside them."""
    network = Linear()
    features = network[1](network[0](torch.stack([pictures[index]["image"] for index in range(len(pictures))])))
    wanted = torch.nn.functional.one_hot(pictures.targets[:, 0], 10).float()
    known = torch.linalg.pinv(features)
    beside = torch.randn(10, 48) @ (torch.eye(48) - known @ features)
    network[2].weight.data = (known @ (wanted - network[2].bias)).T + 5 * beside
    return network


def test_attacks_count_what_they_count_on_their_own(dataset: Path) -> None:
    sources = open_sources(dataset)
    network = knowing(suite_from(sources, "clean").passes[0].images)
    results = evaluate(
        network, ("clean", "pgd-20-l2-0.5", "words-random", "words-symbolic"), dataset, input_size=32, batch_size=6
    )
    images = suite_from(sources, "clean").passes[0].images
    image = torch.stack([images[index]["image"] for index in range(20)])
    label = torch.tensor([images.label(index) for index in range(20)])
    generators = [image_generator(0, index) for index in range(20)]
    attacked = pixel_adversary(network, image, label, PIXEL_ATTACKS["pgd-20-l2-0.5"], generators)
    with torch.no_grad():
        right = int((network(attacked).argmax(1) == label).sum())
    assert right == cells(results, "pgd-20-l2-0.5")[""]["correct"] < cells(results, "clean")[""]["correct"]
    curves = word_accuracy(
        network, sources.tokenizer, eval_loader(images, 20, 0, 1, 0), WordAttack((0.0, 0.01, 0.05, 0.1, 0.2)), CPU
    )
    assert {kind: cells(results, f"words-{kind}") for kind in curves} == curves


def test_finetune_evaluates_the_same_suites(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(path.name for path in (dataset / "val").iterdir())
    file = saved(tmp_path / "run" / "model.safetensors", 10, names)
    flags = [
        "--eval",
        "--resume",
        str(file.parent),
        "--data_path",
        str(dataset),
        "--num_workers",
        "0",
        "--device",
        "cpu",
    ]
    outcome = outcome_of(
        verb("finetune"), [*flags, "--precision", "fp32", "--suite", "clean", "words-random"], monkeypatch, capsys
    )
    assert outcome.code == 0, outcome.stderr
    results = read_results(tmp_path / "run" / "evaluation" / "results.json")
    assert (
        results["cells"]["run"]
        == evaluate({"run": file}, ("clean", "words-random"), dataset, device="cpu")["cells"]["run"]
    )


# ---- what is wrong ----


def test_networks_that_do_not_fit_are_refused_before_anything_is_measured(
    dataset: Path, imagenet: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="10 class folders .* but the model has 7 outputs"):
        evaluate(Linear(7), "clean", dataset, input_size=32)
    with pytest.raises(DataError, match="10 outputs, not ImageNet's 1000"):
        evaluate(Linear(), "imagenet-a", imagenet, input_size=32)
    turned = [SYNSETS[1], SYNSETS[0], *SYNSETS[2:]]
    with pytest.raises(DataError, match="class 0 of the model is"):
        evaluate(Linear(1000), "imagenet", imagenet, input_size=32, classes=turned)
    with pytest.raises(DataError, match="unknown to the model's classes"):
        evaluate(Linear(), "clean", dataset, input_size=32, classes=[f"class {i}" for i in range(10)])
    with pytest.raises(ConfigError, match="10 outputs and a list of 3 classes"):
        evaluate(Linear(), "clean", dataset, input_size=32, classes=["a", "b", "c"])
    with pytest.raises(ConfigError, match="do not have the same classes"):
        evaluate({"a": Linear(10), "b": Linear(11)}, "clean", dataset, input_size=32)
    with pytest.raises(ConfigError, match="gives .* for 2 images"):
        evaluate(lambda image: image, "clean", dataset, input_size=32)
    bare = Linear()
    bare.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="takes images normalized by"):
        evaluate(bare, "clean", dataset, input_size=32)


def test_a_network_that_knows_normalized_images_alone_is_seen_by_its_answers(tmp_path: Path) -> None:
    """Class by brightness, with thresholds on the normalized scale."""
    for label in range(2):
        (tmp_path / "val" / f"{label}").mkdir(parents=True)
        for number in range(24):
            level = 40 + 130 * label + number
            Image.new("RGB", (32, 32), (level, level, level)).save(tmp_path / "val" / f"{label}" / f"{number}.png")

    def normalized(image: Tensor) -> Tensor:
        mean = image.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)

    with pytest.raises(ConfigError, match=r"seems to take images normalized by mean 0\.5"):
        evaluate(normalized, "clean", tmp_path, input_size=32)
    assert (
        cells(evaluate(lambda x: normalized(x - 0.45), "clean", tmp_path, input_size=32), "clean", "<lambda>")[""][
            "correct"
        ]
        == 48
    )


def test_pixels_are_asked_of_cue_conflict_alone_too(imagenet: Path) -> None:
    images = suite_from(open_sources(imagenet, 1000), "cue-conflict", SIDE).passes[0].images
    ids = [members[0] for members in SIXTEEN.values()]
    image = torch.stack([images[index]["image"] for index in range(len(images))])

    def knowing(image_: Tensor) -> Tensor:  # which images they are, and so their shapes
        number = (image_[:, None] - image).flatten(2).abs().sum(2).argmin(1)
        label = torch.tensor([ids[images.label(int(one))] for one in number])
        near = (image_ - image[number]).flatten(1).abs().amax(1) < 1e-3
        return 9.0 * nn.functional.one_hot(torch.where(near, label, 0), 1000)

    results = evaluate(knowing, "cue-conflict", imagenet, input_size=SIDE)
    assert cells(results, "cue-conflict", "knowing")[""]["shape"] == len(images)
    with pytest.raises(ConfigError, match=r"it classifies 32 of 32 images correctly this way, but about 2 "):
        evaluate(lambda x: knowing(x / 255), "cue-conflict", imagenet, input_size=SIDE)


def test_bad_folders_are_refused_before_anything_is_measured(imagenet: Path) -> None:
    network = Linear(1000)

    def refused(match: str, suite: Any = "all", kind: type[UserError] = DataError, **settings: Any) -> None:
        network.seen = 0
        with pytest.raises(kind, match=match):
            evaluate(network, suite, imagenet, input_size=SIDE, **settings)
        assert network.seen <= 4  # blank images

    refused("did you mean imagenet", "imagenett", ConfigError)
    refused("has no folder imagenet-r", "imagenet-r", MissingInputError)
    refused("give at least 1", "imagenet", ConfigError, limit=0)
    refused("nowhere", "imagenet", MissingInputError, subset="nowhere")
    (imagenet / "ImageNet-C" / "fog" / "3").rename(imagenet / "fog3")
    refused("fog has no severity 3")
    results = evaluate(network, "imagenet-c", imagenet, input_size=SIDE, partial=True)
    assert results["suites"]["Linear"]["imagenet-c"]["missing"] == ["fog has no severity 3"]
    assert len(cells(results, "imagenet-c")) == 74
    (imagenet / "fog3").rename(imagenet / "ImageNet-C" / "fog" / "3")
    draw([imagenet / "ImageNet-C" / "snow" / "1" / validation_names()[0]], side=SIDE + 1)
    refused("41 x 41 px", "imagenet-c")


def test_a_suite_that_cannot_be_made_at_a_size_is_left_out_of_all_and_refused_by_name(dataset: Path) -> None:
    results = evaluate({"odd": Linear()}, "all", dataset, input_size=33, limit=2)
    for name in ("words-random", "words-symbolic"):
        assert name not in results["cells"]["odd"]
        assert results["not_measured"][name].startswith("odd: image size 33 x 33 is not divisible by the tokenizer's")
        with pytest.raises(ConfigError, match="33 x 33 is not divisible"):
            evaluate(Linear(), ("all", name), dataset, input_size=33, limit=2)
    assert "at least 32 px" in evaluate(Linear(), "all", dataset, input_size=28, limit=2)["not_measured"]["generated"]
    with pytest.raises(ConfigError, match="at least 32 px"):
        evaluate(Linear(), "generated", dataset, input_size=28)


def test_what_does_not_fit_is_told_with_advice_that_can_be_followed(imagenet: Path, tmp_path: Path) -> None:
    for outputs, advice in ((21841, "use weights fine-tuned on ImageNet-1k"), (1001, r"model\(image\)\[:, 1:\]")):
        for suite, message in (("all", "contains ImageNet, ImageNet-V2, ImageNet-A"), ("imagenet", "the model has")):
            with pytest.raises(UserError, match=rf"{message}.* {outputs} outputs, not ImageNet's 1000: .*{advice}"):
                evaluate(Linear(outputs), suite, imagenet, input_size=SIDE)
    flat = tmp_path / "flat" / "imagenet" / "val"
    draw([flat / Path(name).name for name in validation_names()])
    with pytest.raises(DataError, match=rf"{flat}: contains images without class folders: move each .*valprep"):
        evaluate(Linear(1000), "all", tmp_path / "flat", input_size=SIDE)
    (imagenet / "ILSVRC2012").symlink_to(imagenet / "imagenet", target_is_directory=True)
    assert open_sources(imagenet, 1000).clean_suite == "imagenet"
    (imagenet / "ILSVRC2012").unlink()
    shutil.copytree(imagenet / "imagenet", imagenet / "ILSVRC2012")
    with pytest.raises(DataError, match=rf"may each be ImageNet; move one of them out of {imagenet}, or rename it"):
        evaluate(Linear(1000), "all", imagenet, input_size=SIDE)


def test_an_image_that_cannot_be_read_is_named(imagenet: Path, tmp_path: Path) -> None:
    bad = imagenet / "imagenet" / "val" / FEW[1] / "ILSVRC2012_val_00000004.JPEG"
    bad.write_bytes(bad.read_bytes()[:200])
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"ILSVRC2012_val_00000004\.JPEG.*unpack it again"):
            evaluate(Linear(1000), "imagenet", imagenet, input_size=SIDE, num_workers=workers)


def test_folders_of_ones_own_that_do_not_fit_are_refused(dataset: Path, tmp_path: Path) -> None:
    network, classes = Linear(), sorted(path.name for path in (dataset / "val").iterdir())
    root = Path(shutil.copytree(dataset, tmp_path / "data"))
    of_splits = evaluate(network, "clean", root, input_size=32)["cells"]
    assert evaluate(network, "clean", root / "val", input_size=32)["cells"] == of_splits
    for level in (root / "val" / classes[0], tmp_path):
        with pytest.raises(MissingInputError, match=rf"no val/CLASS: did you mean {root}\?"):
            evaluate(network, "all", level, input_size=32)
    with pytest.raises(ConfigError, match="--suite is empty"):
        evaluate(network, (), root, input_size=32)
    shutil.rmtree(root / "val" / classes[3])
    with pytest.raises(DataError, match=rf"no images of {classes[3]} \(1 of 10 classes\); .* --partial"):
        evaluate(network, "all", root, input_size=32, classes=classes)
    results = evaluate(network, "clean", root, input_size=32, classes=classes, partial=True)
    assert results["suites"]["Linear"]["clean"]["missing"] == [f"no images of {classes[3]} (1 of 10 classes)"]
    with pytest.raises(DataError, match="9 class.*10 outputs"):
        evaluate(network, "clean", root, input_size=32)
    next((root / "val" / classes[0]).iterdir()).write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"{classes[0]}.*unpack it again"):
        evaluate(network, "all", root, input_size=32, classes=classes, partial=True)


def test_flags_that_do_not_fit_together(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(saved(tmp_path / "net.safetensors", 10))
    for arguments, message in [
        ([], "nothing to evaluate"),
        (["--pretrained"], "--pretrained needs --model"),
        (["--model", "nonsense", "--pretrained"], "unknown model 'nonsense'"),
        (["--checkpoint", file, file], "the same name"),
        (["--checkpoint", file, "--names", "a", "b"], "2 names for 1 model"),
        (["--checkpoint", file, "--names", ""], "a name is blank"),
        (["--checkpoint", file, "--batch_size", "0"], "give at least 1 image"),
        (["--checkpoint", file, "--model", "a", "b"], "one name for all"),
        (["--checkpoint", file, "--baseline", "nett"], "did you mean net?"),
        (["--checkpoint", "mae_dat_dem"], "did you mean mae_dat_demo"),
    ]:
        flags = [*arguments, "--data_path", str(dataset), "--output_dir", str(tmp_path / "out"), "--device", "cpu"]
        outcome = outcome_of(verb("evaluate"), flags, monkeypatch, capsys)
        assert outcome.code in (64, 65, 66), arguments
        assert message in outcome.stderr, arguments


def test_examples_are_images_on_which_the_networks_differ(dataset: Path, tmp_path: Path) -> None:
    networks = {"one": Linear(), "other": Linear(seed=1)}
    results = evaluate(networks, ("clean", "generated", "words-random"), dataset, input_size=32, output_dir=tmp_path)
    assert 2 <= len(results["examples"]) <= 8
    for example in results["examples"]:
        assert sum(answer == example["label"] for answer in example["answers"].values()) == 1
        image = torch.from_numpy(np.array(Image.open(tmp_path / example["file"]))).permute(2, 0, 1)[None] / 255
        classes = sorted(path.name for path in (dataset / "val").iterdir())
        for name, network in networks.items():
            with torch.no_grad():
                assert classes[int(network(image).argmax())] == example["answers"][name]
        assert (tmp_path / example["words"]).is_file()
    assert results["examples"][0]["cell"] == "gaussian_noise/3"


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_stopped(dataset: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "net.safetensors", 10)
    flags = ["-m", "mae_dat", "evaluate", "--checkpoint", str(file), "--data_path", str(dataset), "--num_workers", "1"]
    flags += ["--suite", "clean", "generated", "--device", "cpu", "--precision", "fp32"]
    flags += ["--output_dir", str(tmp_path / "out")]
    command = subprocess.Popen([sys.executable, *flags], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    stored, end = tmp_path / "out" / "cells", time.monotonic() + 120
    while len(list(stored.glob("*.json"))) < 3:
        assert command.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    command.kill()
    command.wait()
    kept = {path: path.stat().st_mtime_ns for path in stored.glob("*.json")}
    assert len(kept) < 16
    again = run_script(*flags)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    results = read_results(tmp_path / "out" / "results.json")
    assert results["cells"] == evaluate({"net": file}, ("clean", "generated"), dataset, device="cpu")["cells"]
