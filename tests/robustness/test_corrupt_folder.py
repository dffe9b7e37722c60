"""`mae-dat corrupt`: the copies of a folder, to the bit, also after a kill and by any number of workers."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from noise_images import noise
from PIL import Image
from tiny_runs import ROOT, environment, verb

from mae_dat.config.commands.corrupt import CorruptConfig
from mae_dat.config.errors import ConfigError, DataError, OutputError
from mae_dat.data.shards.reader import Shards
from mae_dat.robustness.corrupt_folder import MANIFEST_FILE, CopyWriter, corrupt_folder
from mae_dat.robustness.corruptions import CORRUPTIONS, as_stored, corrupt_image, image_seed
from mae_dat.runtime.console import Console

QUIET = Console(quiet=True)
FLAGS = {"corruptions": ("fog", "gaussian_noise"), "severities": (2, 5), "seed": 3, "num_workers": 0}


def photos(root: Path, count: int = 3, side: int = 40) -> Path:
    """Noise images of two classes."""
    for number in range(count):
        for name in ("cat", "dog"):
            path = root / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(side, side + 4, seed=number + 100 * (name == "dog")).save(path)
    return root


def copies(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.jpg"))}


def run(source: Path, out: Path, **flags: object) -> int:
    return corrupt_folder(CorruptConfig(str(source), str(out), **{**FLAGS, **flags}), QUIET)  # type: ignore[arg-type]


def test_a_copy_is_the_corruption_of_that_image_place_and_seed(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    assert run(source, out) == 2 * 2 * 6
    assert sorted(copies(out))[:4] == ["fog/2/cat/0.jpg", "fog/2/cat/1.jpg", "fog/2/cat/2.jpg", "fog/2/dog/0.jpg"]
    pixels = np.array(Image.open(source / "dog" / "1.png"))
    expected = as_stored(corrupt_image(pixels, "fog", 5, image_seed(3, 4, "fog", 5)))
    assert np.array_equal(np.array(Image.open(out / "fog" / "5" / "dog" / "1.jpg")), expected)


def test_png_copies_are_lossless_and_images_are_resized_first(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos", count=1, side=80), tmp_path / "out"
    assert run(source, out, png=True, input_size=(32,), crop=1.0, corruptions=("contrast",), severities=(1,)) == 2
    resized = Image.open(source / "cat" / "0.png").resize((33, 32), Image.Resampling.BICUBIC).crop((0, 0, 32, 32))
    expected = corrupt_image(np.array(resized), "contrast", 1, 0)
    assert np.array_equal(np.array(Image.open(out / "contrast" / "1" / "cat" / "0.png")), expected)


def test_the_bytes_depend_neither_on_workers_nor_on_parts(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    run(source, tmp_path / "one")
    run(source, tmp_path / "two", num_workers=2)
    run(source, tmp_path / "parts", corruptions=("fog",))
    run(source, tmp_path / "parts", severities=(5,))
    run(source, tmp_path / "parts")
    expected = copies(tmp_path / "one")
    assert expected == copies(tmp_path / "two") == copies(tmp_path / "parts")
    manifests = [(tmp_path / name / MANIFEST_FILE).read_bytes() for name in ("one", "two", "parts")]
    assert manifests[0] == manifests[1] == manifests[2]
    assert verb("scan")([str(tmp_path / "one"), "--verify", "--num_workers", "0"]) == 0


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos", count=4, side=64), tmp_path / "out"
    command = [sys.executable, "-m", "mae_dat", "corrupt", str(source), "--output_dir", str(out), "--num_workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and len(list(out.glob("*/*/*/*.jpg"))) < 100:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 100 <= len(list(out.glob("*/*/*/*.jpg"))) < 75 * 8
    assert not (out / MANIFEST_FILE).exists()
    flags = {"corruptions": ("all",), "severities": (1, 2, 3, 4, 5), "seed": 0}
    assert run(source, out, **flags) == 75 * 8
    run(source, tmp_path / "whole", **flags)
    assert copies(out) == copies(tmp_path / "whole")
    lines = [json.loads(line) for line in (out / MANIFEST_FILE).read_text().splitlines()]
    assert {Path(line["path"]).parts[0] for line in lines} == set(CORRUPTIONS)


def test_an_interrupted_run_makes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two of six images; a file that was then cut off, as by a loss of power, is made again."""
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    made: list[int] = []
    original = CopyWriter.copies_of

    def stops(writer: CopyWriter, index: int, cells: object) -> object:
        if index == 2 and not made.count(-1):
            raise KeyboardInterrupt
        made.append(index)
        return original(writer, index, cells)  # type: ignore[arg-type]

    monkeypatch.setattr(CopyWriter, "copies_of", stops)
    with pytest.raises(KeyboardInterrupt):
        run(source, out)
    assert len(copies(out)) == 8
    (out / "fog" / "2" / "cat" / "1.jpg").write_bytes(b"cut off")
    made.append(-1)
    assert run(source, out) == 24
    assert made == [0, 1, -1, 1, 2, 3, 4, 5]
    run(source, tmp_path / "whole")
    assert copies(out) == copies(tmp_path / "whole")
    settings = json.loads((out / "corrupt.settings.json").read_text())
    assert settings["flags"]["seed"] == 3
    assert settings["versions"]["opencv-python-headless"]


def test_shards_hold_the_same_files(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    run(source, tmp_path / "files")
    assert run(source, out, shards=True, shard_mb=0.002) == 24
    shards = Shards(out / "fog" / "5", lambda image: image)  # type: ignore[arg-type, return-value]
    assert len(shards.index.shards) > 1
    assert (shards.classes, len(shards), shards.label(4)) == (["cat", "dog"], 6, 1)
    content, _ = shards.read_file(4)
    assert content == copies(tmp_path / "files")["fog/5/dog/1.jpg"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert run(source, out, shards=True, shard_mb=0.002) == 24
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    again = run(out / "fog" / "5", tmp_path / "twice", corruptions=("snow",))  # shards as the source
    assert again == 12
    assert sorted(copies(tmp_path / "twice"))[0] == "snow/2/cat/00000000.jpg"


def test_names_that_differ_in_their_suffix_stay_apart(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", count=1)
    noise(40, 40, seed=7).save(source / "cat" / "0.bmp")
    assert run(source, tmp_path / "out", corruptions=("fog",), severities=(1,)) == 3
    assert [*copies(tmp_path / "out")] == ["fog/1/cat/0.bmp.jpg", "fog/1/cat/0.png.jpg", "fog/1/dog/0.jpg"]


def test_other_settings_and_wrong_folders_are_errors_before_any_work(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "out"
    run(source, out)
    before = copies(out)
    with pytest.raises(OutputError, match=r"made in another way \(--seed 3, now 4\): choose a new --output_dir"):
        run(source, out, seed=4)
    noise(40, 40).save(source / "cat" / "9.png")
    with pytest.raises(OutputError, match="images 6, now 7"):
        run(source, out)
    assert copies(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="contains notes.txt: choose a new"):
        run(source, tmp_path / "full")
    with pytest.raises(OutputError, match="is inside of"):
        run(source, source / "corrupted")
    with pytest.raises(DataError, match="has the folders val: name one of them"):
        run(photos(tmp_path / "root" / "val").parent, tmp_path / "new")
    noise(20, 40).save(source / "cat" / "9.png")
    with pytest.raises(DataError, match="9.png: 40 x 20 px, and corruptions need 32 px a side"):
        run(source, tmp_path / "small")


def test_wrong_flags_are_errors() -> None:
    with pytest.raises(ConfigError, match="--corruptions fogg: did you mean fog"):
        corrupt_folder(CorruptConfig("x", corruptions=("fogg",)), QUIET)
    for flags, message in (
        ({"severities": (6,)}, "--severities 6: choose among 1"),
        ({"quality": 0}, "--quality must be from 1 to 100"),
        ({"corruptions": ()}, "--corruptions is empty"),
        ({"crop": 0.5}, "--crop 0.5: .* together with --input_size"),
    ):
        with pytest.raises(ConfigError, match=message):
            CorruptConfig("x", **flags)  # type: ignore[arg-type]


def test_jpeg_files_are_what_the_suite_of_generated_corruptions_sees() -> None:
    """A file of quality 85 decodes to `as_stored`, so that the stored set gives the counts of the generated one."""
    pixels = np.array(noise(40, 40))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    assert np.array_equal(np.array(Image.open(file)), as_stored(pixels))
