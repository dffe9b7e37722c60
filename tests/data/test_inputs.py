"""Images to predict: files, folders, shards and memory, in the order in which they are given."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noise_images import noise, write_images
from PIL import Image

from mae_dat.config.commands.pack import PackConfig
from mae_dat.config.errors import ConfigError, DataError, MissingInputError
from mae_dat.data.decode import decode_file
from mae_dat.data.inputs import InputImages, open_inputs
from mae_dat.data.shards.index import read_index
from mae_dat.data.shards.pack import pack
from mae_dat.runtime.console import Console

QUIET = Console(quiet=True)


def names(inputs: InputImages) -> list[str]:
    return [inputs.image_name(index) for index in range(len(inputs))]


def pixels(inputs: InputImages, index: int = 0) -> np.ndarray:
    return np.asarray(inputs.load_image(index))


def test_files_and_folders_in_order_and_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, "d/b.jpg d/e/c.PNG d/a.webp z.png -x.png d/.hidden.png odd.name")
    (tmp_path / "d" / "notes.txt").write_text("")
    (tmp_path / "d" / "loop").symlink_to(tmp_path / "d")
    inputs = open_inputs(["z.png", Path("d"), "d/b.jpg", "-x.png", "odd.name", "z.png"])
    assert names(inputs) == ["z.png", "d/a.webp", "d/b.jpg", "d/e/c.PNG", "-x.png", "odd.name"]
    assert inputs.ignored_files.describe() == "hidden 1 (d/.hidden.png), .txt 1 (d/notes.txt)"
    assert inputs.paths == ["z.png", "d", "d/b.jpg", "-x.png", "odd.name", "z.png"]
    assert np.array_equal(pixels(inputs, 2), noise(seed=0))
    assert np.array_equal(pixels(inputs, 5), noise(seed=6))
    assert [*inputs.files()] == names(inputs)
    assert names(open_inputs(Path("d").glob("*.jpg"))) == ["d/b.jpg"]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    source = write_images(tmp_path / "source", " ".join(f"val/{c}/{k}.png" for c in "xy" for k in range(6)))
    pack(PackConfig(str(source), str(tmp_path / "shards"), shard_mb=0.015, num_workers=0), QUIET)
    return tmp_path / "shards" / "val"


def test_shards_are_read_with_other_images(shards: Path, tmp_path: Path) -> None:
    tars = sorted(shards.glob("*.tar"))
    assert len(tars) > 1
    photo = write_images(tmp_path / "own", "photo.png") / "photo.png"
    inputs = open_inputs([photo, shards.parent, tars[1]])
    found = names(inputs)
    first, rest = found[0], found[1:]
    assert first == str(photo)
    assert len(rest) == len(set(rest)) + len([name for name in set(rest) if name.startswith(f"{tars[1]}/")])
    assert {name.rpartition("/")[0].split(".tar")[0] + ".tar" for name in rest} == set(map(str, tars))
    stored = {decode_file(path).tobytes() for path in (tmp_path / "source").rglob("*.png")}
    assert {inputs.load_image(index).tobytes() for index in range(1, 13)} == stored
    single = open_inputs(tars[1])
    assert names(single) == [name for name in rest[:12] if name.startswith(f"{tars[1]}/")]
    shutil.copy(tars[1], shards / "other.tar")
    with pytest.raises(DataError, match=r"other\.tar is not in the index of its folder"):
        open_inputs(shards / "other.tar")
    (shards / "index.safetensors").unlink()
    with pytest.raises(MissingInputError, match="mae-dat pack --index"):
        open_inputs(shards)


def test_a_member_that_cannot_be_read_is_named(shards: Path) -> None:
    inputs = open_inputs(shards)
    before = names(inputs)
    tar = sorted(shards.glob("*.tar"))[0]
    tar.write_bytes(tar.read_bytes()[:-512])
    torn = open_inputs(shards)
    assert torn.image_name(0) == f"{tar} at byte {read_index(shards).offset[0]}"
    with pytest.raises(DataError, match="the index says"):
        torn.load_image(0)
    assert torn.image_name(len(before) - 1) == before[-1]


@pytest.mark.parametrize(
    "mode, value, expected",
    [
        ("L", 100, (100, 100, 100)),
        ("CMYK", (0, 255, 0, 0), (255, 0, 255)),
        ("I;16", 257 * 40, (40, 40, 40)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("1", 1, (255, 255, 255)),
        ("P", (10, 20, 30), (10, 20, 30)),
    ],
)
def test_every_mode_gives_the_same_from_a_file_and_from_memory(
    tmp_path: Path, mode: str, value: Any, expected: tuple[int, int, int]
) -> None:
    if mode == "P":
        image = Image.new("RGB", (8, 6), value).convert("P", palette=Image.Palette.ADAPTIVE)
    elif mode == "I;16":
        image = Image.fromarray(np.full((6, 8), value, np.uint16))
    else:
        image = Image.new(mode, (8, 6), value)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    for given in (path, image, Image.open(path)):
        found = pixels(open_inputs([given]))
        assert found.shape == (6, 8, 3)
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_arrays_and_tensors(tmp_path: Path) -> None:
    image = np.asarray(noise(6, 8))
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    batch = torch.stack([tensor, tensor.flip(0)])
    inputs = open_inputs([image, image / 255, tensor, tensor.float() / 255, noise(6, 8)])
    assert names(inputs) == [f"image {number}" for number in range(5)]
    for index in range(5):
        assert np.array_equal(pixels(inputs, index), image)
    assert np.array_equal(pixels(open_inputs(batch), 1), image[:, :, ::-1])
    assert len(open_inputs(image[None])) == 1
    assert np.array_equal(pixels(open_inputs(image[:, :, 0]))[:, :, 2], image[:, :, 0])
    assert np.array_equal(pixels(open_inputs(tensor[:1].double() / 255))[:, :, 1], image[:, :, 0])
    assert np.array_equal(pixels(open_inputs((tensor.float() / 255).to(torch.bfloat16))) > 100, image > 100)


def test_wrong_images_in_memory() -> None:
    for image, message in [
        (np.zeros((3, 6, 8), np.uint8), r"an array of shape \(3, 6, 8\) is no image: give \(H, W, 3\)"),
        (torch.zeros(6, 8, 3), r"a tensor of shape \(6, 8, 3\) is no image: give \(3, H, W\)"),
        (torch.zeros(3, 6, 8) + 2, r"float pixels must be in \[0, 1\], not 2 to 2"),
        (np.full((6, 8, 3), np.nan), r"float pixels must be in \[0, 1\], not nan"),
        (np.zeros((6, 8, 3), np.int64), "pixels of type int64 are not supported"),
        (np.zeros((0, 8, 3), np.uint8), "is no image"),
        (7, "images of type int are not supported"),
        ([], "no images: give files"),
        (torch.zeros(0, 3, 6, 8), "no images: give files"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_inputs(image)


def test_a_damaged_image_in_memory_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = write_images(tmp_path, "a.png") / "a.png"
    path.write_bytes(path.read_bytes()[:300])
    with Image.open(path) as image:
        inputs = open_inputs([image, noise()])
    with pytest.raises(DataError, match="damaged or truncated"):
        inputs.load_image(0)
    assert np.array_equal(pixels(inputs, 1), noise())
