"""ImageNet's class lists and the answers that are read from 1000 logits."""

import hashlib

import pytest
import torch

from mae_dat.config.errors import DataError
from mae_dat.robustness.suites.imagenet import (
    ALL_CLASSES,
    CLASSES_OF_A,
    CLASSES_OF_R,
    IMAGENET_A,
    IMAGENET_R,
    NO_CLASS,
    SIXTEEN,
    SIXTEEN_CLASSES,
    SYNSETS,
    check_classes,
    class_mapping,
    synsets_of,
)


def test_the_lists_are_the_official_ones() -> None:
    assert len(SYNSETS) == len(set(SYNSETS)) == 1000
    assert sorted(SYNSETS) == list(SYNSETS)
    assert (SYNSETS[0], SYNSETS[-1]) == ("n01440764", "n15075141")
    for words, separator, digest in [
        (SYNSETS, "\n", "385e0240499426c0"),
        (IMAGENET_A, ",", "973e8c3e530bf5db"),
        (IMAGENET_R, ",", "a1d9a9ace3098120"),
    ]:
        assert hashlib.sha256(separator.join(map(str, words)).encode()).hexdigest().startswith(digest)
    assert len(set(IMAGENET_A)) == len(set(IMAGENET_R)) == 200
    assert len(set(IMAGENET_A) & set(IMAGENET_R)) == 86
    assert (synsets_of(IMAGENET_A)[0], synsets_of(IMAGENET_R)[0]) == ("n01498041", "n01443537")


def test_the_sixteen_categories_have_207_classes() -> None:
    counts = "airplane 1 bear 4 bicycle 2 bird 49 boat 5 bottle 7 car 3 cat 6 chair 4 clock 3 dog 109 elephant 2"
    words = f"{counts} keyboard 2 knife 1 oven 1 truck 8".split()
    assert {name: len(ids) for name, ids in SIXTEEN.items()} == dict(
        zip(words[::2], map(int, words[1::2]), strict=True)
    )
    assert len({i for ids in SIXTEEN.values() for i in ids}) == 207


def logits_of(*highest: int) -> torch.Tensor:
    """One image whose best classes are these, in this order."""
    logits = torch.zeros(1, 1000)
    for place, number in enumerate(highest):
        logits[0, number] = 10.0 - place
    return logits


def test_a_mask_comes_before_the_argmax_and_the_masks_differ() -> None:
    outside = next(i for i in range(1000) if i not in IMAGENET_A and i not in IMAGENET_R)
    only_a = next(i for i in IMAGENET_A if i not in IMAGENET_R)
    only_r = next(i for i in IMAGENET_R if i not in IMAGENET_A)
    logits = logits_of(outside, only_r, only_a)
    assert ALL_CLASSES.predictions(logits).tolist() == [[outside]]
    assert CLASSES_OF_A.predictions(logits).tolist() == [[only_a]]
    assert CLASSES_OF_R.predictions(logits).tolist() == [[only_r]]
    assert ALL_CLASSES.predictions(logits, count=3).tolist() == [[outside, only_r, only_a]]
    assert set(CLASSES_OF_A.predictions(torch.randn(1, 1000), count=1000)[0].tolist()) == set(IMAGENET_A)
    assert CLASSES_OF_A.to("meta").predictions(logits.to("meta"), count=2).shape == (1, 2)  # all of it moves


def test_masked_classes_have_no_probability() -> None:
    logits = torch.randn(3, 1000)
    found = CLASSES_OF_A.probabilities(logits)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(found[:, list(IMAGENET_A)], logits.double()[:, list(IMAGENET_A)].softmax(1))
    assert torch.equal(found.argmax(1, keepdim=True), CLASSES_OF_A.predictions(logits))


def test_several_classes_may_stand_for_one_and_others_for_none() -> None:
    classes = {"bicycle": (444, 671), "lemon": (951,)}
    restricted, free = class_mapping("2", classes, restricted=True), class_mapping("1000", classes, restricted=False)
    logits = torch.cat([logits_of(0, 671, 951), logits_of(444), logits_of(951)])
    assert restricted.predictions(logits).flatten().tolist() == [0, 0, 1]
    assert free.predictions(logits).flatten().tolist() == [NO_CLASS, 0, 1]
    expected = logits.double()[:, [444, 671, 951]].softmax(1)
    torch.testing.assert_close(restricted.probabilities(logits)[:, 0], expected[:, :2].sum(1))


def test_sixteen_classes_are_told_by_the_mean_of_probabilities() -> None:
    """Dogs have 109 classes: by the sum, or by the best logit, they would win where the mean says knife."""
    logits = torch.full((1, 1000), -9.0)
    logits[0, list(SIXTEEN["dog"])] = 1.0
    logits[0, SIXTEEN["dog"][0]] = 2.5
    logits[0, SIXTEEN["knife"][0]] = 2.0
    names = list(SIXTEEN)
    assert SIXTEEN_CLASSES.predictions(logits, count=2).tolist() == [[names.index("knife"), names.index("dog")]]
    probabilities = logits.double().softmax(1)[0]
    for number, ids in enumerate(SIXTEEN.values()):
        torch.testing.assert_close(SIXTEEN_CLASSES.probabilities(logits)[0, number], probabilities[list(ids)].mean())


def test_another_number_or_order_of_classes_is_an_error() -> None:
    with pytest.raises(DataError, match="10 outputs"):
        ALL_CLASSES.predictions(torch.zeros(2, 10))
    with pytest.raises(DataError, match="21 outputs"):
        check_classes(None, 21)
    check_classes(None, 1000)
    check_classes(SYNSETS, 1000)
    check_classes([f"class {i}" for i in range(1000)], 1000)
    with pytest.raises(DataError, match="class 0 of the model is n15075141"):
        check_classes(SYNSETS[::-1], 1000)
    with pytest.raises(DataError, match="class 999 of the model is missing"):
        check_classes(SYNSETS[:999], 1000)
