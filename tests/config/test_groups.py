"""The groups of flags: MAE's names and defaults, and values that are rejected."""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mae_dat.config.errors import ConfigError
from mae_dat.config.flags import flat_values
from mae_dat.config.groups import MaskConfig, OptimConfig, data_root, image_size
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig, PretrainConfig

ROOT = Path(__file__).parents[2]
# MAE's scripts: flags and defaults that users' fingers know. What differs here is in DEVIATIONS, with the reason.
SHARED = {
    "accum_iter": 1, "batch_size": 64, "input_size": 224, "weight_decay": 0.05, "lr": None, "blr": 1e-3,
    "output_dir": "./output_dir", "log_dir": None, "device": "cuda", "seed": 0, "resume": None, "start_epoch": 0,
    "num_workers": 10, "pin_mem": True, "world_size": 1, "local_rank": -1, "dist_on_itp": False, "dist_url": "env://",
}  # fmt: skip
PRETRAIN = {
    **SHARED, "epochs": 400, "model": "mae_vit_large_patch16", "mask_ratio": 0.75, "norm_pix_loss": False,
    "min_lr": 0.0, "warmup_epochs": 40,
}  # fmt: skip
FINETUNE = {
    **SHARED, "epochs": 50, "model": "vit_large_patch16", "drop_path": 0.1, "clip_grad": None, "min_lr": 1e-6,
    "layer_decay": 0.75, "warmup_epochs": 5, "color_jitter": None, "aa": "rand-m9-mstd0.5-inc1", "smoothing": 0.1,
    "reprob": 0.25, "remode": "pixel", "recount": 1, "resplit": False, "mixup": 0.0, "cutmix": 0.0,
    "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "finetune": None,
    "global_pool": True, "nb_classes": 1000, "eval": False, "dist_eval": False, "cls_token": False,
}  # fmt: skip
DEVIATIONS = {
    "device": "auto",  # CUDA if there is any, so that the same command runs without
    "nb_classes": None,  # the number of class folders
    "input_size": (224,),  # or height and width
}


def flags(config: Any) -> dict[str, Any]:
    return flat_values(config)


def finetune_flags(*arguments: str) -> dict[str, Any]:
    return flags(load_config(FinetuneConfig, arguments))


@pytest.mark.parametrize(("kind", "theirs"), [(PretrainConfig, PRETRAIN), (FinetuneConfig, FINETUNE)])
def test_names_and_defaults_are_maes(kind: type[Any], theirs: dict[str, Any]) -> None:
    ours = flags(load_config(kind, []))
    assert "data_path" in ours
    assert ours.pop("num_workers") <= theirs["num_workers"]  # MAE's, but no more than there are CPU cores
    theirs = {name: value for name, value in theirs.items() if name != "num_workers"}
    assert {name: ours[name] for name in theirs} == {**theirs, **{k: v for k, v in DEVIATIONS.items() if k in theirs}}


def test_no_two_groups_share_a_flag() -> None:
    for kind in (PretrainConfig, FinetuneConfig):
        names = [name for group in dataclasses.fields(kind) for name in flat_values(group.type())]
        assert len(names) == len(set(names))


def test_maes_command_lines_are_understood() -> None:
    pretraining = (
        "--batch_size 64 --model mae_vit_base_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 800 "
        "--warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path DIR --no_pin_mem --device cuda "
        "--world_size 8 --local_rank 0 --dist_on_itp --dist_url tcp://host:1 --start_epoch 3 --log_dir logs"
    )
    found = flags(load_config(PretrainConfig, shlex.split(pretraining)))
    expected = {
        "norm_pix_loss": True, "epochs": 800, "blr": 1.5e-4, "data_path": "DIR", "pin_mem": False, "device": "cuda",
        "world_size": 8, "dist_on_itp": True, "dist_url": "tcp://host:1", "start_epoch": 3, "log_dir": "logs",
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    found = finetune_flags(
        *shlex.split(
            "--finetune W.pth --batch_size 32 --layer_decay 0.65 --drop_path 0.1 --reprob 0.25 --mixup 0.8 "
            "--cutmix 1.0 --cutmix_minmax 0.2 0.8 --dist_eval --cls_token --eval --resume R.pth --nb_classes 10 "
            "--color_jitter 0.4 --resplit --clip_grad 1"
        )
    )
    assert (found["cutmix_minmax"], found["mixup"], found["nb_classes"]) == ((0.2, 0.8), 0.8, 10)
    assert found["eval"]
    assert found["resplit"]
    assert not load_config(FinetuneConfig, ["--cls_token"]).classifier.mean_pool
    assert load_config(FinetuneConfig, ["--global_pool"]).classifier.mean_pool


@pytest.mark.parametrize(
    ("arguments", "size"), [(["64"], (64, 64)), (["64", "48"], (64, 48)), (["64", "48", "--epochs", "3"], (64, 48))]
)
def test_input_size_is_a_side_or_height_and_width(arguments: list[str], size: tuple[int, int]) -> None:
    assert load_config(PretrainConfig, ["--input_size", *arguments]).data.image_size == size


@pytest.mark.parametrize("sides", [(), (1, 2, 3), (0,), (-8, 8)])
def test_other_sizes_are_refused(sides: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="--input_size takes a side, or height and width"):
        image_size(sides)


def test_importing_the_configuration_is_light() -> None:
    heavy = {"torch", "timm", "numpy", "yaml", "argparse"}
    code = f"import sys, mae_dat.config.runs; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_counts_and_ratios_are_checked() -> None:
    for name in ("batch_size", "epochs", "accum_iter"):
        with pytest.raises(ConfigError, match=f"--{name} must be at least 1, got 0"):
            OptimConfig(**{name: 0})
    for ratio in (0.0, 1.0, 75):
        with pytest.raises(ConfigError, match="--mask_ratio must lie between 0 and 1"):
            MaskConfig(mask_ratio=ratio)


def test_settings_are_frozen() -> None:
    config = load_config(PretrainConfig, [])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.epochs = 3  # type: ignore[misc]


def test_the_images_root_comes_from_flag_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DAT_DATA", "from-environment")
    assert data_root("from-flag") == "from-flag"
    assert data_root(None) == "from-environment"
    monkeypatch.delenv("MAE_DAT_DATA")
    with pytest.raises(ConfigError) as error:
        data_root(None)
    for way in ("--data_path DIR", "MAE_DAT_DATA", "--data_path demo"):
        assert way in str(error.value)


@pytest.mark.parametrize(
    ("flag", "value"), [("num_workers", "-1"), ("drop_path", "1.5"), ("ema_decay", "2"), ("smoothing", "-0.1")]
)
def test_a_value_out_of_its_range_is_refused_by_name(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} must"):
        load_config(FinetuneConfig, [f"--{flag}={value}"])


def test_two_starts_are_refused() -> None:
    with pytest.raises(ConfigError, match="--pretrained and --finetune"):
        load_config(FinetuneConfig, ["--pretrained", "--finetune", "pre"])


def test_the_cool_down_comes_on_top() -> None:
    assert load_config(FinetuneConfig, ["--epochs", "300", "--cooldown_epochs", "10"]).optim.total_epochs == 310
    with pytest.raises(ConfigError, match="cooldown_epochs"):
        load_config(FinetuneConfig, ["--cooldown_epochs", "-1"])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--dat --dat_eps nan", "--dat_eps must be above 0, got nan"),
        ("--dat --dat_eps inf", "--dat_eps must be above 0, got inf"),
        ("--clip_grad 0", "--clip_grad must be above 0, got 0.0: leave it out"),
        ("--lr -1", "--lr must be 0 or more, got -1.0"),
        ("--weight_decay -5", "--weight_decay must be 0 or more, got -5.0"),
        ("--warmup_epochs nan", "--warmup_epochs must be 0 or more, got nan"),
        ("--at pgd --at_eps 4", "--at_eps 4 lets every pixel .* 4/255 is given as 0.0157"),
        ("--at pgd --at_eps nan", "--at_eps must be above 0, got nan"),
    ],
)
def test_numbers_that_would_train_nonsense_are_refused(flags: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(FinetuneConfig, flags.split())
