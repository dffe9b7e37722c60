"""The word attack: exact counts whatever the batch and rank, nested budgets, curves that never rise, and refusals."""

import itertools
import math

import pytest
import torch
from attacked_models import Mosaic, trained_classifier
from torch import Tensor, nn
from word_curves import WordCurve, word_accuracy

from mae_dat.attacks.word_budget import WORD_ATTACK_KINDS, WordAttack, word_hits
from mae_dat.config.errors import ConfigError, DataError, NumericsError
from mae_dat.data.image_set import Batch

SHARES = (0.0, 0.05, 0.1, 0.3)  # 0, 3, 6 and 19 of the 64 words of an image of 32 px
ATTACK = WordAttack(SHARES)
CPU = torch.device("cpu")


def batches(sizes: int, chosen: slice = slice(None), skipped: tuple[int, ...] = ()) -> list[Batch]:
    """Thirty images that the small network was trained on, every fifth with a wrong label."""
    _, image, label = trained_classifier()
    index = torch.arange(30)[chosen]
    return [
        {
            "image": image[part],
            "label": (label[part] + (part % 5 == 0)) % 5,
            "index": part,
            "skipped": torch.tensor([int(one) in skipped for one in part], dtype=torch.int64),
        }
        for part in index.split(sizes)
    ]


def measured(
    sizes: int = 30, attack: WordAttack = ATTACK, chosen: slice = slice(None), **more: object
) -> dict[str, WordCurve]:
    net, _, _ = trained_classifier()
    return word_accuracy(net, Mosaic(), batches(sizes, chosen, **more), attack, CPU)  # type: ignore[arg-type]


def correct(curve: WordCurve) -> list[int]:
    return [count["correct"] for count in curve.values()]


def test_the_curves_begin_at_the_reconstructions_never_rise_and_the_adversary_finds_more() -> None:
    net, _, _ = trained_classifier()
    found, (batch,) = measured(), batches(30)
    assert list(found) == ["symbolic", "random"]
    assert all(list(curve) == ["0", "0.05", "0.1", "0.3"] for curve in found.values())
    assert {count["total"] for curve in found.values() for count in curve.values()} == {30}
    right = int((net(Mosaic().reconstruct(batch["image"])).argmax(1) == batch["label"]).sum())
    symbolic, random = correct(found["symbolic"]), correct(found["random"])
    assert symbolic[0] == random[0] == right > 20
    assert all(a >= b for curve in (symbolic, random) for a, b in itertools.pairwise(curve))
    assert symbolic[1] < random[1] - 2
    assert symbolic[-1] < 5 < random[-1]


def test_counts_are_the_same_for_any_batch_and_any_number_of_ranks() -> None:
    whole = measured()
    assert all(measured(size) == whole for size in (1, 4, 7))
    for ranks in (2, 3, 7):
        shared = [measured(5, chosen=slice(rank, None, ranks)) for rank in range(ranks)]
        for kind in WORD_ATTACK_KINDS:
            assert [sum(each) for each in zip(*(correct(one[kind]) for one in shared), strict=True)] == correct(
                whole[kind]
            )


def test_the_seed_is_of_the_random_words_alone() -> None:
    curves = [measured(attack=WordAttack((0.0, 0.2, 0.4, 0.6), seed=seed)) for seed in (1, 1, 2, 3)]
    assert curves[0] == curves[1]
    assert len({tuple(correct(curve["random"])) for curve in curves}) > 1
    assert len({tuple(correct(curve["symbolic"])) for curve in curves}) == 1


class RecordingMosaic(Mosaic):
    """Keeps the words of everything that is decoded for the network."""

    def __init__(self) -> None:
        super().__init__()
        self.decoded: list[Tensor] = []

    def decode(self, words: Tensor) -> Tensor:
        self.decoded.append(words)
        return super().decode(words)


@pytest.mark.parametrize("nearest", [None, 6])
@pytest.mark.parametrize("kind", WORD_ATTACK_KINDS)
def test_budgets_are_kept_to_the_word_and_nested(kind: str, nearest: int | None) -> None:
    net, image, label = trained_classifier()
    tokenizer, attack = RecordingMosaic(), WordAttack(SHARES, steps=3, nearest=nearest)
    for one in range(8):
        tokenizer.decoded.clear()
        part = slice(one, one + 1)
        word_hits(net, tokenizer, image[part], label[part], torch.tensor([one]), kind, attack)
        start, *later = tokenizer.decoded
        assert later
        changed = [(words != start).sum().item() for words in later]
        assert changed == [3, 6, 19][: len(later)], "as long as the network is right, and exactly so many"
        for smaller, larger in itertools.pairwise([start, *later]):
            kept = smaller != start
            assert torch.equal(larger[kept], smaller[kept])


class Relenting(nn.Module):
    """Wrong (class 1 for 0) while 3 words differ from those of an image, right again when more do."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = Mosaic().reconstruct(image)

    def forward(self, image: Tensor) -> Tensor:
        differing = (image != self.image).any(1)[:, ::4, ::4].flatten(1).sum(1)
        return torch.stack([differing != 3, differing == 3], 1).float()


def test_an_image_that_was_lost_to_fewer_words_stays_lost() -> None:
    image = trained_classifier()[1][:1]
    net, zero = Relenting(image), torch.zeros(1, dtype=torch.int64)
    hits = word_hits(net, Mosaic(), image, zero, zero, "random", ATTACK)
    assert hits[:, 0].tolist() == [True, False, False, False]
    assert word_hits(net, Mosaic(), image, zero, zero, "random", WordAttack((0.0, 0.1, 0.3))).all()


def test_images_that_stand_in_are_not_counted() -> None:
    found, without = measured(4, skipped=(0, 1, 2, 3, 9)), measured(4)
    assert found["random"]["0"]["total"] == 25
    assert found["random"]["0"]["correct"] < without["random"]["0"]["correct"]
    with pytest.raises(DataError, match="no image to attack"):
        measured(skipped=tuple(range(30)))


def test_it_leaves_no_trace() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net[1].eval()
    flags, before = [part.training for part in net.modules()], torch.get_rng_state()
    one, other = (word_accuracy(net, Mosaic(), batches(10), ATTACK, CPU) for _ in range(2))
    assert one == other, "dropout is off"
    assert [part.training for part in net.modules()] == flags
    assert all(weight.grad is None for weight in net.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    net[4].weight.data.fill_(math.nan)
    with pytest.raises(NumericsError, match="NaN or infinite logits"):
        word_accuracy(net, Mosaic(), batches(10), ATTACK, CPU)
    assert [part.training for part in net.modules()] == flags


@pytest.mark.parametrize("shares", [(0.1, 0.2), (), (0.0, 0.2, 0.2), (0.0, 0.3, 0.2), (0.0, 1.1)])
def test_shares_that_make_no_curve_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="start at 0 and rise to at most 1"):
        WordAttack(shares)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="64 words per image are .*remove shares that give the same"):
        measured(attack=WordAttack())
    with pytest.raises(ConfigError, match="steps >= 1 and nearest >= 1"):
        WordAttack(nearest=0)
    (batch,) = batches(30)
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        word_accuracy(trained_classifier()[0], Mosaic(), [{**batch, "image": batch["image"] * 2 - 1}], ATTACK, CPU)
