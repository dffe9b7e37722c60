"""Going on from a checkpoint: which settings may change, and the same global batch on another number of ranks."""

import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import GOLDEN
from tiny_runs import draw_folder, finetune_in, pretrain_in, save_tokenizer
from whole_runs import signal_in_step

from mae_dat.config.commands.tokenizer import DistillConfig, TokenizerConfig
from mae_dat.config.errors import CheckpointError, ConfigError, InterruptError
from mae_dat.config.flags import flat_values
from mae_dat.config.groups import OptimConfig
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.models.tokenizer import LightTokenizer, load_tokenizer
from mae_dat.storage.checkpoint import Checkpoint
from mae_dat.training.resume import BATCH_SETTINGS, FREE_SETTINGS, changes, check_changes, keep_global_batch

# Every other setting changes the result; a new one must be put into one of the two lists by its author.
CHANGES_THE_RESULT = {
    *("device", "seed", "precision", "compile"),
    *("input_size", "in_chans"),
    *("epochs", "lr", "blr", "min_lr", "warmup_epochs", "warmup_lr", "cooldown_epochs", "weight_decay", "clip_grad"),
    *(
        "dat",
        "dat_eps",
        "dat_share",
        "dat_random_start",
        "dat_steps",
        "dat_nearest",
        "tokenizer",
        "tokenizer_precision",
        "tokenizer_compile",
    ),
    *("dat_at", "dat_free", "dat_batch_share", "adversary_hold", "adversary_ramp"),
    *("at", "at_norm", "at_eps", "at_steps", "at_step", "at_clean_weight", "split_norms", "jsd", "dat_jsd"),
    *(
        "model",
        "mask_ratio",
        "norm_pix_loss",
        "target",
        "words_weight",
        "init",
        "decoder_warmup",
        "loss",
        "class_weights",
        "sampler",
        "train",
        "probe_epochs",
    ),
    *("nb_classes", "drop_path", "global_pool", "cls_token", "finetune", "pretrained", "linear_probe", "opt"),
    *("layer_decay", "ema_decay"),
    *("color_jitter", "aa", "crop_scale", "smoothing", "reprob", "remode", "recount", "resplit"),
    *("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode"),
    *("dat_fourth_pass", "dat_rescore", "lr_schedule", "train_interpolation"),
    *("teacher_weight", "teacher_temperature"),
    # of tokenizers
    *("width", "encoder_blocks", "decoder_blocks", "steps", "factor", "num_words", "word_dim", "beta"),
    *("gan_weight", "gan_start", "restart_every", "teacher", "word_weight"),
}
PRETRAINING, FINE_TUNING = flat_values(PretrainConfig()), flat_values(FinetuneConfig())
TOKENIZER, STUDENT = flat_values(TokenizerConfig()), flat_values(DistillConfig())
KINDS = (FINE_TUNING, PRETRAINING, TOKENIZER, STUDENT)


def checkpoint(settings: dict[str, Any], **facts: Any) -> Checkpoint:
    """As a manifest holds it: tuples are lists there."""
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return Checkpoint(Path("out/checkpoint-00000010.pth"), 10, {"settings": kept, **facts})


def check(found: Checkpoint, settings: dict[str, Any], images: str, batch: int, allowed: tuple[str, ...]) -> None:
    check_changes(found, {"settings": settings, "images": images, "global_batch": batch}, allowed)


def test_every_setting_is_of_one_kind() -> None:
    assert not CHANGES_THE_RESULT & (FREE_SETTINGS | BATCH_SETTINGS)
    assert set().union(*KINDS) == CHANGES_THE_RESULT | FREE_SETTINGS | BATCH_SETTINGS


def test_what_is_the_same_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    for settings in KINDS:
        found = checkpoint(settings, images="100 (ab)", global_batch=64)
        assert changes(found.manifest["settings"], settings) == {}
        check(found, settings, "100 (ab)", 64, ())
    check(checkpoint({}), PRETRAINING, "100 (ab)", 64, ())  # of an older version, which recorded nothing
    assert not caplog.text


def other(value: Any) -> Any:
    """Another value than this."""
    return not value if isinstance(value, bool) else ["another"] if value in ((), []) else f"not {value}"


@pytest.mark.parametrize("name", sorted(CHANGES_THE_RESULT | FREE_SETTINGS | BATCH_SETTINGS))
def test_each_setting_changed_alone(name: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = next(kind for kind in KINDS if name in kind)
    now = {**settings, name: other(settings[name])}
    found = checkpoint(settings, images="100 (ab)", global_batch=64)
    if name in FREE_SETTINGS | BATCH_SETTINGS:
        check(found, now, "100 (ab)", 64, ())
    else:
        with pytest.raises(ConfigError, match=rf"(?s)--{name}: .* now  \(changes the result\).*--allow_change {name};"):
            check(found, now, "100 (ab)", 64, ())
        caplog.clear()
        check(found, now, "100 (ab)", 64, ("seed", name))
    assert f"--{name}: " in caplog.text
    assert ("changes the result" in caplog.text) == (name in CHANGES_THE_RESULT)


def test_another_global_batch_or_other_images_change_the_result() -> None:
    found = checkpoint(FINE_TUNING, images="100 (ab)", global_batch=64)
    for name in BATCH_SETTINGS:
        now = {**FINE_TUNING, name: 7}
        with pytest.raises(ConfigError, match=f"--allow_change {name};"):
            check(found, now, "100 (ab)", 56, ())
        check(found, now, "100 (ab)", 56, (name,))
    with pytest.raises(ConfigError, match=r"(?s)--images: 100 \(ab\) before, 100 \(cd\) now .*--allow_change images;"):
        check(found, FINE_TUNING, "100 (cd)", 64, ())
    check(found, FINE_TUNING, "100 (cd)", 64, ("images",))


def test_all_changes_are_told_at_once(caplog: pytest.LogCaptureFixture) -> None:
    now = {**FINE_TUNING, "blr": 1.0, "epochs": 3, "num_workers": 1}
    with pytest.raises(ConfigError) as caught:
        check(checkpoint(FINE_TUNING), now, "", 1, ("epochs",))
    told = str(caught.value)
    assert told.splitlines()[0] == "out/checkpoint-00000010.pth was made with other settings:"
    assert {line.split(":")[0].strip() for line in told.splitlines()[1:4]} == {"--blr", "--epochs", "--num_workers"}
    assert "--allow_change blr;" in told, "only what is not allowed yet"


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="--allow_change epoch: no such setting"):
        check(checkpoint(FINE_TUNING), FINE_TUNING, "", 1, ("epoch",))
    with pytest.raises(CheckpointError, match="it is of a pretraining, not of a fine-tuning. Use another --output_dir"):
        check(checkpoint(PRETRAINING), FINE_TUNING, "", 1, ())
    with pytest.raises(CheckpointError, match="it is of a fine-tuning, not of a pretraining"):
        check(checkpoint(FINE_TUNING), PRETRAINING, "", 1, ())
    with pytest.raises(CheckpointError, match="it is of a tokenizer's training, not of a distillation"):
        check(checkpoint(TOKENIZER), STUDENT, "", 1, ())


@pytest.mark.parametrize(
    ("before", "ranks", "shares"),
    [
        ((64, 1, 8), 8, (64, 1)),
        ((64, 1, 8), 4, (64, 2)),
        ((64, 1, 8), 1, (64, 8)),
        ((64, 1, 8), 16, (32, 1)),
        ((64, 4, 2), 16, (32, 1)),
        ((64, 1, 8), 3, None),
        ((4, 2, 1), 3, None),
        ((4, 2, 1), 16, None),
        ((6, 1, 2), 4, (3, 1)),
        ((6, 1, 6), 4, (3, 3)),  # 9 images a rank: none of its divisors is even
        ((6, 1, 6), 2, (6, 3)),
        ((5, 1, 4), 2, (5, 2)),
        ((6, 1, 4), 3, (4, 2)),
    ],
)
def test_the_global_batch_is_kept(
    before: tuple[int, int, int], ranks: int, shares: tuple[int, int] | None, caplog: pytest.LogCaptureFixture
) -> None:
    batch, accum, ranks_before = before
    whole = batch * accum * ranks_before
    optim = OptimConfig(batch_size=batch, accum_iter=accum)
    found = checkpoint({"batch_size": batch, "accum_iter": accum}, ranks=ranks_before, global_batch=whole)
    with caplog.at_level(logging.WARNING):
        if shares is None:
            with pytest.raises(
                ConfigError, match=f"{whole} images per update, which {ranks} ranks cannot share evenly"
            ):
                keep_global_batch(optim, found, ranks)
            return
        kept = keep_global_batch(optim, found, ranks)
    assert (kept.batch_size, kept.accum_iter) == shares
    assert kept.batch_size * kept.accum_iter * ranks == whole
    assert kept.batch_size <= batch, "no more memory than was asked for"
    assert ("images per update as before" in caplog.text) == (ranks != ranks_before)


def test_shares_asked_for_anew_are_left_alone() -> None:
    found = checkpoint({"batch_size": 64, "accum_iter": 1}, ranks=8, global_batch=512)
    for optim in (OptimConfig(batch_size=128), OptimConfig(batch_size=64, accum_iter=2)):
        assert keep_global_batch(optim, found, 4) is optim
    assert keep_global_batch(OptimConfig(), None, 4) == OptimConfig()
    assert keep_global_batch(OptimConfig(), checkpoint({}), 4) == OptimConfig()


def test_a_run_of_the_first_format_says_what_to_do(tmp_path: Path) -> None:
    """Its steps were micro-batches and its manifest has no global batch: nothing is computed, nothing is lost."""
    output = tmp_path / "out"
    shutil.copytree(GOLDEN / "checkpoint_v1", output)
    (manifest,) = output.glob("*.json")
    facts = json.loads(manifest.read_text()) | {"settings": {"mask_ratio": 0.75, "batch_size": 8, "accum_iter": 1}}
    manifest.write_text(json.dumps(facts))
    data = draw_folder(tmp_path / "data", train=16, val=0, conflict=0)
    with pytest.raises(CheckpointError, match=r"00006.pth has format 1, .* --init .*00006.pth"):
        pretrain_in(output, data)
    assert {path.name for path in output.glob("checkpoint-*")} == {manifest.name, f"{manifest.stem}.pth"}


# ---- content replaced under the same name ----


def test_replaced_images_and_tokenizers_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    data, tokenizer = draw_folder(tmp_path / "data", val=0, conflict=0), save_tokenizer(tmp_path / "words.safetensors")
    output = tmp_path / "out"

    def train(*flags: str) -> None:
        pretrain_in(output, data, "--dat", "released", "--tokenizer", str(tokenizer), "--epochs", "2", *flags)

    with signal_in_step(1, signal.SIGTERM), pytest.raises(InterruptError):
        train()
    for path in data.rglob("*.png"):
        os.utime(path, ns=(7, 7))  # as after a copy
    with signal_in_step(2, signal.SIGTERM), pytest.raises(InterruptError):
        train()
    image = sorted(data.rglob("*.png"))[13]
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match=r"(?s)--images: 24 .*same names with other content.*_change images;"):
        train()
    words = load_tokenizer(tokenizer)
    assert isinstance(words, LightTokenizer)
    with torch.no_grad():
        words.codes.mul_(-1)
    words.save(tokenizer)
    with pytest.raises(ConfigError, match=r"--tokenizer: .*words.safetensors \(sha256 \w{12}\) before, .* now"):
        train("--allow_change", "images")
    train("--allow_change", "images", "tokenizer")
    changed = json.loads((output / "model.json").read_text())["changes"]
    assert [(change["step"], change["setting"]) for change in changed] == [(3, "images"), (3, "tokenizer")]


def test_replaced_validation_images_are_refused_unless_they_are_allowed(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "data", conflict=0)
    with signal_in_step(1, signal.SIGTERM), pytest.raises(InterruptError):
        finetune_in(tmp_path / "out", data, "--epochs", "2")
    image = sorted((data / "val").rglob("*.png"))[3]
    stat, other_image = image.stat(), sorted((data / "val").rglob("*.png"))[-1]
    image.write_bytes(other_image.read_bytes())
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"(?s)--validation: 20 .*the same names with other.*_change validation;"):
        finetune_in(tmp_path / "out", data, "--epochs", "2")
    image.unlink()
    with pytest.raises(ConfigError, match=r"(?s)--validation: 20 \(\w+\) before, 19 \(\w+\) now"):
        finetune_in(tmp_path / "out", data, "--epochs", "2")
    finetune_in(tmp_path / "out", data, "--epochs", "2", "--allow_change", "validation")


def test_images_decoded_with_another_white_level_are_other_images() -> None:
    before = checkpoint(FINE_TUNING, images="100 (ab)", global_batch=64, decoding={})
    now = {"settings": FINE_TUNING, "images": "100 (ab)", "global_batch": 64}
    check_changes(before, {**now, "decoding": {}}, ())
    level = {"MAE_DAT_WHITE_LEVEL": "4095"}
    with pytest.raises(
        ConfigError, match=r"--images: decoded with the default .* before, decoded with \$MAE_DAT_WHITE_LEVEL=4095 now"
    ):
        check_changes(before, {**now, "decoding": level}, ())
    (change,) = check_changes(before, {**now, "decoding": level}, ("images",))
    assert (change["step"], change["setting"]) == (10, "images")
    check_changes(checkpoint(FINE_TUNING, images="100 (ab)", global_batch=64), {**now, "decoding": level}, ())
