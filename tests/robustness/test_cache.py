"""What a number stands for: a partial cell shows, what changes is measured anew, and a report tells what it mixes."""

import csv
import importlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_folders import FEW, SIDE, validation_names
from built_suites import open_sources, suite_from
from evaluated_models import Linear, dataset, draw, imagenet, write_onnx  # noqa: F401 - some are fixtures
from PIL import Image
from quiet_evaluation import evaluate
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import draw_folder, finetune_in
from torch import Tensor, nn

from mae_dat.models.tokenizer import embedded_path
from mae_dat.robustness.fingerprints import module_sha256
from mae_dat.robustness.measure import PassImages
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.open_networks import open_network
from mae_dat.robustness.report.findings import findings, mixed_versions
from mae_dat.robustness.report.render import counts_csv
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.report.tables import calibration_table
from mae_dat.robustness.scores.results import Results, read_results
from mae_dat.runtime import environment as provenance
from mae_dat.runtime.environment import COMMIT_KEY
from mae_dat.storage.weight_files import write_weights

CPU = torch.device("cpu")


def right(results: Results, suite: str) -> list[int]:
    """Counts of the one network."""
    (found,) = results["cells"].values()
    return [count["correct"] for count in found[suite].values()]


# ---- all cells of a suite ----


def test_an_image_that_any_cell_lacks_makes_a_partial_row(
    imagenet: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = validation_names()
    (imagenet / "ImageNet-C" / "fog" / "3" / names[0]).unlink()
    results = evaluate(Linear(1000), "imagenet-c", imagenet, input_size=SIDE, partial=True)
    facts = results["suites"]["Linear"]["imagenet-c"]
    assert facts["missing"][-1] == "fog/3: 5 of 6 images are there"
    assert (facts["images"], results["cells"]["Linear"]["imagenet-c"]["fog/3"]["total"]) == (6, 5)
    assert "fog/3: 5 of 6" in str(results["inputs"]["partial"])
    assert not any(metric.published for metric in summarize(results).metrics)
    assert all("partial†" in metric.title for metric in summarize(results).metrics)
    assert {row["partial"] for row in csv.DictReader(counts_csv(summarize(results)).splitlines())} == {"True"}
    draw([imagenet / "ImageNet-C" / "snow" / "4" / name for name in reversed(names)])
    other = evaluate(Linear(1000), "imagenet-c", imagenet, input_size=SIDE, partial=True)
    assert other["suites"]["Linear"]["imagenet-c"]["fingerprint"] != facts["fingerprint"]


def test_what_all_cells_lack_is_said_once(imagenet: Path) -> None:  # noqa: F811
    for folder in (imagenet / "ImageNet-C").glob("*/*"):
        shutil.rmtree(folder / FEW[0])
    suite = suite_from(open_sources(imagenet, 1000, partial=True), "imagenet-c", SIDE)
    absent = f"1 of 3 class folders are missing or empty ({FEW[0]})"
    assert suite.missing == [absent, "4 of 6 images are there"]


def test_a_chosen_image_meets_the_same_chance_as_in_the_whole_folder(
    imagenet: Path,  # noqa: F811
) -> None:
    names, whole = validation_names(), open_sources(imagenet, 1000)
    chosen = open_sources(imagenet, 1000)
    chosen.subset = {names[4], names[1]}
    fewer = open_sources(imagenet, 1000, limit=1)
    fewer.subset = {names[4], names[1]}
    every = suite_from(whole, "generated", SIDE)
    assert "numbers" not in every.extra_protocol, "the key of what was stored before"
    for sources, count in ((chosen, 2), (fewer, 1)):
        suite = suite_from(sources, "generated", SIDE)
        assert suite.extra_protocol["numbers"] == "places in the whole folder"
        passes = [suite.passes[0], every.passes[0]]
        made, (part, all_) = PassImages(passes), (one.images for one in passes)
        assert len(part) == count
        for index in range(count):
            (at,) = [i for i in range(6) if all_.name_of(i) == part.name_of(index)]
            assert torch.equal(made[0, index]["images"], made[1, at]["images"])
            assert made[0, index]["folder_index"] == at


# ---- never another network's numbers ----


class Shifted(nn.Module):
    """A network with numbers that are no weights."""

    def __init__(self, mean: Any, keep: bool = True) -> None:
        super().__init__()
        self.net, self.settings = Linear(), {"mean": [mean]}
        self.register_buffer("scale", torch.tensor(1.0 if keep else -1.0), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        return self.scale * self.net(image - self.settings["mean"][0])


def brightest(image: Tensor) -> Tensor:
    """Logits without any weights."""
    return image.flatten(1)[:, :10]


def test_a_module_is_known_by_all_that_it_is_made_of() -> None:
    base = module_sha256(Shifted(0.0))
    assert base == module_sha256(Shifted(0.0)) is not None
    others = [
        Shifted(0.1),
        Shifted(0.0, keep=False),
        Shifted(torch.zeros(2)),
        Shifted(torch.ones(2)),
        Shifted(brightest),
    ]
    assert len({base, *map(module_sha256, others)}) == 6
    assert None not in map(module_sha256, others)
    hooked = Shifted(0.0)
    hooked.register_forward_hook(lambda module, inputs, output: -output)
    closed = Shifted(lambda: 1)

    class Local(Linear):  # may close over anything
        pass

    assert [module_sha256(one) for one in (hooked, closed, Local(), nn.Flatten())] == [None] * 4


def test_the_code_of_a_module_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One name and one set of weights, before and after an edit."""
    found = set()
    for folder, sign in (("before", "+"), ("after", "-")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "edited.py").write_text(
            "from torch import nn\n\n\nclass Net(nn.Linear):\n"
            f"    def forward(self, x):\n        return {sign}super().forward(x)\n"
        )
        monkeypatch.syspath_prepend(tmp_path / folder)
        monkeypatch.delitem(sys.modules, "edited", raising=False)
        torch.manual_seed(0)
        found.add(module_sha256(importlib.import_module("edited").Net(2, 2)))
    assert len(found) == 2
    assert None not in found


def test_attributes_of_a_network_are_part_of_its_key(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    for mean in (0.0, 0.9, torch.tensor(0.5)):
        stored = evaluate(Shifted(mean), "clean", dataset, input_size=32, output_dir=tmp_path)
        assert right(stored, "clean") == right(evaluate(Shifted(mean), "clean", dataset, input_size=32), "clean")
    assert len(list((tmp_path / "cells").iterdir())) == 3
    evaluate(Shifted(0.9).eval(), "clean", dataset, input_size=32, output_dir=tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 3, "the mode that it comes in is no part of it"


def test_what_cannot_be_known_is_measured_anew_and_told(
    dataset: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for sign in (1, -1):
        results = evaluate(
            lambda image, sign=sign: sign * brightest(image), "clean", dataset, input_size=32, output_dir=tmp_path
        )
        assert right(results, "clean") == right(
            evaluate(lambda x, s=sign: s * brightest(x), "clean", dataset, input_size=32), "clean"
        )
        assert "<lambda> cannot be distinguished from other models" in caplog.text
        caplog.clear()
    assert list((tmp_path / "cells").iterdir()) == []


def test_a_graph_is_known_by_the_files_beside_it_too(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    onnx = pytest.importorskip("onnx")
    path, known = tmp_path / "m.onnx", []
    for seed in (0, 1):
        content = onnx.load(write_onnx(Linear(10, seed), path))
        whole = open_network(str(path), None, "net", EvalOptions(CPU)).facts["sha256"]
        (tmp_path / "m.onnx.data").unlink(missing_ok=True)
        onnx.save_model(content, path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
        assert (tmp_path / "m.onnx.data").is_file()
        stored = evaluate({"net": path}, "clean", dataset, output_dir=tmp_path / "out", device="cpu")
        assert right(stored, "clean") == right(evaluate({"net": path}, "clean", dataset, device="cpu"), "clean")
        known += [whole, stored["models"]["net"]["sha256"]]
    assert len(set(known)) == 4
    assert any("onnxruntime" in one["versions"] for one in stored["measured_under"])


def test_a_tokenizer_is_known_by_its_weights(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    path = embedded_path()
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    tensors, keys = load_file(path), set()
    for scale in (1.0, 0.5, 1.0):
        write_weights(tmp_path / "tok.safetensors", {key: value * scale for key, value in tensors.items()}, facts)
        results = evaluate(
            Linear(),
            "words-random",
            dataset,
            input_size=32,
            output_dir=tmp_path / "out",
            tokenizer=str(tmp_path / "tok.safetensors"),
        )
        protocol = results["suites"]["Linear"]["words-random"]["protocol"]
        assert protocol["tokenizer"] == "tok.safetensors"
        keys.add(protocol["tokenizer's sha256"])
    assert len(keys) == len(list((tmp_path / "out" / "cells").iterdir())) == 2


# ---- what stands beside a number ----


def test_a_report_tells_every_version_that_measured_it(
    dataset: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options: dict[str, Any] = {"input_size": 32, "limit": 2, "output_dir": tmp_path}
    first = evaluate(Linear(), ("clean", "pgd-5-1/255"), dataset, **options)
    (under,) = first["measured_under"]
    assert under["cells"] == {"Linear": {"clean": [""], "pgd-5-1/255": [""], "gradient attacks": [""]}}
    assert under["versions"] == first["versions"]
    assert first["versions"]["mae_dat"].endswith(provenance.code_facts()["sha256"][:12])
    assert not [one for one in findings(summarize(first)) if "versions" in one]
    elsewhere = {"commit": "f" * 40, "dirty": False, "sha256": provenance.code_facts()["sha256"]}
    monkeypatch.setattr("mae_dat.runtime.environment.code_facts", lambda: elsewhere)
    again = evaluate(Linear(), ("clean", "generated"), dataset, **options)
    assert "f" * 40 in again["versions"][COMMIT_KEY]
    assert mixed_versions(summarize(again)) == [], "another commit of the same sources"
    monkeypatch.setattr("mae_dat.runtime.environment.code_facts", lambda: {**elsewhere, "sha256": "0" * 64})
    mixed = evaluate(Linear(), ("clean", "generated", "fgsm-1/255"), dataset, **options)
    assert mixed["cells"]["Linear"]["generated"] == again["cells"]["Linear"]["generated"]
    old, new = mixed["versions"]["mae_dat"].split(" and ")
    assert old in first["versions"]["mae_dat"]
    assert new.endswith("0" * 12)
    message = " ".join(findings(summarize(mixed)))
    assert "measured under several versions (mae_dat 0.1.0, sources" in message
    assert "delete the folder cells" in message
    assert "measured under several versions" in caplog.text
    anew = [one["cells"]["Linear"] for one in mixed["measured_under"] if one["versions"]["mae_dat"] == new]
    assert anew == [{"fgsm-1/255": [""], "gradient attacks": [""]}]
    shutil.rmtree(tmp_path / "cells")
    assert mixed_versions(summarize(evaluate(Linear(), "clean", dataset, **options))) == []


def test_cells_of_an_older_release_are_taken_and_told(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    first = evaluate(Linear(), "clean", dataset, input_size=32, output_dir=tmp_path)
    (cell,) = (tmp_path / "cells").iterdir()
    content = json.loads(cell.read_text())
    del content["versions"]
    content["found"]["calibration"]["nll"] = float("inf")
    cell.write_text(json.dumps(content))
    results = evaluate(Linear(), ("clean", "fgsm-1/255"), dataset, input_size=32, output_dir=tmp_path)
    assert results["cells"]["Linear"]["clean"] == first["cells"]["Linear"]["clean"]
    assert results["versions"]["of some cells"] == "not recorded by an older release"
    assert "cells of an older release" in " ".join(mixed_versions(summarize(results)))
    assert results["calibration"]["Linear"]["clean"]["nll"] is None


def test_an_infinite_likelihood_is_valid_json_and_no_gap(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    network = Linear()
    network[2].weight.data *= 1e4
    results = evaluate(network, "clean", dataset, input_size=32, output_dir=tmp_path)

    def refuse(word: str) -> None:
        raise ValueError(word)

    for file in (tmp_path / "results.json", *(tmp_path / "cells").iterdir()):
        json.loads(file.read_text(), parse_constant=refuse)
    assert read_results(tmp_path / "results.json") == results
    table = calibration_table(summarize(results))
    assert table is not None
    assert table.rows[0][5] == "∞"
    assert "–" not in table.rows[0][5:]
    assert table.notes[-1] == "∞: the class of an image had probability 0."
    assert r"$\infty$" in (tmp_path / "report.tex").read_text()


def test_float32_is_exact_whatever_the_process_has_set(dataset: Path) -> None:  # noqa: F811
    seen = []

    def network(image: Tensor) -> Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return brightest(image)

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = True
        evaluate(network, "clean", dataset, input_size=32)
        assert (cudnn.allow_tf32, matmul.allow_tf32) == (True, True)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
    assert seen[-1] == (False, False)


def test_the_average_of_an_interrupted_run_is_called_so(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    """A folder without an export gives its newest checkpoint."""
    draw_folder(tmp_path / "data", train=20, conflict=0)
    for decay in ("0.9", None):
        folder = tmp_path / f"decay {decay}"
        flags = ["--model", "vit_demo_patch8", "--batch_size", "10", "--epochs", "1"]
        finetune_in(folder, tmp_path / "data", *flags, *(["--ema_decay", decay] if decay else []))
        view = EvalOptions(CPU)
        exported = open_network(str(folder), None, "net", view)
        (folder / "model.safetensors").unlink()
        found = open_network(str(folder), None, "net", view)
        assert (exported.facts["averaged"], found.facts["averaged"]) == ((True, True) if decay else (False, None))
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(found.model(image), exported.model(image))


# ---- never the numbers of other images ----


def test_any_replaced_image_is_measured_again(dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    """Image 1 is not among those whose content is part of the fingerprint."""
    root, output = shutil.copytree(dataset, tmp_path / "data"), tmp_path / "out"

    def measured() -> list[int]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            return right(evaluate(Linear(10), "clean", root, output_dir=output, input_size=SIDE), "clean")

    images = sorted((root / "val").rglob("*.png"))
    before = measured()
    assert measured() == before
    assert "clean: measured before" in caplog.text
    for path in images:
        os.utime(path, ns=(10**18, 10**18))
    assert measured() == before
    assert "clean: measured before" in caplog.text, "a copy of the same content"
    flipped = Image.fromarray(255 - np.asarray(Image.open(images[1]).convert("RGB")))
    size = images[1].stat().st_size
    flipped.save(images[1])
    with images[1].open("ab") as file:
        file.write(bytes(max(0, size - file.tell())))
    os.utime(images[1], ns=(10**18 + 1, 10**18 + 1))
    after = measured()
    assert "were replaced since it was measured: measuring again" in caplog.text
    assert after == right(evaluate(Linear(10), "clean", root, input_size=SIDE), "clean")
    assert measured() == after
    assert "clean: measured before" in caplog.text


def test_measurements_of_older_releases_are_those_of_older_images(
    dataset: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, output = shutil.copytree(dataset, tmp_path / "data"), tmp_path / "out"
    evaluate(Linear(10), "clean", root, output_dir=output, input_size=SIDE)
    (cell,) = (output / "cells").glob("*.json")
    content = json.loads(cell.read_text())
    del content["files"]
    cell.write_text(json.dumps(content))
    with caplog.at_level(logging.INFO):
        evaluate(Linear(10), "clean", root, output_dir=output, input_size=SIDE)
        assert "clean: measured before" in caplog.text
        assert "files" in json.loads(cell.read_text())
        del content["versions"]
        cell.write_text(json.dumps(content))
        os.utime(sorted((root / "val").rglob("*.png"))[1])
        os.utime(cell, ns=(10**18, 10**18))
        evaluate(Linear(10), "clean", root, output_dir=output, input_size=SIDE)
    assert "measuring again" in caplog.text


def test_another_white_level_is_measured_again(
    dataset: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    def measured_before() -> bool:
        caplog.clear()
        results = evaluate(Linear(10), "clean", dataset, output_dir=tmp_path / "out", input_size=SIDE)
        (suites,) = results["suites"].values()
        protocol = suites["clean"]["protocol"]
        assert protocol.get("MAE_DAT_WHITE_LEVEL") == os.environ.get("MAE_DAT_WHITE_LEVEL")
        return "clean: measured before" in caplog.text

    assert [measured_before(), measured_before()] == [False, True]
    monkeypatch.setenv("MAE_DAT_WHITE_LEVEL", "4095")
    assert [measured_before(), measured_before()] == [False, True]
