"""`mae-dat split`: every image is in one split, copies of an image stay together, and nothing is half written."""

import itertools
import os
from pathlib import Path

import pytest
from noise_images import MakeFolder
from tiny_runs import verb

from mae_dat.config.commands.split import SplitConfig
from mae_dat.config.errors import ConfigError, DataError, OutputError
from mae_dat.data.split import choose_validation, split_folder
from mae_dat.runtime.console import Console

QUIET = Console(quiet=True)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.png")}


@pytest.fixture
def photos(make: MakeFolder) -> Path:
    names = (f"photos/{name}/{number}.png" for name in ("cat", "dog") for number in range(10))
    return make(" ".join(names)) / "photos"


def test_every_image_is_in_one_split(photos: Path, tmp_path: Path) -> None:
    before = files(photos)
    assert split_folder(SplitConfig(str(photos), str(tmp_path / "out")), QUIET) == {"cat": (8, 2), "dog": (8, 2)}
    train, val = files(tmp_path / "out" / "train"), files(tmp_path / "out" / "val")
    assert not train.keys() & val.keys()
    assert train | val == before == files(photos)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_choice_depends_on_files_and_seed_only(photos: Path, tmp_path: Path) -> None:
    chosen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        split_folder(SplitConfig(str(photos), str(tmp_path / name), seed=seed, link=name == "b"), QUIET)
        chosen.append(sorted(files(tmp_path / name / "val")))
    assert chosen[0] == chosen[1] != chosen[2]
    assert (tmp_path / "b" / "val" / chosen[1][0]).is_symlink()


def test_copies_of_an_image_stay_together(tmp_path: Path) -> None:
    paths = []
    for number, content in enumerate("aaabbcdefg"):
        paths.append(str(tmp_path / f"{number}.png"))
        Path(paths[-1]).write_text(content)
    for seed, share in itertools.product(map(str, range(50)), (0.01, 0.2, 0.5, 0.99)):
        val = choose_validation(paths, share, seed)
        assert 0 < len(val) < len(paths)
        assert not {Path(path).read_text() for path in val} & {Path(path).read_text() for path in set(paths) - val}


def test_what_cannot_be_split_is_an_error_and_leaves_nothing(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--val 1"):
        SplitConfig("a", "b", val=1.0)
    (photos / "one").mkdir()
    os.link(photos / "cat" / "0.png", photos / "one" / "0.png")
    os.link(photos / "cat" / "0.png", photos / "one" / "1.png")
    with pytest.raises(DataError, match="one has 1 different image; a class needs two"):
        split_folder(SplitConfig(str(photos), str(tmp_path / "out")), QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    with pytest.raises(OutputError, match="exists already"):
        split_folder(SplitConfig(str(photos), str(photos)), QUIET)
    (photos / "train").mkdir()
    with pytest.raises(DataError, match="split already"):
        split_folder(SplitConfig(str(photos), str(tmp_path / "out")), QUIET)


def test_the_command_names_the_next_one(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("split")([str(photos), str(tmp_path / "out"), "--val", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "train 14 images, val 6 images, in 2 classes" in out
    assert f"mae-dat finetune --data_path {tmp_path / 'out'}" in out
