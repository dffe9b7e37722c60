"""Predicted classes, labels and names of images as text."""

import numpy as np
import pytest

from mae_dat.robustness.scores.predictions import (
    image_labels,
    pack_names,
    pack_numbers,
    pack_predictions,
    unpack_names,
    unpack_numbers,
    unpack_predictions,
)


def test_predictions_read_back_from_the_labels_and_the_wrong_ones() -> None:
    labels, predicted = np.array([3, 999, 0, -1, 7]), np.array([3, 998, -1, 5, 7])
    text = pack_predictions(predicted, labels == predicted)
    assert unpack_predictions(text, labels).tolist() == predicted.tolist()  # type: ignore[union-attr]
    assert unpack_predictions(text, labels[:4]) is None


def test_correct_predictions_take_little_space() -> None:
    labels = np.repeat(np.arange(1000), 50)
    assert len(pack_predictions(labels, np.ones(50_000, dtype=bool))) < 1000


@pytest.mark.parametrize("text", ["", "n2:AAAA", "n1:AAAA", "n1:not base64", "1:eJwDAAAAAAE="])
def test_damaged_text_is_none(text: str) -> None:
    assert unpack_numbers(text, 3) is None
    assert unpack_names(text.replace("n1", "t1"), 3) is None


def test_names_of_any_file_read_back() -> None:
    names = ["a/b.png", "ä\n.png", "\udce4.png"]
    assert unpack_names(pack_names(names), 3) == names
    assert unpack_names(pack_names(names), 2) is None


def test_labels_beyond_the_classes_are_none() -> None:
    facts = {
        "classes": ["a", "b"],
        "labels": pack_numbers(np.array([0, 2])),
        "names": pack_names(["x", "y"]),
        "root": "",
    }
    assert image_labels(facts, 2) is None  # type: ignore[arg-type]
    assert image_labels({**facts, "classes": ["a", "b", "c"]}, 2).tolist() == [0, 2]  # type: ignore[union-attr, arg-type, typeddict-item]
