"""Shards: the order that reads them, the same samples as from a folder, packing, addresses, and training on them."""

import dataclasses
import itertools
import os
import re
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from built_suites import open_sources
from PIL import Image
from tiny_runs import draw_folder, finetune_in, one_thread, outcome_of, pretrain_in, verb  # noqa: F401 - one by itself
from torchvision.transforms.functional import to_tensor
from weights_server import Server, serving

from mae_dat.config.commands.pack import PackConfig
from mae_dat.config.errors import ConfigError, DataError, DownloadError, InterruptError, MissingInputError
from mae_dat.config.groups import DataConfig
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.data.image_set import ImageFolder, ImageSet
from mae_dat.data.loader import train_loader
from mae_dat.data.open import image_root, open_images, training_images
from mae_dat.data.sampler import TrainSampler
from mae_dat.data.shards import cache as shard_cache
from mae_dat.data.shards import reader as shards
from mae_dat.data.shards.index import build_index, read_index
from mae_dat.data.shards.pack import pack
from mae_dat.data.shards.reader import Shards, count_lanes, shard_order
from mae_dat.data.transforms import PretrainTransform
from mae_dat.runtime.console import Console
from mae_dat.training.finetune import validation_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "images", train=48, val=20, conflict=0)


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in shards of about six."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    pack(PackConfig(str(folder), str(out), shard_mb=0.015, num_workers=0), Console(quiet=True))
    return out


# ---- the order ----


@pytest.mark.parametrize(
    ("batch", "count", "expected"),
    [(4096, 1000, 64), (96, 1000, 32), (96, 3, 2), (7, 1000, 1), (64, 64, 64), (8, 1, 1)],
)
def test_lanes_divide_the_batch(batch: int, count: int, expected: int) -> None:
    assert count_lanes(batch, count) == expected
    assert batch % count_lanes(batch, count) == 0


@pytest.mark.parametrize("images", [[10] * 32, [7, 3, 12, 1, 30, 8, 8, 5, 9, 2, 40, 6], [50]])
@pytest.mark.parametrize("batch", [16, 12, 5])
def test_the_order_is_pure_and_takes_no_image_twice(images: list[int], batch: int) -> None:
    order = shard_order(images, seed=1, epoch=3, batch_size=batch)
    assert torch.equal(order, shard_order(images, 1, 3, batch))
    assert len(order) % batch == 0
    assert len(order.unique()) == len(order)
    assert 0 <= order.min() <= order.max() < sum(images)
    count = count_lanes(batch, len(images))
    assert len(order) > sum(images) - batch - count, "no more is dropped than a batch and the remainder of the lanes"
    assert not torch.equal(order, shard_order(images, 1, 4, batch))
    assert not torch.equal(order, shard_order(images, 2, 3, batch))


def shards_read(images: list[int], batch: int, rank: int, ranks: int) -> tuple[list[set[int]], list[list[int]]]:
    """Shards that a rank reads, by step, and the indices."""
    sampler = TrainSampler(
        sum(images), batch // ranks, rank, ranks, 0, 0, sum(images) // batch, 1, lambda *key: shard_order(images, *key)
    )
    ends = np.cumsum(images)
    taken = [[index for _, index in part] for part in sampler]
    return [set(np.searchsorted(ends, part, side="right").tolist()) for part in taken], taken


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_read_different_shards_of_the_same_batches(ranks: int) -> None:
    images, batch = [20] * 64, 64
    _, whole = shards_read(images, batch, 0, 1)
    parts = [shards_read(images, batch, rank, ranks) for rank in range(ranks)]
    assert [[*itertools.chain(*step)] for step in zip(*(taken for _, taken in parts), strict=True)] == whole
    read = [set().union(*steps) for steps, _ in parts]
    assert sum(map(len, read)) == len(set().union(*read)) == 64, "each shard belongs to one rank"
    # At any time a rank reads one shard a lane: what it has read from, it reads to the end.
    for steps, _ in parts:
        assert max(map(len, steps)) == 64 // ranks
        assert all(not (set(early) & set(late)) for early, late in zip(steps, steps[20:], strict=False))


def test_unequal_shards_are_shared_at_the_cuts_alone() -> None:
    images = [int(one) for one in np.random.default_rng(0).integers(5, 60, 100)]
    for ranks in (2, 4, 16):
        read = [set().union(*shards_read(images, 64, rank, ranks)[0]) for rank in range(ranks)]
        assert sum(map(len, read)) - len(set().union(*read)) <= ranks - 1


# ---- the samples ----


def content(images: ImageSet) -> dict[bytes, str]:
    """Class by pixels."""
    return {images.load_image(index).tobytes(): images.classes[images.label(index)] for index in range(len(images))}


def test_shards_hold_what_the_folder_holds(folder: Path, packed: Path) -> None:
    for split in ("train", "val"):
        there, here = ImageFolder(folder / split, to_tensor), open_images(packed / split, to_tensor)
        assert isinstance(here, Shards)
        assert len(here.index.shards) > 2
        assert here.classes == there.classes
        assert content(here) == content(there)
        assert not torch.equal(here.labels, here.labels.sort().values), "in random order"
    sample = open_images(packed / "val", to_tensor, labeled=False)[3]
    assert (sample["label"], sample["index"], sample["skipped"]) == (-1, 3, 0)
    assert sample["image"].shape == (3, 32, 32)


def test_given_classes_fix_the_labels(packed: Path) -> None:
    names = Shards(packed / "val", to_tensor).classes
    other = Shards(packed / "val", to_tensor, classes=["extra", *reversed(names)])
    plain = Shards(packed / "val", to_tensor)
    assert [other.classes[other.label(index)] for index in range(20)] == [
        names[plain.label(index)] for index in range(20)
    ]
    with pytest.raises(DataError, match=f"unknown to training: {names[0]}"):
        Shards(packed / "val", to_tensor, classes=names[1:])


def batches(root: Path, num_workers: int, start: int = 0, ranks: int = 1, rank: int = 0) -> list[Any]:
    images = Shards(root, PretrainTransform((16, 16)), seed=1)
    sampler = TrainSampler(len(images), 8 // ranks, rank, ranks, 1, start, 10, 1, images.order)
    return list(train_loader(images, sampler, num_workers))


def same(left: list[Any], right: list[Any]) -> bool:
    return all(torch.equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a)


def test_samples_do_not_depend_on_workers_resuming_or_ranks(packed: Path) -> None:
    first = batches(packed / "train", 0)
    assert same(first, batches(packed / "train", 2))
    assert same(first[4:], batches(packed / "train", 0, start=4))
    halves = [batches(packed / "train", 0, ranks=2, rank=rank) for rank in (0, 1)]
    joined = [{key: torch.cat([a[key], b[key]]) for key in a} for a, b in zip(*halves, strict=True)]
    assert same(first, joined)


def test_files_stay_open_but_not_too_many(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    images = Shards(packed / "train", to_tensor)
    for index in range(len(images)):
        images[index]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del images
    assert len(os.listdir("/proc/self/fd")) == before


# ---- together with webdataset ----


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # it leaves shards for the collector to close
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_our_shards(packed: Path) -> None:
    import webdataset

    index = read_index(packed / "train")
    urls = [str(packed / "train" / shard.name) for shard in index.shards]
    stream = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    ours = Shards(packed / "train", to_tensor)
    found = list(stream)
    assert len(found) == len(ours) == 48
    for number, sample in enumerate(found):
        assert sample["cls"] == ours.label(number)
        assert np.array_equal(sample["png"], np.asarray(ours.load_image(number)))


def test_webdatasets_shards_are_read_with_names_from_a_list(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import webdataset

    there = ImageFolder(folder / "val", to_tensor)
    (tmp_path / "val").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "val" / "x-%03d.tar"), maxcount=8, verbose=0) as writer:
        for index, (path, label) in enumerate(there.samples):
            image = {"png" if index % 2 else "PNG": Path(path).read_bytes()}
            number = {"json": {"label": label, "text": "an image"}} if index % 3 else {"cls": label}
            writer.write({"__key__": f"{'long/' * 20}a{index:04d}", "txt": "words", **image, **number})
    with pytest.raises(MissingInputError, match=r"without their index: mae-dat pack --index"):
        open_images(tmp_path / "val", to_tensor)
    (tmp_path / "names.txt").write_text("\n".join(there.classes))
    verb("pack")(["--index", str(tmp_path), "--classes", str(tmp_path / "names.txt")])
    assert "val: 20 images of 10 classes in 3 shards" in (told := capsys.readouterr().out)
    assert told.endswith(f"--data_path {tmp_path}\n")
    here = open_images(tmp_path / "val", to_tensor)
    assert content(here) == content(there)
    assert re.search(r"x-000\.tar, member 'long/.* at byte \d+", here.name_of(3))
    assert build_index(tmp_path / "val").classes == [str(number) for number in range(10)]


# ---- packing ----


def test_packing_shrinks_checks_and_says_what_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "photos", tmp_path / "out"
    source.mkdir()
    for number, (width, height) in enumerate([(90, 60), (40, 200), (10, 10)]):
        Image.new("RGB", (width, height), (number * 100, 50, 50)).save(source / f"odd näme {number}.png")
    (source / "bad.jpg").write_bytes(b"<html>")
    given = [str(source), str(out), "--size", "20", "--num_workers", "1"]
    failed = outcome_of(verb("pack"), given, monkeypatch, capsys)
    assert failed.code == 65
    assert "bad.jpg: it is a web page" in failed.stderr
    assert not list(out.glob("*.tar"))
    verb("pack")([*given, "--on_bad", "skip"])
    told = capsys.readouterr()
    assert "3 images in 1 shard," in told.out
    assert f"  mae-dat pretrain --data_path {out}" in told.out
    assert "left out" in told.err
    images = open_images(image_root(str(out)), to_tensor, labeled=False)
    assert sorted(images.load_image(index).size for index in range(3)) == [(10, 10), (20, 100), (30, 20)]
    assert images.packed_size == 20
    with pytest.raises(DataError, match="pretraining only"):
        open_images(out, to_tensor)
    again = outcome_of(verb("pack"), given, monkeypatch, capsys)
    assert again.code == 73
    assert "contains shards already" in again.stderr


def test_images_that_were_shrunk_too_much_are_told_of(
    folder: Path, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "small"
    pack(PackConfig(str(folder), str(out), size=24, num_workers=0), Console(quiet=True))
    index = read_index(out / "val")
    assert index.sha256() != dataclasses.replace(index, packed_size=None).sha256()
    for root, size, told in ((packed, 32, False), (out, 24, False), (out, 32, True)):
        caplog.clear()
        training_images(DataConfig(data_path=str(root), input_size=(size,)), to_tensor, seed=0, labeled=True)
        assert (f"packed with --size 24, which --input_size {size} enlarges" in caplog.text) == told
    caplog.clear()
    given = ["--data_path", str(out), "--input_size", "24"]
    assert validation_images(load_config(FinetuneConfig, given).data).packed_size == 24
    assert "shrunk to 24 px and stored anew" in caplog.text
    clean = open_sources(out).image_sets("clean")[0]
    assert clean.protocol["folder"] == "shards, shrunk to 24 px"


@pytest.mark.parametrize(
    "given", [[], ["a"], ["a", "b", "--index", "c"], ["a", "b", "--size", "0"], ["--index", "nowhere"]]
)
def test_packing_refuses_flags_that_cannot_work(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome_of(verb("pack"), given, monkeypatch, capsys).code == 64


# ---- training ----


class Reads:
    """What a run reads of its training images; at the n-th this process gets a scheduler's signal."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> None:
        self.indices: list[int] = []
        read = Shards.read_file

        def file(images: Shards, index: int) -> tuple[bytes, str]:
            if images.root.endswith("train"):
                self.indices.append(index)
                if len(self.indices) == stop_at:
                    os.kill(os.getpid(), signal.SIGUSR1)
            return read(images, index)

        monkeypatch.setattr(Shards, "read_file", file)


@pytest.mark.parametrize(("train", "shown"), [(pretrain_in, 6), (finetune_in, 0)])
def test_a_run_from_shards_goes_on_as_if_nothing_had_happened(
    train: Callable[..., Any], shown: int, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--epochs", "2", "--batch_size", "4", "--accum_iter", "2"]
    with monkeypatch.context() as patch:
        reads = Reads(patch)
        train(tmp_path / "whole", packed, *flags)
    images = Shards(packed / "train", to_tensor)
    expected = torch.cat([images.order(seed=0, epoch=epoch, batch_size=8) for epoch in (0, 1)])
    assert reads.indices[shown:] == expected.tolist()
    with monkeypatch.context() as patch:
        Reads(patch, stop_at=shown + 70)  # in the middle of the second epoch
        with pytest.raises(InterruptError):
            train(tmp_path / "parts", packed, *flags)
    train(tmp_path / "parts", packed, *flags)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


# ---- addresses ----


@pytest.fixture
def server(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The shards over http, and a cache of their own."""
    monkeypatch.setenv("MAE_DAT_HOME", str(tmp_path / "home"))
    with serving() as running:
        for path in packed.rglob("*.*"):
            running.page(f"/data/{path.relative_to(packed)}", path.read_bytes())
        yield running


def test_shards_come_from_a_server_once_and_the_cache_stays_small(
    server: Server, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_root(f"{server.url}/data/")
    far, near = Shards(root / "train", to_tensor), Shards(packed / "train", to_tensor)
    assert content(far) == content(near)
    asked = len(server.requests)
    assert content(Shards(image_root(f"{server.url}/data") / "train", to_tensor)) == content(near)
    assert len(server.requests) == asked, "all is here"
    largest = max(shard.bytes for shard in far.index.shards)
    monkeypatch.setenv("MAE_DAT_SHARDS_GB", str(3 * largest / 1e9))
    assert content(Shards(root / "val", to_tensor)) == content(Shards(packed / "val", to_tensor))
    assert sum(path.stat().st_size for path in shard_cache.cache_folder().rglob("*.tar")) <= 3 * largest
    assert content(far) == content(near), "what was open stays readable, what is gone comes back"


@pytest.mark.parametrize("content", [b"", b"<html>busy</html>", b"\x10" + bytes(40), b"{}"])
def test_a_bad_download_of_an_index_does_not_stay_in_the_cache(
    content: bytes, server: Server, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = server.pages["/data/train/index.safetensors"]
    good, page.content = page.content, content
    root = image_root(f"{server.url}/data")  # of the other split
    assert not (root / "train").exists()
    page.content = good
    root = image_root(f"{server.url}/data")
    assert len(Shards(root / "train", to_tensor)) == len(Shards(packed / "train", to_tensor))
    (root / "train" / "index.safetensors").write_bytes(content)  # as an earlier release may have left it
    image_root(f"{server.url}/data")
    assert "Downloading it again" in caplog.text
    assert (root / "train" / "index.safetensors").read_bytes() == good


def test_an_index_that_never_ends_is_not_stored(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_cache, "_LARGEST_INDEX", 10_000)
    for split in ("train", "val"):
        server.page(f"/data/{split}/index.safetensors", bytes(2_000_000))
    with pytest.raises(DownloadError, match="more than the 10,000 bytes allowed"):
        image_root(f"{server.url}/data")
    assert not [path for path in shard_cache.cache_folder().rglob("*") if path.is_file()]


def test_a_shard_that_is_not_the_indexs_is_refused(server: Server) -> None:
    root = image_root(f"{server.url}/data")
    images = Shards(root / "train", to_tensor)
    page = server.pages[f"/data/train/{images.index.shards[0].name}"]
    page.content = bytes([page.content[0] ^ 1]) + page.content[1:]
    with pytest.raises(DataError, match="not the shard of the index"):
        images.load_image(0)
    assert not list(root.rglob("*.tar"))
    server.pages.pop(f"/data/train/{images.index.shards[1].name}")
    with pytest.raises(DownloadError, match="HTTP 404"):
        images.load_image(images.index.shards[0].images)


def test_other_stores_are_read_through_webdataset(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gsutil cat gs://...` is a program on the path; here one that reads from the folder."""
    program = tmp_path / "bin" / "gsutil"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec cat "{packed}${{2#gs://bucket}}"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("MAE_DAT_HOME", str(tmp_path / "home"))
    root = image_root("gs://bucket")
    assert content(Shards(root / "val", to_tensor)) == content(Shards(packed / "val", to_tensor))
    with pytest.raises(DownloadError, match="no index of shards"):
        image_root("gs://bucket/nothing")


@pytest.mark.parametrize("address", ["pipe:touch executed", "s3://bucket", "file:///etc", "pipe://touch executed"])
def test_other_addresses_are_refused(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAE_DAT_HOME", str(tmp_path / "home"))
    with pytest.raises(ConfigError, match="shards are read from https://"):
        image_root(address)
    assert not list(tmp_path.iterdir())


def test_a_server_without_shards_is_named(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(DownloadError, match="(?s)has no index of shards.*HTTP 404"):
            image_root(f"{server.url}/nothing")
    assert not list((tmp_path / "home").rglob("train")), "no empty split is left behind"
