"""Class folders get the label of the model's output with their name."""

import unicodedata

import pytest

from mae_dat.config.errors import DataError
from mae_dat.data.class_names import (
    BY_NUMBER,
    BY_WORDNET_ID,
    INDEXED_NAMES,
    SORTED_NAMES,
    STORED_NAMES,
    describe_difference,
    imagenet_synsets,
    name_outputs,
    readable_class,
    warn_of_near_duplicates,
)
from mae_dat.prediction.predictors import imagenet_names
from mae_dat.robustness.suites.imagenet import SYNSETS

IDS = ["n01440764", "n02102040", "n02979186"]
ENGLISH = list(imagenet_names())


def test_wordnet_ids_get_imagenets_labels_if_the_head_has_its_classes() -> None:
    assert imagenet_synsets(1000) == SYNSETS
    for stored in (None, list(SYNSETS), ENGLISH):
        names, source = name_outputs("set", IDS, 1000, stored)
        assert [names.index(folder) for folder in IDS] == [0, 217, 482]
        assert source == (STORED_NAMES if stored and stored is not ENGLISH else BY_WORDNET_ID)
    assert name_outputs("set", IDS, 21843).names.index("n02102040") == imagenet_synsets(21843).index("n02102040")
    # A model trained on three of the folders has their order.
    assert name_outputs("set", IDS, 3) == (IDS, SORTED_NAMES)


def test_numbers_are_those_of_the_outputs_and_not_sorted_as_text() -> None:
    folders = sorted(map(str, range(12)))
    names, source = name_outputs("set", folders, 12)
    assert names == [str(number) for number in range(12)]
    assert source.startswith(BY_NUMBER)
    assert "sorts them as text" in source
    assert name_outputs("set", ["003", "007"], 10).names.index("007") == 7
    assert name_outputs("set", ["1", "10", "2"], 3).names == ["1", "2", "10"]
    assert name_outputs("set", ["1", "2"], 1000).names[2] == "2"


def test_shards_keep_the_order_of_their_class_numbers() -> None:
    assert name_outputs("set", ["b"], 2, indexed=["c", "b"]) == (["c", "b"], INDEXED_NAMES)


def test_unknown_outputs_are_an_error_that_does_not_suggest_a_wrong_evaluation() -> None:
    with pytest.raises(DataError, match=r"3 class folders \(a, b, c\), but the model has 1,000 outputs.*WordNet id"):
        name_outputs("set", ["a", "b", "c"], 1000)
    with pytest.raises(DataError, match="has 2 outputs"):
        name_outputs("set", ["a", "b", "c"], 2)
    with pytest.raises(DataError, match="unknown to ImageNet's 1,000 classes: n99999999"):
        name_outputs("set", [*IDS, "n99999999"], 1000)
    with pytest.raises(DataError, match="'n01440764-tench' and 'n01440764' differ only in a prefix or suffix"):
        name_outputs("set", ["n01440764-tench"], 1000)
    # Names of another model's own 1000 classes are not ImageNet's.
    with pytest.raises(DataError, match="unknown to the model's classes: n01440764"):
        name_outputs("set", IDS, 1000, [f"part {number}" for number in range(1000)])


@pytest.mark.parametrize(
    ("name", "other", "difference"),
    [
        ("Cat", "cat", "case"),
        ("caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9"), "the encoding of accents (NFC and NFD)"),
        ("caf\u00e9", "cafe", "accents"),
        ("tree_frog", "tree frog", "underscores, hyphens or spaces"),
        ("Tree-Frog", "tree frog", "case, accents and separators"),
        ("001.cat", "cat", "a prefix or suffix"),
        ("class_cat", "cat", "a prefix or suffix"),
        ("cat", "dog", ""),
        ("wildcat", "cat", ""),
    ],
)
def test_names_that_differ_little_are_reported_as_such(name: str, other: str, difference: str) -> None:
    assert describe_difference(name, other) == difference
    if difference:
        with pytest.raises(DataError) as caught:
            name_outputs("set", [name], 2, [other, "x"])
        assert f"differ only in {difference}; rename the class folders" in str(caught.value)


def test_more_outputs_than_names_and_folders_that_are_nearly_the_same(caplog: pytest.LogCaptureFixture) -> None:
    assert name_outputs("set", ["b"], 4, ["a", "b"]).names == ["a", "b", "unused 2", "unused 3"]
    warn_of_near_duplicates("set", ["Cat", "cat", "dog"])
    assert "'Cat' and 'cat' differ only in case" in caplog.text
    assert readable_class("n01440764") == "n01440764 tench"
    assert readable_class("cat") == "cat"
