"""The symbolic adversary: the best words by brute force, its budget, its neighbors, and what it does to a network."""

import itertools
from importlib import resources

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacked_models import Mosaic, generator
from torch import Tensor

from mae_dat.attacks import symbolic
from mae_dat.attacks.discrete import AttackConfig, discrete_adversary, other_words, random_words
from mae_dat.attacks.gradient import LossPerImage
from mae_dat.attacks.symbolic import LossFn, change_words, nearest_codes, symbolic_words
from mae_dat.config.errors import ConfigError
from mae_dat.data.generated.draw import SHAPES, draw_image
from mae_dat.models.tokenizer import LightConfig, LightTokenizer, load_tokenizer, quantize
from mae_dat.models.weights.open import open_model


def linear_loss(weight: Tensor) -> LossFn:
    return lambda image: (weight * image).sum()


def changes(words: Tensor, other: Tensor) -> list[int]:
    return (words != other).flatten(1).sum(1).tolist()


@pytest.mark.parametrize("chunk", [2**25, 3 * 64])
@pytest.mark.parametrize("nearest", [None, 5])
def test_one_step_is_the_best_of_all_changes_where_the_loss_is_linear(
    nearest: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SCORES_AT_ONCE", chunk)
    tokenizer = Mosaic(levels=4)
    words, weight = torch.randint(0, 64, (2, 3, 2)), torch.randn(2, 3, 12, 8)
    loss_fn = linear_loss(weight)
    found = change_words(words, torch.ones_like(words, dtype=torch.bool), loss_fn, tokenizer, 2, nearest)
    assert changes(words, found) == [2, 2]
    near = nearest_codes(torch.arange(64), tokenizer.codebook, nearest or 63).tolist()
    for row in range(2):
        before = linear_loss(weight[row])(tokenizer.decode(words[row : row + 1]))
        gains = []
        for place in range(6):
            rises = []
            for word in near[int(words[row].flatten()[place])]:
                changed = words[row].flatten().clone()
                changed[place] = word
                rises.append(linear_loss(weight[row])(tokenizer.decode(changed.view(1, 3, 2))) - before)
            gains.append(float(torch.stack(rises).max()))
        after = linear_loss(weight[row])(tokenizer.decode(found[row : row + 1]))
        best = max(sum(pair) for pair in itertools.combinations(gains, 2))
        assert float(after - before) == pytest.approx(best, rel=1e-4)


def test_nearest_codes_are_the_nearest_but_never_the_word_itself() -> None:
    codebook = torch.randn(50, 3)
    codebook[7] = codebook[8]  # dead codes may coincide
    found = nearest_codes(torch.arange(50), codebook, 4)
    distance = torch.cdist(codebook.double(), codebook.double()).fill_diagonal_(torch.inf)
    assert torch.equal(found, distance.topk(4, largest=False).indices)
    assert found[7, 0] == 8
    assert nearest_codes(torch.tensor([3]), codebook, 1000).shape == (1, 49)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_steps_share_the_budget_and_keep_what_was_changed(steps: int) -> None:
    tokenizer = LightTokenizer(LightConfig(width=16, encoder_blocks=1, decoder_blocks=1, num_words=32)).freeze()
    words, weight = torch.randint(0, 32, (3, 4, 5)), torch.randn(3, 3, 16, 20)

    def loss_fn(image: Tensor) -> Tensor:
        seen.append(tokenizer.encode(image))
        return (weight * image).sin().sum()

    seen: list[Tensor] = []
    found = symbolic_words(words, loss_fn, tokenizer, 7, steps)
    assert len(seen) == steps
    assert changes(words, found) == [7, 7, 7]
    for count in range(7):  # a smaller budget in as many steps a word: the same beginning
        one_by_one = symbolic_words(words, loss_fn, tokenizer, count, max(count, 1))
        larger = symbolic_words(words, loss_fn, tokenizer, count + 1, count + 1)
        kept = one_by_one != words
        assert torch.equal(one_by_one[kept], larger[kept])


def curved_losses(weight: Tensor) -> LossPerImage:
    """Losses whose first-order estimate misleads."""
    return LossPerImage(lambda image: (3 * weight * image).sin().sum((1, 2, 3)))


def test_with_all_losses_computed_the_best_single_change_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "WORDS_PER_PLACE", 64)
    tokenizer = Mosaic(levels=4)
    words, free = torch.randint(0, 64, (3, 3, 2)), torch.ones(3, 3, 2, dtype=torch.bool)
    loss_fn = curved_losses(torch.randn(3, 12, 8))
    start = loss_fn.each(tokenizer.decode(words))
    gradient = symbolic.code_gradient(words, loss_fn, tokenizer)
    best = start.clone()
    for place in range(6):
        for word in range(64):
            code, own = tokenizer.codebook[word], tokenizer.codebook[words.flatten(1)[:, place]]
            is_candidate = ((code - own) * gradient.flatten(1, 2)[:, place]).sum(1) > 0
            changed = words.flatten(1).clone()
            changed[:, place] = word
            losses = loss_fn.each(tokenizer.decode(changed.view_as(words)))
            best = torch.where(is_candidate, best.maximum(losses), best)
    found = change_words(words, free, loss_fn, tokenizer, 1, rescore=6 * 64)
    assert loss_fn.each(tokenizer.decode(found)).tolist() == pytest.approx(best.tolist(), rel=1e-5)


def test_exact_losses_never_choose_a_worse_single_change() -> None:
    tokenizer = Mosaic(levels=4)
    words, free = torch.randint(0, 64, (20, 3, 2)), torch.ones(20, 3, 2, dtype=torch.bool)
    free[:, 0] = False
    loss_fn = curved_losses(torch.randn(3, 12, 8))
    reached = []
    for rescore in (0, 40):
        found = change_words(words, free, loss_fn, tokenizer, 1, rescore=rescore)
        assert torch.equal(found[:, 0], words[:, 0])
        assert max(changes(words, found)) <= 1
        reached.append(loss_fn.each(tokenizer.decode(found)))
    start = loss_fn.each(tokenizer.decode(words))
    assert (reached[1] >= reached[0].maximum(start) - 1e-5).all()
    assert reached[1].mean() > reached[0].mean() + 0.1


def test_places_without_a_computed_loss_follow_those_with_one() -> None:
    """A budget beyond the candidates is filled by the estimates."""
    tokenizer = Mosaic(levels=4)
    words, free = torch.randint(0, 64, (2, 3, 2)), torch.ones(2, 3, 2, dtype=torch.bool)
    weight = torch.randn(3, 12, 8)
    loss_fn = LossPerImage(lambda image: (weight * image).sum((1, 2, 3)))
    assert torch.equal(
        change_words(words, free, loss_fn, tokenizer, 5, rescore=2), change_words(words, free, loss_fn, tokenizer, 5)
    )
    with pytest.raises(ConfigError, match="rescoring needs the loss of each image"):
        change_words(words, free, loss_fn.each, tokenizer, 1, rescore=2)


def test_without_a_gradient_no_word_changes() -> None:
    words = torch.randint(0, 64, (2, 3, 2))
    assert torch.equal(symbolic_words(words, lambda x: 0 * x.sum(), Mosaic(levels=4), 4), words)
    assert torch.equal(symbolic_words(words, lambda x: x.round().sum(), Mosaic(levels=4), 4), words)


def test_an_image_is_attacked_alike_in_any_batch() -> None:
    tokenizer, words, weight = load_tokenizer(), torch.randint(0, 512, (5, 8, 8)), torch.randn(3, 32, 32)

    def loss_fn(image: Tensor) -> Tensor:
        return (weight * image).square().sum((1, 2, 3)).sum()

    together = symbolic_words(words, loss_fn, tokenizer, 12, 3)
    alone = [symbolic_words(one, loss_fn, tokenizer, 12, 3) for one in words.split(1)]
    assert torch.equal(torch.cat(alone), together)


def test_random_words_among_the_nearest_are_uniform() -> None:
    codebook = torch.randn(40, 3)
    near = nearest_codes(torch.tensor([11]), codebook, 4)[0]
    words = torch.full((300, 20), 11)
    drawn = other_words(words, codebook, generator(), nearest=4)
    counts = torch.bincount(drawn.flatten(), minlength=40).float()
    assert set(drawn.unique().tolist()) == set(near.tolist())
    assert (counts[near] - 1500).abs().max() < 6 * (1500 * 0.75) ** 0.5
    changed = random_words(words, codebook, 0.25, generator(), nearest=4)
    assert changes(words, changed) == [5] * 300


@pytest.mark.parametrize("nearest", [None, 32])
def test_its_words_hurt_a_network_far_more_than_as_many_random_ones(nearest: int | None) -> None:
    model = open_model(resources.files("mae_dat") / "models" / "weights" / "demo_classifier.safetensors").classifier()
    drawn = [draw_image(0, "val", index) for index in range(40)]
    image = torch.from_numpy(np.stack([one.image for one in drawn])).permute(0, 3, 1, 2).float() / 255
    label = torch.tensor([sorted(SHAPES).index(SHAPES[one.shape]) for one in drawn])

    def loss_fn(view: Tensor) -> Tensor:
        return F.cross_entropy(model(view), label)

    rises = {}
    for kind in ("symbolic", "random"):
        attack = AttackConfig(kind, share=0.05, nearest=nearest)  # type: ignore[arg-type]
        found = discrete_adversary(image, loss_fn, load_tokenizer(), attack, generator())
        assert changes(found.words, found.adversarial_words) == [13] * 40
        with torch.no_grad():
            rises[kind] = float(loss_fn(found.adversarial) - loss_fn(found.reconstruction))
    assert rises["symbolic"] > 0.5
    assert rises["symbolic"] > 3 * abs(rises["random"])
