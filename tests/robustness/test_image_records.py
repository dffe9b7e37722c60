"""What is recorded for each image: bits that agree with the counts, whatever the batches and ranks, and with an older
release's cache, which has none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from built_suites import open_sources, suite_from
from evaluated_models import Linear, dataset  # noqa: F401 - dataset is a fixture
from quiet_evaluation import evaluate
from tiny_runs import draw_folder

from mae_dat.robustness.counting import SuiteCounts
from mae_dat.robustness.image_records import ImageRecords
from mae_dat.robustness.measure import measure_passes
from mae_dat.robustness.scores.class_counts import class_counts, class_scores, hits_and_totals
from mae_dat.robustness.scores.image_bits import pack_bits, unpack_bits

CPU = torch.device("cpu")


def bits_of(counts: SuiteCounts, cell: str) -> list[bool]:
    bits = unpack_bits(counts.images[cell]["correct"], counts.counts[cell]["total"])
    assert bits is not None
    return bits.tolist()


@pytest.mark.parametrize("count", [1, 8, 9, 1000, 50_000])
def test_bits_read_back(count: int) -> None:
    bits = np.random.default_rng(count).random(count) < 0.8
    text = pack_bits(bits)
    assert np.array_equal(unpack_bits(text, count), bits)  # type: ignore[arg-type]
    assert len(text) < 30 + count / 5
    for damaged in ("", "2:" + text[2:], text[:-5], text[:10] + "?" + text[11:], "1:" + "A" * 40):
        assert unpack_bits(damaged, count) is None
    assert unpack_bits(text, count + 8) is None


def test_records_of_several_ranks_are_one_record(dataset: Path) -> None:  # noqa: F811
    image_pass = suite_from(open_sources(dataset), "clean").passes[0]
    network, images = Linear().eval(), image_pass.images
    ranks = [ImageRecords(image_pass, CPU) for _ in range(3)]
    with torch.no_grad():
        for index in range(len(images)):
            prediction = network(images[index]["image"][None]).argmax(1)
            at = torch.tensor([index])
            ranks[index % 3].add(0, at, prediction, correct=prediction == images.label(index), texture=None)
    ranks[0].reduce(lambda rows: sum(rank.rows for rank in ranks))  # type: ignore[arg-type, return-value]
    found = next(measure_passes({"net": network}, [(image_pass, ["net"])], batch_size=8, device=CPU))[1]["net"]
    assert ranks[0].cell_images() == found.images
    assert ranks[0].classes() == found.classes


def test_bits_are_the_predictions_of_each_image(dataset: Path) -> None:  # noqa: F811
    network = Linear().eval()
    image_pass = suite_from(open_sources(dataset), "clean").passes[0]
    ((_, found),) = measure_passes({"net": network}, [(image_pass, ["net"])], batch_size=3, device=CPU)
    counts, images = found["net"], image_pass.images
    with torch.no_grad():
        predicted = [int(network(images[i]["image"][None]).argmax()) for i in range(len(images))]
    labels = [images.label(i) for i in range(len(images))]
    assert bits_of(counts, "") == [a == b for a, b in zip(predicted, labels, strict=True)]
    confusion = counts.classes
    assert confusion is not None
    for label, prediction in zip(labels, predicted, strict=True):
        expected = sum(pair == (label, prediction) for pair in zip(labels, predicted, strict=True))
        assert confusion["confusion"][images.classes[label]][images.classes[prediction]] == expected
    most = counts.images[""]["most_predicted"]
    number = images.classes.index(most["name"])
    assert most["images"] == predicted.count(number) == max(map(predicted.count, predicted))
    assert most["others"] == sum(label != number for label in labels)


def test_every_suite_of_images_is_recorded_and_cached(tmp_path: Path) -> None:
    dataset = draw_folder(tmp_path / "own", train=0, conflict=10)  # noqa: F811
    suites = ("clean", "generated", "conflict", "fgsm-1/255", "words-random")
    options = {"input_size": 32, "limit": 3, "output_dir": tmp_path / "out"}
    results = evaluate(Linear(), suites, dataset, **options)
    (images,), (cells,) = results["images"].values(), results["cells"].values()
    assert images.keys() == cells.keys() >= {"clean", "generated", "fgsm-1/255", "words-random"}
    for suite, by_cell in cells.items():
        for cell, count in by_cell.items():
            bits = unpack_bits(images[suite][cell]["correct"], count["total"])
            assert bits is not None
            assert bits.sum() == count["correct"], (suite, cell)
            if "texture" in count:
                texture = unpack_bits(images[suite][cell]["texture"], count["total"])
                assert texture is not None
                assert texture.sum() == count["texture"]
    orders = {cell["order"] for suite in ("clean", "generated") for cell in images[suite].values()}
    assert len(orders) == 1, "the same images, clean and corrupted"
    assert list(results["classes"]["Linear"]) == ["clean"]
    again = evaluate(Linear(), suites, dataset, **options)  # from the cache
    assert all(again[key] == results[key] for key in ("cells", "images", "classes", "collapsed"))


def test_a_cache_of_an_older_release_is_used_without_bits(dataset: Path, tmp_path: Path) -> None:  # noqa: F811
    first = evaluate(Linear(), "clean", dataset, input_size=32, output_dir=tmp_path)
    (cell,) = (tmp_path / "cells").iterdir()
    content = json.loads(cell.read_text())
    del content["found"]["images"], content["found"]["classes"]
    cell.write_text(json.dumps(content))
    again = evaluate(Linear(), "clean", dataset, input_size=32, output_dir=tmp_path)
    assert again["cells"] == first["cells"]
    assert again["images"] == {"Linear": {"clean": {}}}
    assert again["classes"] == {"Linear": {}}


def test_classes_are_counted_by_label_and_prediction() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, -1, 0])
    counts = class_counts(labels, predicted, ("cat", "dog", "eel", "fox"), 4)
    assert counts["confusion"] == {"cat": {"cat": 2, "dog": 1}, "dog": {"": 1, "dog": 1}, "eel": {"cat": 1}}
    assert hits_and_totals(counts) == ([2, 1, 0], [3, 2, 1])
    scores = class_scores(counts)
    assert scores["chance"] == 25
    assert (scores["most_common"], scores["most_common_percent"]) == ("cat", 50)
    assert scores["balanced_accuracy"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)
    assert scores["recall"]["eel"]["percent"] == 0 < scores["recall"]["eel"]["high"]
