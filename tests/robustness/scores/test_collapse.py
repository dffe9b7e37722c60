"""Which models are called collapsed."""

import pytest

from mae_dat.robustness.scores.collapse import collapse_of, collapsed_models
from mae_dat.robustness.scores.image_bits import CellImages, MostPredicted


def cell(images: int, others: int, of_others: int) -> CellImages:
    most: MostPredicted = {"name": "cat", "images": images, "others": others, "of_others": of_others}
    return {"order": "", "correct": "", "most_predicted": most}


@pytest.mark.parametrize(
    ("images", "others", "of_others", "collapsed"),
    [
        (96, 90, 86, True),
        (95, 90, 85, False),  # not more than 95 %
        (100, 90, 90, True),
        (100, 0, 0, False),  # images of a single class
        (97, 3, 0, False),  # 97 % cats, all correct
        (100, 3, 3, True),  # 97 % cats, and the others are called cats too
        (10, 90, 0, False),
    ],
)
def test_one_class_for_almost_all_images(images: int, others: int, of_others: int, collapsed: bool) -> None:
    found = collapse_of({"clean": {"": cell(images, others, of_others)}}, {"clean": 100}, ["clean"])
    assert (found is not None) == collapsed
    if found:
        assert found == {"suite": "clean", "name": "cat", "percent": images}


def test_clean_images_decide() -> None:
    images = {"model": {"fgsm-1/255": {"": cell(100, 90, 90)}, "generated": {"fog/1": cell(100, 90, 90)}}}
    cells = {"model": {suite: {"": {"correct": 0, "total": 100}} for suite in ("fgsm-1/255", "generated", "clean")}}
    found = collapsed_models(images, cells)  # type: ignore[arg-type]
    assert found["model"]["suite"] == "generated"
    images["model"]["clean"] = {"": cell(20, 90, 10)}
    assert not collapsed_models(images, cells)  # type: ignore[arg-type]
    del images["model"]["clean"], images["model"]["generated"]
    assert not collapsed_models(images, cells), "an attack may well lead to one class"  # type: ignore[arg-type]
    images["model"]["generated"] = {"fog/1": cell(100, 90, 90), "fog/2": cell(40, 90, 30)}
    cells["model"]["generated"]["fog/2"] = {"correct": 0, "total": 100}
    assert not collapsed_models(images, cells)  # type: ignore[arg-type]
