"""Archives that no one writes in good faith, torn ones, and an index that does not fit: nothing leaves the archive, and
what is not in order is refused by name."""

import contextlib
import errno
import io
import os
import random
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from mae_dat.config.errors import DataError, StorageError
from mae_dat.data import decode as decoding
from mae_dat.data.shards import index as shard_index
from mae_dat.data.shards.index import INDEX_FILE, build_index, read_index
from mae_dat.data.shards.reader import Shards

Make = Callable[[tarfile.TarFile], None]


def png(seed: int = 0, side: int = 12) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def entry(name: str, content: bytes | None = None, **how: object) -> Make:
    """Adds a member; `how` are fields of its header."""

    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        body = png() if content is None else content
        info.size = len(body)
        for key, value in how.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(body))

    return add


def link(name: str, kind: bytes, target: str) -> Make:
    return entry(name, b"", type=kind, linkname=target)


def raw(name: bytes, kind: bytes = b"0", size: bytes = b"%011o\0" % 0) -> bytes:
    """A header block, byte by byte."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[:512])
    block[:100] = name.ljust(100, b"\0")
    block[124:136], block[156:157] = size, kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def blocks(*parts: bytes) -> Make:
    def add(tar: tarfile.TarFile) -> None:
        for part in parts:
            tar.fileobj.write(part)  # type: ignore[union-attr]
            tar.offset += len(part)

    return add


def several(*parts: Make) -> Make:
    def add(tar: tarfile.TarFile) -> None:
        for part in parts:
            part(tar)

    return add


def base256(number: int) -> bytes:
    return bytes([0x80 if number >= 0 else 0xFF]) + (number % 256**11).to_bytes(11, "big")


def pax(**records: str) -> Make:
    return entry("a.png", pax_headers=records)


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png", "GNU.sparse.realsize": "9" * 13}
HOSTILE: dict[str, tuple[Make, str]] = {
    "absolute": (entry("/tmp/escaped.png"), "out of the archive"),
    "absolute, two slashes": (entry("//tmp/escaped.png"), "out of the archive"),
    "absolute folder": (entry("/escaped", b"", type=tarfile.DIRTYPE), "out of the archive"),
    "parent": (entry("../escaped.png"), "out of the archive"),
    "parent inside": (entry("a/../../escaped.png"), "out of the archive"),
    "parent at the end": (entry("a/..", b""), "out of the archive"),
    "parent folder": (entry("../escaped", b"", type=tarfile.DIRTYPE), "out of the archive"),
    "parent by a pax record": (pax(path="../escaped.png"), "out of the archive"),
    "parent by a long name": (entry("../" * 60 + "escaped.png"), "out of the archive"),
    "symlink out": (link("a.png", tarfile.SYMTYPE, "/etc/passwd"), "is not a file"),
    "symlink up": (link("a.png", tarfile.SYMTYPE, "../../x"), "is not a file"),
    "symlink to itself": (link("a.png", tarfile.SYMTYPE, "a.png"), "is not a file"),
    "symlinked folder": (link("a", tarfile.SYMTYPE, "/tmp"), "is not a file"),
    "hard link out": (link("a.png", tarfile.LNKTYPE, "/etc/passwd"), "is not a file"),
    "hard link": (link("a.png", tarfile.LNKTYPE, "b.png"), "is not a file"),
    "link by a pax record": (
        entry("a.png", b"", type=tarfile.SYMTYPE, pax_headers={"linkpath": "/etc/passwd"}),
        "is not a file",
    ),
    "character device": (entry("a.png", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "is not a file"),
    "block device": (entry("a.png", b"", type=tarfile.BLKTYPE, devmajor=8), "is not a file"),
    "pipe": (entry("a.png", b"", type=tarfile.FIFOTYPE), "is not a file"),
    "unknown kind": (blocks(raw(b"a.png", b"Z", b"%011o\0" % 0)), ""),
    "sparse": (blocks(raw(b"a.png", b"S")), "sparse"),
    "sparse terabyte by pax": (pax(**SPARSE), ""),
    "sparse by pax, old": (pax(**{"GNU.sparse.size": "9" * 13, "GNU.sparse.map": "0,1"}), "sparse"),
    "terabyte claimed": (blocks(raw(b"a.png", size=base256(1 << 40))), "torn|unexpected|allowed"),
    "eight exabytes claimed": (blocks(raw(b"a.png", size=base256((1 << 62) - 1))), ""),
    "pax size": (pax(size="99999999999"), ""),
    "negative size": (blocks(raw(b"a.png", size=base256(-512))), ""),
    "negative, back to the start": (blocks(raw(b"a.png", size=base256(-1536))), ""),
    "negative pax size": (pax(size="-1024"), ""),
    "terabyte of pax": (blocks(raw(b"x", b"x", base256(1 << 40))), "a header of"),
    "long name of gigabytes": (blocks(raw(b"x", b"L", base256(1 << 34)), bytes(1024)), "a header of"),
    "headers upon headers": (blocks(*[raw(b"x", b"L", b"%011o\0" % 4) + b"abc\0".ljust(512, b"\0")] * 3000), ""),
    "huge member": (blocks(raw(b"a.png", size=base256(1 << 29)), bytes(1 << 20)), ""),
    "occurs twice": (several(entry("b.png"), entry("b.png")), "occurs twice"),
    "twice, far apart": (several(entry("b.png"), entry("c.png"), entry("b.png")), "occurs twice"),
    "two images of one key": (several(entry("b.png"), entry("b.jpg")), "two images"),
    "NUL in the name": (pax(path="a\0.png"), "control"),
    "newline": (entry("a\n.png"), "control"),
    "terminal escape": (entry("a\x1b[2J.png"), "control"),
    "right to left": (entry("a\u202egnp.exe.png"), "control"),
    "zero width": (entry("a\u200b.png"), "control"),
    "not UTF-8": (blocks(raw(b"a\xff.png", size=b"%011o\0" % 0)), "undecodable"),
    "empty image": (entry("b.png", b""), "is empty"),
    "label of letters": (several(entry("b.png"), entry("b.cls", b"cat")), "no class number"),
    "negative label": (several(entry("b.png"), entry("b.cls", b"-3")), "no class number"),
    "huge label": (several(entry("b.png"), entry("b.cls", b"9" * 5000)), "no class number"),
    "deep json": (several(entry("b.png"), entry("b.json", b"[" * 900_000)), "no class number"),
    "huge json": (several(entry("b.png"), entry("b.json", b" " * (1 << 21))), "no class number"),
    "label true": (several(entry("b.png"), entry("b.json", b'{"label": true}')), "no class number"),
    "compressed": (blocks(b"\x1f\x8b" + bytes(600)), "damaged or incomplete"),
    "page of the web": (blocks(b"<!DOCTYPE html>".ljust(1024)), "damaged or incomplete"),
}


def archive(path: Path, *parts: Make) -> Path:
    """A folder with a shard of these members."""
    with tarfile.open(path / "x.tar", "w") as tar:
        for part in parts:
            part(tar)
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_and_nothing_leaves_it(case: str, tmp_path: Path) -> None:
    make, cause = HOSTILE[case]
    folder = tmp_path / "in" / "shards"
    folder.mkdir(parents=True)
    archive(folder, entry("0.png"), entry("0.cls", b"1"), make)
    before = sorted(tmp_path.rglob("*"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=cause or None) as caught:
        build_index(folder)
    assert str(folder / "x.tar") in str(caught.value)
    assert str(caught.value).isprintable(), "a name cannot write to the terminal"
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped.png").exists()
    assert not Path("/escaped").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10  # in KiB
    assert not (folder / INDEX_FILE).exists()


def test_there_are_as_many_as_promised() -> None:
    assert len(HOSTILE) >= 40


def test_what_is_odd_but_harmless_is_read(tmp_path: Path) -> None:
    """Folders, dot files, WebDataset's own entries and files of other kinds are passed over; case tells keys apart."""
    folders = [entry("./", b"", type=tarfile.DIRTYPE), entry("./a", b"", type=tarfile.DIRTYPE)]
    passed = [entry("__meta__", b"{}"), entry("a/._b.png", b"x"), entry("a/b.txt", b"words"), entry("c.cls", b"1")]
    pictures = [
        entry("./a/d.png", png(1)),
        entry("a/D.PNG", png(2)),
        entry("a/D.cls", b"1\n"),
        entry("ü" * 90 + ".png"),
    ]
    index = build_index(archive(tmp_path, *folders, *passed, *pictures))
    assert index.label.tolist() == [-1, 1, -1]
    index.write(tmp_path)
    images = Shards(tmp_path, to_tensor, labeled=False)
    assert [images.load_image(number).size for number in range(3)] == [(12, 12)] * 3


def test_too_many_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_index, "MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="more members than the 3 allowed"):
        build_index(archive(tmp_path, *[entry(f"{number}.png") for number in range(4)]))


def test_a_torn_archive_is_refused_wherever_it_is_torn(tmp_path: Path) -> None:
    path = archive(tmp_path, *[entry(f"{number}.png", png(number)) for number in range(4)]) / "x.tar"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in range(0, end, 97):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"x\.tar"):
            build_index(tmp_path)
    headers = [at for at in range(0, end, 512) if whole[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 4
    for at in headers:  # a damaged header must not look like the end
        path.write_bytes(whole[: at + 3] + b"?" + whole[at + 4 :])
        with pytest.raises(DataError, match="torn|not a readable tar archive"):
            build_index(tmp_path)
    path.write_bytes(whole)
    assert len(build_index(tmp_path).offset) == 4


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Two shards of three labeled images, with their index."""
    for number in range(2):
        parts = [(entry(f"{key}.png", png(3 * number + key)), entry(f"{key}.cls", b"%d" % key)) for key in range(3)]
        archive(tmp_path, *[one for pair in parts for one in pair])
        (tmp_path / "x.tar").rename(tmp_path / f"s{number}.tar")
    build_index(tmp_path, ["a", "b", "c"]).write(tmp_path)
    return tmp_path


def test_no_mutation_of_an_index_is_loaded(good: Path) -> None:
    path, chance = good / INDEX_FILE, random.Random(0)
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        kind = chance.randrange(4)
        if kind == 0:
            damaged = damaged[: chance.randrange(len(whole))]
        elif kind == 1:
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        elif kind == 2:
            start = chance.randrange(len(whole))
            damaged[start : start + 64] = bytes(len(damaged[start : start + 64]))
        else:
            damaged[chance.randrange(len(whole))] = chance.randrange(256)
        if damaged == whole:
            continue
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            found = read_index(good).sha256()
            path.write_bytes(whole)
            assert found == read_index(good).sha256(), "what is left is the same in every word and number"
            continue
        refused += 1
    assert refused > 250


def test_an_index_that_lies_is_refused(good: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    index = read_index(good)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for change in (
        {"offset": index.offset + 10_000},
        {"offset": index.offset * 0},
        {"size": index.size * 0},
        {"size": index.size + (1 << 40)},
        {"label": index.label + 1},
        {"label": index.label[:3]},
        {"classes": None},
        {"shards": [index.shards[0]]},
        {"shards": [index.shards[0], shard_index.Shard("../s1.tar", 10240, "", 3)]},
        {"shards": [index.shards[0], shard_index.Shard("s1.tar", 10240, "", -3)]},
        {"shards": [index.shards[0], shard_index.Shard("s1.tar", "10240", "", 3)]},  # type: ignore[arg-type]
        {"shards": [index.shards[0], shard_index.Shard("s1.tar", 10240, "", 10**30)]},
        {"shards": [index.shards[0], shard_index.Shard(["s1.tar"], 10240, "", 3)]},  # type: ignore[arg-type]
        {"offset": torch.full_like(index.offset, (1 << 63) - 1)},
        {"classes": [1, 2]},
        {"packed_size": "64"},
    ):
        shard_index.dataclasses.replace(index, **change).write(elsewhere)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="is inconsistent|damaged"):
            read_index(elsewhere)
    assert read_index(good).sha256() == index.sha256()


def test_shards_that_are_not_those_of_the_index_are_named(good: Path) -> None:
    first, second = (good / f"s{number}.tar" for number in range(2))
    whole = first.read_bytes()
    with first.open("r+b") as file:
        file.truncate(2048)
    with pytest.raises(DataError, match=r"s0\.tar has 2,048 bytes, the index says"):
        Shards(good, to_tensor)[0]
    shifted = whole[512:] + bytes(512)
    first.write_bytes(shifted)
    with pytest.raises(DataError, match=r"s0\.tar at byte \d+: (no member|the member has)"):
        Shards(good, to_tensor)[1]
    first.unlink()
    with pytest.raises(DataError, match=r"s0\.tar at byte 512: cannot be read \(No such file"):
        Shards(good, to_tensor)[0]
    images = Shards(good, to_tensor, on_bad="skip")
    assert [images[number]["index"] for number in range(6)] == [3, 3, 3, 3, 4, 5]
    assert second.exists()


def bomb() -> bytes:
    """An image of 400 megapixels in a few bytes."""
    content = io.BytesIO()
    Image.new("1", (8, 8)).save(content, "PNG")
    small = content.getvalue()
    header = b"IHDR" + struct.pack(">II", 20_000, 20_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


@pytest.mark.parametrize(
    ("content", "cause"), [(bomb(), "megapixels"), (b"<html>", "web page"), (png()[:100], "damaged or truncated")]
)
def test_a_bad_image_is_named_by_shard_and_member_or_skipped(content: bytes, cause: str, tmp_path: Path) -> None:
    archive(tmp_path, entry("k/0.png"), entry("k/bad.png", content), entry("k/2.png"))
    build_index(tmp_path).write(tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=rf"x\.tar, member 'k/bad\.png' at byte \d+: .*{cause}.*--on_bad skip"):
        Shards(tmp_path, to_tensor, labeled=False)[1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50 << 10
    sample = Shards(tmp_path, to_tensor, labeled=False, on_bad="skip")[1]
    assert (sample["index"], sample["skipped"]) == (2, 1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_server_that_comes_back_is_waited_for(
    number: int, good: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoding, "_PAUSE_S", 0.001)
    failing, read = [3], os.pread

    def pread(descriptor: int, count: int, offset: int) -> bytes:
        if failing[0]:
            failing[0] -= 1
            raise OSError(number, os.strerror(number))
        return read(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", pread)
    images = Shards(good, to_tensor, on_bad="skip")
    state = torch.get_rng_state()
    assert images[0]["skipped"] == 0
    assert caplog.text.count("trying again") == 3
    assert torch.equal(torch.get_rng_state(), state)
    failing[0] = 4
    with pytest.raises(StorageError, match=rf"s1\.tar at byte \d+: {os.strerror(number)}, 4 times in a row"):
        images[4]
