"""Stored adversaries: files hold what the attack made, an attack resumes to the same bytes, stale ones are refused."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import exit_codes, start_ranks
from tiny_runs import draw_folder, finetune_in, one_thread, pretrain_in

from mae_dat.attacks import attack_folder as command
from mae_dat.attacks.attack_folder import attack_folder
from mae_dat.attacks.teacher import Teacher
from mae_dat.config.commands.attack import AttackFolderConfig
from mae_dat.config.errors import CheckpointError, ConfigError, DataError, MissingInputError
from mae_dat.data.adversaries import StoredAttack, StoredPairs, image_names, stored_name
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.transforms import finetune_transform
from mae_dat.models.classifier import Classifier
from mae_dat.models.tokenizer import load_tokenizer
from mae_dat.runtime.console import Console

__all__ = ["one_thread"]  # the fixture


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "images", train=12, val=10, conflict=0)


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("teacher") / "run"
    finetune_in(output, data)
    return output


def attack(output: Path, data: Path, teacher: Path, **flags: object) -> StoredAttack:
    values = {"checkpoint": str(teacher), "data_path": str(data), "output_dir": str(output), "num_workers": 0, **flags}
    return attack_folder(AttackFolderConfig.from_flags(**values), Console(quiet=True))


@pytest.fixture(scope="module")
def adversaries(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("adversaries") / "adv"
    attack(output, data, teacher, kind="random", share=0.25, size=32, variants=2)
    return output


def digests(folder: Path) -> dict[str, str]:
    """The content of all images, words and rows."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".jpg", ".jsonl", ".tar")]
    found = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    for path in folder.glob("words/*.npz"):  # a zip holds the time of writing
        words = np.load(path)
        found[path.name] = hashlib.sha256(b"".join(words[key].tobytes() for key in sorted(words))).hexdigest()
    return found


# ---- what is written ----


def test_words_images_and_rows_agree(adversaries: Path, data: Path) -> None:
    record = StoredAttack.read(adversaries)
    assert record.complete
    assert (record.images, record.variants) == (12, 2)
    tokenizer, images = load_tokenizer(), ImageFolder(data / "train", lambda image: torch.zeros(0))
    words = np.load(adversaries / "words" / "00000.npz")
    rows = [json.loads(line) for line in (adversaries / "images.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    for row in rows:
        stored = words[str(row["index"])][row["variant"]]
        assert (stored.dtype, stored.shape) == (np.uint16, (8, 8))
        clean = np.array(Image.open(images.name_of(row["index"])).convert("RGB"))
        encoded = tokenizer.encode(torch.from_numpy(clean).permute(2, 0, 1)[None] / 255)[0].numpy()
        assert (encoded != stored).sum() == 16  # 25 % of 64 words
        assert row["changed_words"] == 0.25
        path = adversaries / f"variant-{row['variant']}" / stored_name(row["image"])
        decoded = tokenizer.decode(torch.from_numpy(stored.astype(np.int64))[None])[0].permute(1, 2, 0).numpy()
        difference = np.array(Image.open(path)) / 255 - decoded
        assert abs(difference).mean() < 0.01  # JPEG at quality 95
    assert record.means["changed_words"] == pytest.approx(0.25)
    assert (adversaries / "examples.png").is_file()


def test_stored_names_do_not_meet() -> None:
    """A name that is no JPEG keeps its suffix, so a.png and a.jpg have files of their own."""
    assert stored_name("cat/a.png") == "cat/a.png.jpg"
    assert stored_name("cat/a.JPG") == "cat/a.JPG"


def test_codebooks_beyond_two_bytes_are_refused(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "MAX_STORED_WORDS", 100)  # the embedded tokenizer has 512
    with pytest.raises(ConfigError, match="has 512 words; stored words have two bytes"):
        attack(tmp_path / "adv", data, teacher)


def test_variants_differ(adversaries: Path) -> None:
    for values in np.load(adversaries / "words" / "00000.npz").values():
        assert (values[0] != values[1]).any()


def test_the_teacher_loses_on_its_adversaries(tmp_path: Path, data: Path) -> None:
    """The trained classifier of the demo, at its own size: symbolic words raise its loss, random ones less."""
    losses = {}
    for kind in ("reconstruction", "random", "symbolic"):
        record = attack(tmp_path / kind, data, "mae_dat_demo", kind=kind, share=0.1)  # type: ignore[arg-type]
        losses[kind] = record.means["loss_adversarial"]
    assert losses["symbolic"] > losses["random"] + 0.2
    assert losses["symbolic"] > losses["reconstruction"] + 0.2


def test_released_holds_its_share(tmp_path: Path, data: Path, teacher: Path) -> None:
    record = attack(tmp_path / "adv", data, teacher, share=0.1, size=32)
    assert record.means["changed_words"] == pytest.approx(0.1, abs=0.02)


def test_shards_hold_the_images_of_the_folder(tmp_path: Path, data: Path, teacher: Path, adversaries: Path) -> None:
    pytest.importorskip("webdataset")
    shards = tmp_path / "adv"
    attack(shards, data, teacher, kind="random", share=0.25, size=32, variants=2, shards=True)
    images = ImageFolder(data / "train", lambda image: torch.zeros(0))
    files, tars = StoredPairs(images, adversaries), StoredPairs(images, shards)
    for index, name in enumerate(image_names(images)):
        for variant in range(2):
            expected = np.array(Image.open(adversaries / f"variant-{variant}" / stored_name(name)))
            assert np.array_equal(tars.variants[variant].load_pixels(index), expected)
            assert np.array_equal(files.variants[variant].load_pixels(index), expected)


# ---- interrupted and shared work ----


def test_an_interrupted_attack_resumes_to_the_same_bytes(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "CHUNK", 5)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = {"eps": 1.0, "size": 32, "batch_size": 3}
    attack(whole, data, teacher, **flags)
    attack(resumed, data, teacher, **flags)
    record = json.loads((resumed / "attack.json").read_text())
    (resumed / "attack.json").write_text(json.dumps({**record, "complete": False, "means": {}}))
    for lost in ("parts/00001.jsonl", "words/00001.npz", "images.jsonl"):
        (resumed / lost).unlink()
    kept = (resumed / "parts" / "00000.jsonl").stat().st_mtime_ns
    with pytest.raises(DataError, match="not complete"):
        StoredPairs(ImageFolder(data / "train", lambda image: torch.zeros(0)), resumed)
    attack(resumed, data, teacher, **flags)
    assert (resumed / "parts" / "00000.jsonl").stat().st_mtime_ns == kept
    assert digests(resumed) == digests(whole)


def attack_on_rank(rank: int, output: Path, data: Path, teacher: Path) -> None:
    command.CHUNK = 5
    attack(output, data, teacher, eps=1.0, size=32, batch_size=3)


def test_two_ranks_write_the_bytes_of_one(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "CHUNK", 5)
    attack(tmp_path / "one", data, teacher, eps=1.0, size=32, batch_size=3)
    ranks = start_ranks(2, attack_on_rank, tmp_path / "two", data, teacher, log=tmp_path / "log")
    assert exit_codes(ranks, 300) == [0, 0], (tmp_path / "log-0").read_text() + (tmp_path / "log-1").read_text()
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


def test_other_settings_do_not_resume(adversaries: Path, data: Path, teacher: Path) -> None:
    before = digests(adversaries)
    with pytest.raises(ConfigError, match="share was 0.25, now it is 0.5"):
        attack(adversaries, data, teacher, kind="random", share=0.5, size=32, variants=2)
    assert digests(adversaries) == before


# ---- training on them ----


def test_a_training_uses_both_views(tmp_path: Path, data: Path, adversaries: Path) -> None:
    scores = finetune_in(tmp_path / "run", data, "--dat", f"stored:{adversaries}", "--epochs", "2")
    assert 0 <= scores["test_acc1"] <= 100
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.txt").read_text().splitlines()]
    for row in rows:
        total = row["train_loss_clean"] + row["train_loss_adversarial"]
        assert row["train_loss"] == pytest.approx(total, rel=1e-4)
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert "25.0 % of the words changed, 2 variants" in inputs["rows"]["adversary"]


def test_a_pretraining_uses_both_views(tmp_path: Path, data: Path, adversaries: Path) -> None:
    output = pretrain_in(tmp_path / "run", data, "--dat", f"stored:{adversaries}")
    row = json.loads((output / "log.txt").read_text().splitlines()[-1])
    assert row["train_loss"] == pytest.approx(row["train_loss_clean"] + row["train_loss_adversarial"], rel=1e-4)


def test_a_teacher_in_training(tmp_path: Path, data: Path, teacher: Path, adversaries: Path) -> None:
    flags = ["--dat", f"stored:{adversaries}", "--teacher", str(teacher), "--teacher_temperature", "2"]
    finetune_in(tmp_path / "run", data, *flags)
    row = json.loads((tmp_path / "run" / "log.txt").read_text().splitlines()[-1])
    assert row["train_loss_teacher"] >= 0


# ---- what is refused ----


def pairs(root: Path, adversaries: Path) -> StoredPairs:
    return StoredPairs(ImageFolder(root / "train", finetune_transform((32, 32))), adversaries)


def test_adversaries_of_other_images(tmp_path: Path, data: Path, adversaries: Path) -> None:
    other = tmp_path / "images"
    shutil.copytree(data, other)
    pairs(other, adversaries)  # a copy has the same content
    victim = next((other / "train").rglob("*.png"))
    victim.rename(victim.with_name("renamed.png"))
    with pytest.raises(DataError, match=r"was made from other images .* 12 of them, here are 12; only"):
        pairs(other, adversaries)
    victim.with_name("renamed.png").unlink()
    with pytest.raises(DataError, match="here are 11"):
        pairs(other, adversaries)


def test_changed_images(tmp_path: Path, data: Path, adversaries: Path) -> None:
    other = tmp_path / "images"
    shutil.copytree(data, other)
    content = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(content, "PNG")
    next((other / "train").rglob("*.png")).write_bytes(content.getvalue())
    with pytest.raises(DataError, match="were changed after"):
        pairs(other, adversaries)


def test_folders_that_are_no_adversaries(tmp_path: Path, data: Path, adversaries: Path) -> None:
    with pytest.raises(MissingInputError, match="does not exist"):
        pairs(data, tmp_path / "nowhere")
    with pytest.raises(MissingInputError, match="has no stored adversaries"):
        pairs(data, data)
    damaged = tmp_path / "adv"
    shutil.copytree(adversaries, damaged)
    text = (damaged / "attack.json").read_text()
    for content in (text[: len(text) // 2], "[]", text.replace('"images": 12', '"images": "many"'), "\0"):
        (damaged / "attack.json").write_text(content)
        with pytest.raises(DataError, match="is no record of an attack"):
            pairs(data, damaged)
    (damaged / "attack.json").write_text(text)
    shutil.rmtree(damaged / "variant-1")
    with pytest.raises(DataError, match="variant-1 does not hold"):
        pairs(data, damaged)


def test_teachers_and_tokenizers_that_do_not_fit(tmp_path: Path, data: Path, teacher: Path) -> None:
    with pytest.raises(CheckpointError):
        attack(tmp_path / "one", data, teacher, tokenizer=str(teacher / "model.safetensors"))
    other = tmp_path / "other"
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            (other / split / name).mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (32, 32), (20 * number, 9, 9)).save(other / split / name / f"{number}.png")
    with pytest.raises(DataError, match="cat"):
        attack(tmp_path / "two", other, teacher)
    with pytest.raises(DataError, match="--teacher .* does not know the class 'cat' and 1 more"):
        finetune_in(tmp_path / "three", other, "--teacher", str(teacher))


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"kind": "symbolic", "variants": 2}, "draws nothing at random"),
        ({"share": 1.5}, "--share must lie between 0 and 1"),
        ({"kind": "random", "eps": 0.1}, "--eps is for"),
        ({"quality": 0}, "--quality"),
    ],
)
def test_wrong_flags(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackFolderConfig.from_flags(checkpoint="x", **flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dat_jsd", "1"], "needs the reconstruction"),
        (["--adversary_ramp", "1"], "do not go with stored"),
        (["--at", "pgd"], "give one of them"),
    ],
)
def test_flags_that_do_not_go_with_stored_adversaries(
    tmp_path: Path, data: Path, adversaries: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune_in(tmp_path / "run", data, "--dat", f"stored:{adversaries}", *flags)


# ---- the teacher ----


class MeanColor(torch.nn.Module):
    """Logits that are the mean of each channel: of two crops of a two-colored image each sees one half."""

    num_classes = 3

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return 10 * image.mean((2, 3))


def test_crops_cover_an_image_of_any_shape() -> None:
    teacher = Teacher(Classifier(MeanColor(), (0.0,) * 3, (1.0,) * 3), (8, 8))
    for height, width, count in ((8, 8, 1), (16, 16, 1), (8, 20, 3), (40, 16, 3), (4, 4, 1), (8, 9, 2)):
        crops = teacher.covering_crops(torch.rand(2, 3, height, width))
        assert crops.shape == (count, 2, 3, 8, 8)
    red_then_green = torch.zeros(1, 3, 8, 16)
    red_then_green[:, 0, :, :8] = red_then_green[:, 1, :, 8:] = 1
    loss, is_right = teacher.predict(red_then_green, torch.tensor([0]))
    near, far = (-torch.log_softmax(torch.tensor([10.0, 0, 0]), 0)[label] for label in (0, 1))
    assert loss.item() == pytest.approx(float(near + far) / 2, rel=1e-5)
    assert teacher.loss(torch.tensor([0]))(red_then_green).item() == pytest.approx(loss.item(), rel=1e-6)
    assert is_right.shape == (1,)
