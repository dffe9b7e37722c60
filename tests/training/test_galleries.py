"""Galleries, by the pixels of their columns before and after drawing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mae_dat.attacks.discrete import DiscreteAdversary
from mae_dat.data.gallery import draw_gallery, draw_sheet, save_png
from mae_dat.models.mae import MaskedAutoencoder, mask_noise
from mae_dat.models.tokenizer import load_tokenizer
from mae_dat.training.galleries import (
    adversary_columns,
    adversary_gallery,
    attention_columns,
    codebook_image,
    most_changed_words,
    reconstruction_columns,
    reconstruction_gallery,
    used_words,
    word_colors,
    word_columns,
    word_tiles,
)

SIDE, PATCH, COUNT = 16, 4, 2


class Oracle(MaskedAutoencoder):
    """Predicts the target itself, so that a de-normalized prediction has to be the image."""

    norm_pix = True

    def forward(self, *given: Any) -> Any:
        return self.target(self.shown, self.norm_pix), *super().forward(*given)[1:]

    shown: Tensor


def autoencoder(channels: int, kind: type[MaskedAutoencoder] = MaskedAutoencoder) -> MaskedAutoencoder:
    return kind(SIDE, PATCH, channels, 16, 1, 2, 16, 1, 2)


def masked_places(model: MaskedAutoencoder, image: Tensor, noise: Tensor) -> Tensor:
    """(B, C, H, W), 1 at the pixels of removed patches, found from the mask of a forward."""
    mask = model(image, 0.75, noise)[1].view(len(image), SIDE // PATCH, SIDE // PATCH)
    return mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2).unsqueeze(1).expand_as(image)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_masked_reconstruction_original(channels: int, norm_pix: bool) -> None:
    model, image = autoencoder(channels), torch.rand(COUNT, channels, SIDE, SIDE)
    noise = mask_noise(COUNT, model.num_patches, None, "cpu")
    (first, masked), (second, pasted), (third, original) = reconstruction_columns(model, image, 0.75, noise, norm_pix)
    assert (first, third) == ("masked 75%", "original")
    assert second == ("reconstruction\n(true patch statistics)" if norm_pix else "reconstruction")
    removed = masked_places(model, image, noise).bool()
    assert removed.float().mean() == 0.75
    assert (masked[removed] == 0.5).all(), "gray exactly where patches are removed"
    assert torch.equal(masked[~removed], image[~removed])
    assert torch.equal(pasted[~removed], image[~removed]), "visible patches are the image's own"
    assert not torch.isclose(pasted[removed], image[removed], atol=1e-4).all()
    assert torch.equal(original, image)
    drawn = reconstruction_gallery(model, image, 0.75, noise, norm_pix)
    assert drawn.shape[0] == 3
    assert 0 <= drawn.min() <= drawn.max() <= 1
    assert model.training, "the flag of before is back"
    assert not pasted.requires_grad


@pytest.mark.parametrize("norm_pix", [True, False])
def test_predictions_are_denormalized(norm_pix: bool) -> None:
    model, image = autoencoder(3, Oracle), torch.rand(COUNT, 3, SIDE, SIDE)
    assert isinstance(model, Oracle)
    model.shown, model.norm_pix = image, norm_pix
    noise = mask_noise(COUNT, model.num_patches, None, "cpu")
    columns = reconstruction_columns(model, image, 0.75, noise, norm_pix)
    torch.testing.assert_close(columns[1][1], image, atol=1e-5, rtol=0)


def adversary(image: Tensor, factor: int = 4) -> DiscreteAdversary:
    words = torch.randint(0, 50, (len(image), SIDE // factor, SIDE // factor))
    changed = words.clone()
    changed[0, 0, 1] += 1
    changed[1, 3, 2] += 5
    changed[1, 2, 0] += 5
    return DiscreteAdversary(image * 0.9, image * 0.8, words, changed)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_map_marks_exactly_the_changed_words(channels: int) -> None:
    image = torch.rand(COUNT, channels, SIDE, SIDE)
    found = adversary(image)
    columns = adversary_columns(image, found)
    titles, pictures = [title for title, _ in columns], [picture for _, picture in columns]
    assert titles == [
        "clean",
        "words, decoded",
        "adversarial",
        "difference × 4\n(to the decoded)",
        "changed words (9.4%)",
    ]
    assert torch.equal(pictures[0], image)
    assert torch.equal(pictures[1], found.reconstruction)
    assert torch.equal(pictures[2], found.adversarial)
    torch.testing.assert_close(pictures[3], 0.5 - 0.4 * image)
    torch.testing.assert_close(adversary_columns(image, found, amplify=10)[3][1], 0.5 - image)
    dark = pictures[4].mean(1) < 0.5
    expected = torch.zeros(COUNT, SIDE, SIDE, dtype=torch.bool)
    expected[0, 0:4, 4:8] = expected[1, 12:16, 8:12] = expected[1, 8:12, 0:4] = True
    assert torch.equal(dark, expected)
    assert adversary_gallery(image, found).shape[0] == 3


def cell_centers(drawn: Tensor, rows: int, width: int) -> Tensor:
    """Colors in the middle of each cell, (rows, width, 3), found from the white gaps between the cells."""

    def middles(inked: Tensor, count: int) -> list[int]:
        edges = torch.diff(inked.int(), prepend=torch.zeros(1, dtype=torch.int32), append=torch.zeros(1).int())
        starts, ends = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
        spans = [(start, end) for start, end in zip(starts, ends, strict=True) if end - start > 50]
        assert len(spans) == count
        return [(start + end) // 2 for start, end in spans]

    colored = (drawn.amax(0) - drawn.amin(0)) > 0.3  # the titles are gray
    ys, xs = middles(colored.any(1), rows), middles(colored.any(0), width)
    return torch.stack([torch.stack([drawn[:, y, x] for x in xs]) for y in ys])


def test_drawing_keeps_the_layout_and_the_colors() -> None:
    colors = torch.tensor([[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [[1, 1, 0], [0, 1, 1], [1, 0, 1]]])
    columns = [(f"column {x}", colors[:, x, :, None, None].expand(2, 3, 8, 8)) for x in range(3)]
    drawn = draw_gallery(columns)
    torch.testing.assert_close(cell_centers(drawn, 2, 3), colors, atol=0.02, rtol=0)


def test_values_beyond_the_range_are_clipped() -> None:
    picture = torch.tensor([2.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    drawn = draw_gallery([("one", picture)])
    assert cell_centers(drawn, 1, 1)[0, 0].tolist() == pytest.approx([1, 0, 0], abs=0.02)


@pytest.mark.parametrize(
    ("channels", "shown"), [(1, (0.6, 0.6, 0.6)), (2, (0.6, 0.2, 0.0)), (3, (0.6, 0.2, 0.9)), (4, (0.6, 0.2, 0.9))]
)
def test_any_number_of_channels_can_be_shown(channels: int, shown: tuple[float, ...]) -> None:
    values = torch.tensor([0.6, 0.2, 0.9, 0.4])[:channels].view(1, channels, 1, 1)
    drawn = draw_gallery([("one", values.expand(1, channels, 8, 8))])
    middle = drawn[:, drawn.shape[1] * 2 // 3, drawn.shape[2] // 2]
    assert middle.tolist() == pytest.approx(shown, abs=0.01)


def test_an_image_is_written_as_it_is(tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (3, 5, 7)).float() / 255
    save_png(picture, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        read = np.asarray(image)
    assert read.shape == (5, 7, 3)
    assert torch.equal(torch.from_numpy(read.copy()).permute(2, 0, 1).float() / 255, picture)
    save_png(picture * 3 - 1, tmp_path / "clipped.png")


def test_pixels_are_enlarged_by_whole_numbers() -> None:
    picture = torch.rand(1, 3, 8, 12)
    drawn = draw_gallery([("", picture)], cell=60)
    assert drawn.shape == (3, 8 * 5 + 8 + 8 + 4, 12 * 5 + 8 + 8), "a margin of 8 pixels, and 4 where titles would be"
    rows, columns = 12 + 5 * torch.arange(8), 8 + 5 * torch.arange(12)
    for inside in (0, 4):
        read = drawn[:, rows + inside][:, :, columns + inside]
        torch.testing.assert_close(read, picture[0], atol=1.01 / 255, rtol=0)


def test_captions_and_heading_take_their_own_place() -> None:
    picture = torch.zeros(2, 3, 8, 8)
    plain = draw_gallery([("one", picture), ("two", picture)])
    told = draw_gallery([("one", picture), ("two", picture)], [["a", "b\nc"], ["", "d"]], "a heading")
    assert told.shape[2] == plain.shape[2]
    assert told.shape[1] > plain.shape[1] + 4 * 20, "two lines under each row"
    black = [int((drawn.amax(0) == 0).sum()) for drawn in (plain, told)]
    assert black[1] > black[0] >= 4 * 224 * 224, "no image is covered; what is new is ink beside them"
    numbered = draw_sheet(torch.zeros(5, 3, 4, 4), list("abcde"), across=3, cell=40)
    filled = (numbered == 0).all(0).float()
    assert filled.sum() >= 5 * 40 * 40, "all five, and the sixth place is left white"
    assert filled[:, -40:].sum() < 1.5 * 40 * 40


def test_long_names_lose_their_middle_and_dollars_are_no_formula() -> None:
    picture = torch.zeros(1, 3, 8, 8)
    drawn = draw_gallery([("", picture)], [["folder/" + "x" * 200 + "/$1$.jpg"]])
    assert (drawn[:, 12 + 224 :, :4] == 1).all(), "no ink at the page's edge"
    assert (drawn[:, 12 + 224 :, -4:] == 1).all()


def test_attention_is_drawn_bright_where_it_falls() -> None:
    maps = torch.full((1, 2, 4, 4), 0.01)
    maps[0, 0, 1, 2] = maps[0, 1, 3, 0] = 0.5
    columns, captions = attention_columns(torch.full((1, 3, 16, 16), 0.5), maps)
    assert [title for title, _ in columns] == ["image", "mean of 2 heads", "head 1", "head 2"]
    for (_, drawn), places in zip(columns[1:], ([(1, 2), (3, 0)], [(1, 2)], [(3, 0)]), strict=True):
        bright = drawn[0].mean(0).unfold(0, 4, 4).unfold(1, 4, 4).mean((2, 3)) > 0.5
        assert bright.nonzero().tolist() == [list(place) for place in places]
    assert captions == [["", "peak 25.5%\npatches 65%", "peak 50.0%\npatches 65%", "peak 50.0%\npatches 65%"]]
    assert [title for title, _ in attention_columns(torch.rand(1, 1, 16, 16), maps[:, :1])[0]] == [
        "image",
        "attention",
    ]


def test_words_are_drawn_alone_in_their_places() -> None:
    tokenizer, image = load_tokenizer(), torch.rand(COUNT, 3, SIDE, SIDE)
    words = tokenizer.encode(image)
    columns, captions = word_columns(image, words, tokenizer)
    pictures = dict(columns)
    assert torch.equal(pictures["decoded from its words"], tokenizer.decode(words))
    alone = pictures["each word drawn alone"]
    tile = tokenizer.decode(words[1, 2, 3].expand(1, 3, 3))[0, :, 4:8, 4:8]
    torch.testing.assert_close(alone[1, :, 8:12, 12:16], tile, atol=1e-5, rtol=0)
    assert captions[0][3] == f"{len(words[0].unique())} words in 16 places"
    index_map = pictures["index map\n(one color for each word)"]
    assert torch.equal(index_map[:, :, ::4, ::4], word_colors(words))


def test_a_word_has_one_color_and_no_two_the_same() -> None:
    colors = word_colors(torch.arange(2048).view(1, 32, 64))
    assert torch.equal(word_colors(torch.tensor([[[77]]]))[0, :, 0, 0], colors[0, :, 1, 13])
    assert len(colors.flatten(2)[0].T.unique(dim=0)) == 2048
    neighbors = (colors[0, :, :, 1:] - colors[0, :, :, :-1]).norm(dim=0)
    assert neighbors.min() > 0.2, "the next index is another color to the eye"


def test_the_codebook_is_laid_out_by_rows() -> None:
    tiles = torch.rand(7, 3, 4, 4)
    picture = codebook_image(tiles, tile_size=8)
    assert picture.shape == (1, 3, 2 * 10, 4 * 10), "four across, and a white line after each"
    assert torch.equal(picture[0, :, 10:18:2, 20:28:2], tiles[6])
    assert (picture[0, :, 10:, 30:] == 1).all()
    tokenizer = load_tokenizer()
    chunked = word_tiles(tokenizer, torch.arange(6), chunk=4)
    torch.testing.assert_close(chunked, word_tiles(tokenizer, torch.arange(6)), atol=1e-5, rtol=0)


def test_words_are_counted() -> None:
    words = torch.tensor([[[5, 5, 5], [2, 2, 9]]])
    after = torch.tensor([[[7, 7, 8], [2, 1, 9]]])
    assert most_changed_words(words, after, 9) == [(5, 7, 3, 3), (2, 1, 1, 2)]
    assert most_changed_words(words, after, 1) == [(5, 7, 3, 3)]
    assert most_changed_words(words, words, 9) == []
    used, shares = used_words(words)
    assert used.tolist() == [5, 2, 9]
    assert shares == pytest.approx([1 / 2, 1 / 3, 1 / 6])
