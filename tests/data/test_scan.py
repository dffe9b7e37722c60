"""A scan finds every kind of bad image and, by its manifest, every flipped bit; shards are held against their
index."""

import contextlib
import io
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_runs import verb

from mae_dat.config.commands.pack import PackConfig
from mae_dat.config.commands.scan import ScanConfig
from mae_dat.config.errors import DataError, MissingInputError, OutputError, StorageError
from mae_dat.data import scan
from mae_dat.data.shards.pack import pack
from mae_dat.runtime.console import Console

QUIET = Console(quiet=True)


def picture(seed: int, kind: str = "JPEG", side: int = 40, **options: object) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, kind, **options)
    return content.getvalue()


def header_of(width: int, height: int) -> bytes:
    """A PNG that claims this size."""
    content = io.BytesIO()
    Image.new("1", (8, 8)).save(content, "PNG")
    small = content.getvalue()
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def saved(array: np.ndarray, kind: str) -> bytes:
    content = io.BytesIO()
    Image.fromarray(array).save(content, kind)
    return content.getvalue()


BAD = {
    "empty.jpg": b"",
    "html.jpg": b"<!DOCTYPE html><p>404",
    "xml.jpg": b'<?xml version="1.0"?><Error>AccessDenied</Error>',
    "json.jpg": b'{"error": 404}',
    "text.png": b"not an image",
    "zeros.jpg": bytes(5000),
    "lfs.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "cut.jpg": picture(1)[:900],
    "cut late.jpg": picture(2)[:-200],
    "cut.png": picture(3, "PNG")[:2000],
    "cut.webp": picture(4, "WEBP", lossless=True)[:1500],
    "cut.bmp": picture(5, "BMP")[:2000],
    "cut.tif": picture(6, "TIFF")[:2000],
    "cut.ppm": picture(7, "PPM")[:2000],
    "head only.jpg": picture(8)[:20],
    "zeroed.png": picture(9, "PNG")[:1000] + bytes(4096),
    "float.tif": saved(np.zeros((4, 4), np.float32), "TIFF"),
    "deep.tif": saved(np.full((4, 4), 70_000, np.int32), "TIFF"),
    "animated.webp": picture(10, "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 40))]),
    "bomb.png": header_of(20_000, 5_001),
    "bomb above PIL's.png": header_of(20_000, 20_000),
    "nothing to decode.png": header_of(0, 8),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty good images and one of every bad kind."""
    for number in range(60):
        path = tmp_path / "images" / f"class{number % 3}" / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, quality=80))
    for name, content in BAD.items():
        (tmp_path / "images" / "class1" / name).write_bytes(content)
    return tmp_path / "images"


def test_every_kind_of_bad_image_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), "--num_workers", "2"]
    with pytest.raises(DataError, match=f"has {len(BAD)} faults"):
        verb("scan")(arguments)
    told = capsys.readouterr().out
    assert [name for name in BAD if f"/{name}: " not in told] == []
    assert f"{60 + len(BAD)} images, {len(BAD)} faults" in told
    assert len((folder / "manifest.jsonl").read_text().splitlines()) == 60
    for name in BAD:
        (folder / "class1" / name).unlink()
    verb("scan")(arguments)
    assert "60 images, 0 faults" in capsys.readouterr().out


def test_every_flipped_bit_is_found(folder: Path) -> None:
    for name in BAD:
        (folder / "class1" / name).unlink()
    config = ScanConfig(str(folder), num_workers=0)
    assert scan.scan(config, QUIET) == (60, [])
    assert scan.verify_manifest(config, QUIET) == (60, [])
    chance, paths = random.Random(0), sorted(folder.rglob("*.jpg"))
    silent = 0
    for number in range(300):
        path = paths[number % 60]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):  # what decoding alone would have seen
            scan.manifest_entry(folder, str(path.relative_to(folder)))
            silent += 1
        if number % 60 == 59:  # all sixty are damaged now
            assert len(scan.verify_manifest(config, QUIET)[1]) == 60
            assert all("not the file that was scanned" in fault for fault in scan.verify_manifest(config, QUIET)[1])
            for seed, one in enumerate(sorted(folder.rglob("*.jpg"), key=lambda path: path.name)):
                one.write_bytes(picture(seed, quality=80))
            assert scan.verify_manifest(config, QUIET) == (60, [])
    assert silent > 200, "decoding alone would not have seen them"


def test_a_place_that_takes_no_manifest_is_told_before_anything_is_decoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "map_in_workers", lambda *_: pytest.fail("it decodes"))
    with pytest.raises(OutputError, match=r"/proc/nobody: .* Choose another place with --manifest FILE\."):
        scan.scan(ScanConfig(str(folder), manifest="/proc/nobody/manifest.jsonl"), QUIET)


def test_files_that_are_gone_or_new_are_named(folder: Path) -> None:
    config = ScanConfig(str(folder), verify=True, num_workers=0)
    with pytest.raises(MissingInputError, match="no such manifest"):
        scan.verify_manifest(config, QUIET)
    scan.scan(config, QUIET)
    for name in BAD:
        (folder / "class1" / name).unlink()
    (folder / "class0" / "00.jpg").unlink()
    (folder / "class2" / "new.jpg").write_bytes(picture(0))
    faults = scan.verify_manifest(config, QUIET)[1]
    assert len(faults) == 2
    assert "00.jpg: cannot be read (No such file" in faults[0]
    assert "new.jpg: not in" in faults[1]
    manifest = folder / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"manifest.jsonl, line 60, is damaged"):
        scan.verify_manifest(config, QUIET)


def test_a_disk_that_stays_away_is_no_bad_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mae_dat.data import decode as decoding

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(decoding, "_PAUSE_S", 0.0)
    monkeypatch.setattr(decoding, "open", broken, raising=False)
    with pytest.raises(StorageError, match="4 times in a row"):
        scan.scan(ScanConfig(str(folder), num_workers=1), QUIET)
    assert not (folder / "manifest.jsonl").exists()


def test_shards_are_held_against_their_index(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(folder, tmp_path / "source" / "train")
    for name in BAD:
        (tmp_path / "source" / "train" / "class1" / name).unlink()
    pack(PackConfig(str(tmp_path / "source"), str(tmp_path / "out"), shard_mb=0.05, num_workers=0), QUIET)
    arguments = [str(tmp_path / "out"), "--num_workers", "0"]
    verb("scan")(arguments)
    assert "60 images, 0 faults" in capsys.readouterr().out
    shard = sorted((tmp_path / "out" / "train").glob("*.tar"))[1]
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="has 1 fault,"):
        verb("scan")(arguments)
    assert f"{shard}: not the file of the index" in capsys.readouterr().out
