"""The README's image of a report, drawn from its results alone."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from evaluations import evaluation
from PIL import Image

from mae_dat.config.errors import ConfigError
from mae_dat.robustness.scores.results import Results, write_results

SCRIPT = Path(__file__).parents[2] / "docs" / "images" / "make_teaser.py"
_spec = importlib.util.spec_from_file_location("make_teaser", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
make_teaser = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_teaser)


def drawn(results: Results, folder: Path) -> np.ndarray:
    """The image, uint8 (H, W, 3)."""
    folder.mkdir(exist_ok=True)
    write_results(results, folder / "results.json")
    make_teaser.draw_teaser(folder, folder / "teaser.png")
    with Image.open(folder / "teaser.png") as image:
        assert image.size == tuple(round(side * make_teaser.DENSITY) for side in make_teaser.SIZE)
        return np.asarray(image.convert("RGB"))


def test_the_image_shows_errors_differences_and_examples(tmp_path: Path) -> None:
    """Each third of it changes with what it shows, and only that one."""
    results = evaluation(("plain", "dat"), ("imagenet", "generated"))
    plain = drawn(results, tmp_path)
    third = plain.shape[1] // 3

    def changed(after: np.ndarray) -> list[bool]:
        moved = (after != plain).any(axis=(0, 2))
        return [bool(moved[at * third + 40 : (at + 1) * third - 40].any()) for at in range(3)]

    assert not (drawn(results, tmp_path) != plain).any(), "the same results give the same image"
    Image.fromarray(np.full((32, 32, 3), (200, 30, 60), np.uint8)).save(tmp_path / "1.png")
    answers = {"plain": "cat", "dat": "dog"}
    shown = {"file": "1.png", "words": "1.png", "suite": "generated", "cell": "fog/3", "label": "dog"}
    results["examples"] = [{**shown, "answers": answers}]
    with_example = drawn(results, tmp_path)
    assert changed(with_example)[2]
    assert (np.abs(with_example.astype(int) - (200, 30, 60)).max(axis=2) < 8).sum() > 2000
    results["examples"] = []
    for one in results["cells"]["dat"]["generated"].values():
        one["correct"] = 0
    assert changed(drawn(results, tmp_path))[:2] == [True, True]


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    for names, suites in [(("plain",), ("imagenet", "generated")), (("plain", "dat"), ("imagenet",))]:
        with pytest.raises(ConfigError, match="no two networks measured on corruptions"):
            drawn(evaluation(names, suites), tmp_path)
