"""Corruptions and their exact counting: real pictures, real models, no mocks."""

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mae_dat.corruptions import CATEGORIES, CORRUPTIONS, EXTRA, SEVERITIES, corrupt, image_seed
from mae_dat.errors import DataError, MissingInputError, NumericsError
from mae_dat.measuring import Evaluation, category_errors, evaluate, mean_error, read_conflicts
from mae_dat.scores import Cells, ModelScores, Stat, coverage, severity_errors, shape_share

CLASSES = 6


class Pictures:
    """Smooth coloured pictures whose mean red value tells the class: a rule that corruption upsets now and then."""

    def __init__(self, count: int = 11, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(1)
        coarse = torch.rand(count, 3, 4, 4, generator=generator)
        self.images = nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        self.labels = RedLevel()(self.images).argmax(1).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        return {"image": self.images[index], "label": self.labels[index]}


class RedLevel(nn.Module):
    """Class = level of the mean red value; has a dropout so that a forgotten eval mode shows."""

    def __init__(self, noisy: bool = False) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9 if noisy else 0.0)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        level_B = self.dropout(images_BCHW[:, 0].mean((1, 2)).double())
        centers_K = torch.linspace(0.3, 0.7, CLASSES, dtype=torch.float64)
        return -(level_B[:, None] - centers_K).abs()


class Fixed(nn.Module):
    """Always the same logits: right for one class alone, or not a number."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.logits.expand(len(images_BCHW), -1)


def photo(size: int = 64) -> np.ndarray:
    """A picture with edges, gradients and colour."""
    y, x = np.mgrid[:size, :size]
    channels = [x * 255 // size, (x // 5 + y // 5) % 2 * 200 + 20, 255 - y * 255 // size]
    return np.stack(channels, axis=-1).astype(np.uint8)


def numbers(result: Evaluation) -> dict[str, ModelScores]:
    return result["models"]


@pytest.mark.parametrize("name", CORRUPTIONS + EXTRA)
def test_every_corruption_works_at_64_px_and_is_deterministic(name: str) -> None:
    image = photo()
    kept = image.copy()
    first = {severity: corrupt(image, name, severity, seed=7) for severity in SEVERITIES}
    corrupt(image, "glass_blur", 2, seed=1)  # has a generator of its own, which must not carry over
    corrupt(image, "gaussian_noise", 2, seed=2)
    for severity, picture in first.items():
        assert picture.dtype == np.uint8
        assert picture.shape == image.shape
        assert (picture != image).any()
        np.testing.assert_array_equal(picture, corrupt(image, name, severity, seed=7))
    np.testing.assert_array_equal(image, kept)
    mild, strong = (np.abs(first[s].astype(int) - image).mean() for s in (1, 5))
    assert strong > mild or name in ("saturate", "spatter", "elastic_transform")


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "frost", "snow", "motion_blur"])
def test_another_seed_gives_another_picture(name: str) -> None:
    assert (corrupt(photo(), name, 3, seed=1) != corrupt(photo(), name, 3, seed=2)).any()


@pytest.mark.parametrize("name", CORRUPTIONS + EXTRA)
@pytest.mark.parametrize("level", [0, 255])
def test_blank_pictures_raise_no_warning(name: str, level: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corrupt(np.full((32, 48, 3), level, dtype=np.uint8), name, 3, seed=0)


def test_global_random_state_stays_as_found() -> None:
    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    expected = np.random.RandomState(5).rand(), random.Random(5).random(), torch.rand(1, generator=torch.manual_seed(5))
    torch.manual_seed(5)
    for name in CORRUPTIONS + EXTRA:
        corrupt(photo(32), name, 2, seed=3)
    assert (np.random.rand(), random.random(), torch.rand(1)) == expected


def test_random_state_is_restored_after_an_error() -> None:
    before = np.random.get_state()[1].tolist()
    with pytest.raises(DataError, match="at least 32 px"):
        corrupt(photo(31), "fog", 1, seed=0)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(
    ("name", "severity", "named"), [("fogg", 1, "'fogg'"), ("fog", 0, "severity 0"), ("fog", 6, "severity 6")]
)
def test_unknown_corruption_or_severity_is_named(name: str, severity: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        corrupt(photo(32), name, severity, seed=0)


def test_only_8_bit_rgb_is_taken() -> None:
    for image in (photo(32).astype(np.float32), photo(32)[..., 0], photo(32)[..., :2]):
        with pytest.raises(DataError, match="uint8 RGB"):
            corrupt(image, "fog", 1, seed=0)


def test_categories_are_the_fifteen() -> None:
    assert [len(members) for members in CATEGORIES.values()] == [3, 4, 4, 4]
    assert len(set(CORRUPTIONS)) == 15
    assert not set(CORRUPTIONS) & set(EXTRA)


def test_image_seed_is_stable_and_differs_in_every_part() -> None:
    assert image_seed(0, 3, "fog", 2) == image_seed(0, 3, "fog", 2) == 3912602540
    others = {image_seed(*key) for key in [(0, 3, "fog", 2), (1, 3, "fog", 2), (0, 4, "fog", 2), (0, 3, "fog", 1)]}
    assert len(others) == 4


NAMES = ("gaussian_noise", "glass_blur", "brightness", "contrast")


def measure(**changes: object) -> Evaluation:
    settings = {"corruptions": NAMES, "severities": (1, 4), "batch_size": 4, "conflicts": conflicts()} | changes
    return evaluate({"red": RedLevel(noisy=True), "one": Fixed([0.0, 9.0, 0.0, 0.0, 0.0, 0.0])}, Pictures(), **settings)


def conflicts() -> list[tuple[Tensor, int, int]]:
    pictures = Pictures(7)
    return [
        (image, label, (label + 1) % CLASSES) for image, label in zip(pictures.images, pictures.labels, strict=True)
    ]


def test_counts_do_not_depend_on_batch_size_or_workers() -> None:
    expected = measure()
    red = numbers(expected)["red"]
    assert red["clean"] == {"correct": 11, "total": 11, "top5": 11}
    assert 0 < red["corruptions"]["brightness"]["4"]["correct"] + red["corruptions"]["contrast"]["4"]["correct"] < 22
    assert measure(batch_size=1) == expected
    assert measure(batch_size=64) == expected
    assert measure(num_workers=2, batch_size=3) == expected


@pytest.mark.parametrize("world", [2, 3, 7, 13])
def test_counts_are_exact_over_ranks(world: int) -> None:
    """The reduction sees every rank's table, as an all-reduce would; 13 ranks leave some without an image."""
    tables: list[Tensor] = []

    def keep(table: Tensor) -> Tensor:
        tables.append(table.clone())
        return table

    for rank in range(world):
        measure(rank=rank, world=world, reduce=keep)
    total = torch.stack(tables).sum(0)
    assert measure(rank=world - 1, world=world, reduce=lambda _: total) == measure()


def test_order_of_corruptions_does_not_matter() -> None:
    turned = numbers(measure(corruptions=NAMES[::-1], severities=(4, 1)))
    assert turned == numbers(measure())


def test_a_perfect_model_has_no_error_and_a_constant_one_the_share_of_its_class() -> None:
    pictures = Pictures()
    pictures.labels = [1] * len(pictures)
    models = {"right": Fixed([0.0, 1.0]), "wrong": Fixed([1.0, 0.0])}
    result = numbers(evaluate(models, pictures, corruptions=("fog", "pixelate"), severities=(2,)))
    assert result["right"]["clean"] == {"correct": 11, "total": 11}  # two classes: no top-5
    assert mean_error(result["right"]) == 0.0
    assert mean_error(result["wrong"]) == 100.0


def test_limit_corrupts_the_first_of_a_seeded_permutation_and_leaves_clean_whole() -> None:
    result = measure(limit=5, seed=3)
    assert numbers(result)["red"]["clean"] == numbers(measure())["red"]["clean"]
    assert numbers(result)["red"]["clean"]["total"] == 11
    assert (result["protocol"]["images"], result["protocol"]["images_available"]) == (5, 11)
    chosen = torch.randperm(11, generator=torch.Generator().manual_seed(3))[:5].tolist()
    share = sum(Pictures().labels[i] == 1 for i in chosen)
    cells = [cell for row in numbers(result)["one"]["corruptions"].values() for cell in row.values()]
    assert cells
    assert all(cell == {"correct": share, "total": 5} for cell in cells)
    assert measure(limit=11) == measure(limit=None)
    with pytest.raises(ValueError, match="limit 0"):
        measure(limit=0)


def test_training_flags_come_back_as_they_were() -> None:
    model = nn.Sequential(RedLevel(), nn.BatchNorm1d(CLASSES, dtype=torch.float64))
    model.train()
    model[0].eval()
    evaluate({"model": model}, Pictures(), corruptions=())
    assert [module.training for module in model.modules()] == [True, False, False, True]
    assert int(model[1].num_batches_tracked) == 0
    with pytest.raises(DataError):
        evaluate({"model": model}, Pictures(size=16))
    assert model.training


def test_nan_logits_are_an_error_naming_model_and_corruption() -> None:
    class Overflow(RedLevel):
        def forward(self, images_BCHW: Tensor) -> Tensor:
            logits = super().forward(images_BCHW)
            return torch.where(images_BCHW[:, 0].std((1, 2))[:, None] < 0.02, torch.nan, logits)

    with pytest.raises(NumericsError, match="'bad'.*contrast at severity 5"):
        evaluate({"good": RedLevel(), "bad": Overflow()}, Pictures(), corruptions=("contrast",), severities=(5,))


def test_nan_on_one_rank_is_an_error_on_all() -> None:
    tables: list[Tensor] = []
    bad = {"bad": Fixed([torch.nan, 0.0, 0.0, 0.0, 0.0, 0.0])}
    with pytest.raises(NumericsError):
        evaluate(bad, Pictures(), corruptions=(), world=2, reduce=lambda table: tables.append(table) or table)
    good = {"bad": RedLevel()}
    with pytest.raises(NumericsError, match="clean images"):
        evaluate(good, Pictures(), corruptions=(), rank=1, world=2, reduce=lambda table: table + tables[0])


def test_bad_sets_are_errors() -> None:
    with pytest.raises(DataError, match="label 5 does not fit a model of 2 outputs"):
        pictures = Pictures()
        pictures.labels[0] = 5
        evaluate({"small": Fixed([0.0, 1.0])}, pictures, corruptions=())
    with pytest.raises(DataError, match="no image"):
        evaluate({"red": RedLevel()}, Pictures(0), corruptions=())
    mixed = Pictures()
    mixed.images = [*mixed.images[:-1], torch.rand(3, 40, 32)]
    with pytest.raises(DataError, match="differ in size"):
        evaluate({"red": RedLevel()}, mixed, corruptions=())


def test_progress_ends_at_the_total() -> None:
    seen: list[tuple[str, int, int]] = []
    measure(progress=lambda *step: seen.append(step))
    assert seen[-1] == ("shape bias", 62, 62)  # 11 clean, 4 x 11 corrupted, 7 conflict
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def cells(errors: dict[str, list[int]]) -> ModelScores:
    """Scores with the given errors (in percent) of 100 pictures at severities 1, 2 ..."""
    table: Cells = {
        name: {str(s): {"correct": 100 - wrong, "total": 100} for s, wrong in enumerate(row, 1)}
        for name, row in errors.items()
    }
    return {"clean": {"correct": 90, "total": 100}, "corruptions": table}


def test_means_by_hand() -> None:
    scores = cells({"gaussian_noise": [10, 30], "shot_noise": [40], "fog": [0, 2], "saturate": [90, 90]})
    assert category_errors(scores) == {"noise": 30.0, "weather": 1.0}
    assert mean_error(scores) == pytest.approx((20 + 40 + 1) / 3)  # saturate is held out
    assert severity_errors(scores, CORRUPTIONS) == {1: pytest.approx(50 / 3), 2: 16.0}
    with pytest.raises(ValueError, match="none of the 15"):
        mean_error(cells({"saturate": [50]}))


def test_shape_bias_by_hand() -> None:
    bias = numbers(measure())["red"]["shape_bias"]
    assert bias == {"shape": 7, "texture": 0, "total": 7}
    assert shape_share({"shape": 3, "texture": 1, "total": 8}) == 0.75
    assert coverage({"shape": 3, "texture": 1, "total": 8}) == 0.5
    assert shape_share({"shape": 0, "texture": 0, "total": 8}) is None


def test_statistics_over_seeds() -> None:
    stat = Stat.of([1.0, None, 3.0])
    assert stat is not None
    assert (stat.mean, stat.n, stat.text()) == (2.0, 2, "2.0 ± 1.4")
    assert Stat.of([4.25]) == Stat(4.25, None, 1)
    assert Stat.of([None]) is None


def test_conflict_pictures_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "disc").mkdir()
    for name in ("disc/disc-checks-00001.png", "disc/disc-stripes-00002.png", "square-stripes-x-1.png"):
        Image.fromarray(photo(32)).save(tmp_path / name)
    found = read_conflicts(tmp_path, ["disc", "square"], {"stripes": "disc", "checks": "square"})
    assert [(shape, texture) for _, shape, texture in found] == [(0, 1), (1, 0)]  # disc with stripes agrees: left out
    assert found[0][0].shape == (3, 32, 32)
    np.testing.assert_allclose(found[0][0].permute(1, 2, 0) * 255, photo(32), atol=1e-4)


def test_conflict_folder_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nowhere"):
        read_conflicts(tmp_path / "nowhere", ["a", "b"])
    with pytest.raises(DataError, match="no conflict picture"):
        read_conflicts(tmp_path, ["a", "b"])
    (tmp_path / "a-b-1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a-b-1\.png"):
        read_conflicts(tmp_path, ["a", "b"])
    with pytest.raises(DataError, match="'b'"):
        read_conflicts(tmp_path, ["a", "c"])
