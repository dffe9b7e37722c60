"""Configuration: one set of names in YAML, on the command line and in MAE's scripts, checked strictly."""

import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mae_dat.config.adversaries import ATTACK_KINDS, AttackConfig, DatConfig
from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.config.groups import MaskConfig, OptimConfig, data_root, image_size
from mae_dat.config.parse import PACKAGE, command_line, flat_values, load_config, run_command, write_config
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


def yaml_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


# ---- MAE's flags ----


@pytest.mark.parametrize(("kind", "theirs"), [(PretrainConfig, PRETRAIN), (FinetuneConfig, FINETUNE)])
def test_names_and_defaults_are_maes(kind: type[Any], theirs: dict[str, Any]) -> None:
    ours = flags(load_config(kind, []))
    assert "data_path" in ours
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


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ([], "none"),
        (["--dat"], "released"),
        (["--dat", "--epochs", "3"], "released"),
        (["--epochs", "3", "--dat"], "released"),
        (["--dat", "paper", "--epochs", "3"], "paper"),
        (["--dat=random"], "random"),
        (["--dat", "none"], "none"),
    ],
)
def test_dat_needs_no_value_wherever_it_stands(arguments: list[str], kind: str) -> None:
    config = load_config(FinetuneConfig, arguments)
    assert config.dat.kind == kind
    assert (config.dat.attack.kind if config.dat.attack else "none") == kind


def test_a_mistyped_flag_is_suggested_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--epochz", "3"], ["--mask_ration", "0.5"]):
        with pytest.raises(SystemExit) as stopped:
            load_config(PretrainConfig, arguments)
        assert stopped.value.code == 2
    told = capsys.readouterr()
    assert "--epochs" in told.err + told.out
    assert "--mask_ratio" in told.err + told.out


@pytest.mark.parametrize(
    "arguments", [["--epochs", "many"], ["--dat", "strong"], ["--precision", "fp16"], ["--mixup_mode", "none"]]
)
def test_a_wrong_value_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_config(FinetuneConfig, arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert arguments[0] in told.err + told.out


def test_importing_the_configuration_is_light() -> None:
    code = "import sys, mae_dat.config.groups; print(sorted({'torch', 'timm', 'numpy', 'tyro'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# ---- precedence and files ----


def test_command_line_before_file_before_default(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "epochs: 7\nblr: 1e-4\nglobal_pool: true\ninput_size: [64, 48]\naa: null\n")
    found = finetune_flags("--epochs", "9", "--config", path, "--no_global_pool", "--input_size", "32")
    assert (found["epochs"], found["blr"], found["warmup_epochs"]) == (9, 1e-4, 5)
    assert (found["global_pool"], found["input_size"], found["aa"]) == (False, (32,), None)
    assert finetune_flags(f"--config={path}")["epochs"] == 7
    assert finetune_flags("--config", path)["input_size"] == (64, 48)


def test_every_flag_survives_the_way_through_a_file(tmp_path: Path) -> None:
    changed = [
        "--output_dir", "out put", "--resume", "R", "--seed", "3", "--input_size", "64", "48", "--no_pin_mem",
        "--blr", "3e-05", "--clip_grad", "1.5", "--dat", "--dat_share", "0.04", "--cutmix_minmax", "0.2", "0.8",
        "--aa", "None", "--no_global_pool", "--ema_decay", "0.99", "--limit", "7", "--crop_scale", "0.3", "0.9",
    ]  # fmt: skip
    for kind, arguments in ((FinetuneConfig, changed), (FinetuneConfig, []), (PretrainConfig, ["--norm_pix_loss"])):
        config = load_config(kind, arguments)
        write_config(flat_values(config), tmp_path / "config.yaml")
        assert load_config(kind, ["--config", str(tmp_path / "config.yaml")]) == config
    assert (tmp_path / "config.yaml").read_text().startswith("# python ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"recipe.yaml: unknown key 'epoch': did you mean .*epochs"),
        ("zzz: 3", r"recipe.yaml: unknown key 'zzz': known are output_dir,"),
        ("blr: 1e-3\nepochs: many", r"recipe.yaml: `epochs many` is no valid value"),
        ("epochs: 2.5", r"recipe.yaml: `epochs 2.5`"),
        ("epochs: true", r"recipe.yaml: `epochs`"),
        ("dat: strong", r"recipe.yaml: `dat strong`"),
        ("global_pool: 7", r"recipe.yaml: `global_pool 7`"),
        ("cutmix_minmax: [1]", r"recipe.yaml: `cutmix_minmax 1`"),
        ("batch_size: 0", "--batch_size must be at least 1, got 0"),
        ("- epochs", "recipe.yaml must contain `key: value` lines"),
        ("epochs: [", "recipe.yaml is not valid YAML"),
    ],
)
def test_a_wrong_file_names_itself_and_the_key(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(FinetuneConfig, ["--config", yaml_file(tmp_path, text)])
    assert capsys.readouterr().err == ""


def test_a_missing_file_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    yaml_file(tmp_path, "")
    with pytest.raises(MissingInputError, match=r"recip.yaml: no such file; did you mean .*recipe.yaml"):
        load_config(FinetuneConfig, ["--config", str(tmp_path / "recip.yaml")])
    with pytest.raises(ConfigError, match="--config needs the path"):
        load_config(FinetuneConfig, ["--config"])


# ---- values ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "releasd"}, "unknown attack 'releasd': did you mean released"),
        ({"share": 3.8}, "between 0 and 1, got 3.8"),
        ({"share": 0.0}, "between 0 and 1"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"eps": 0.0}, "eps > 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"random_start": 1.1}, r"random_start in \[0, 1\]"),
        ({"nearest": 0}, "at least 1 nearest code"),
    ],
)
def test_an_attack_that_cannot_work_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackConfig(**settings)


def test_the_flags_of_dat_reach_the_attack() -> None:
    attack = DatConfig("released", 0.3, 0.04, 0.5, 2).attack
    assert attack == AttackConfig("released", 0.3, 0.04, 0.5, 2)
    assert [kind for kind in ATTACK_KINDS if AttackConfig(kind).clean_weight == 0] == ["paper"]
    symbolic = load_config(FinetuneConfig, ["--dat", "symbolic", "--dat_steps", "3", "--dat_nearest", "16"]).dat.attack
    assert symbolic == AttackConfig("symbolic", steps=3, nearest=16)
    assert symbolic.word_share == 0.05
    assert DatConfig().attack is None


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


def test_a_users_error_is_one_line_and_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise MissingInputError("no such file: x")

    def interrupt() -> None:
        raise KeyboardInterrupt

    for command, code, told in ((fail, 66, "error: no such file: x\n"), (interrupt, 130, "interrupted.\n")):
        with pytest.raises(SystemExit) as stopped:
            run_command(command)
        assert stopped.value.code == code
        assert capsys.readouterr().err == told
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)  # type: ignore[arg-type, return-value]


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    code = "from mae_dat.config.parse import run_command\nrun_command(lambda: print('x' * 10**6, flush=True))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("flag", "value"), [("num_workers", "-1"), ("drop_path", "1.5"), ("ema_decay", "2"), ("smoothing", "-0.1")]
)
def test_a_value_out_of_its_range_is_refused_by_name(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} must"):
        load_config(FinetuneConfig, [f"--{flag}={value}"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([str(PACKAGE / "__main__.py"), "demo"], "python -m mae_dat demo --seeds 1"),
        (["/a/main_pretrain.py"], "python main_pretrain.py --seeds 1"),
    ],
)
def test_the_command_is_logged_as_it_can_be_typed(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*arguments, "--seeds", "1"])
    assert command_line() == text


@pytest.mark.parametrize(
    "arguments, eps, share",
    [
        (["--dat"], 0.1, 0.038),
        (["--dat", "--dat_eps", "0.2"], 0.2, None),
        (["--dat", "--dat_share", "0.2"], 0.1, 0.2),
        (["--dat", "--tokenizer", "vq-f8.ckpt"], 0.1, None),
        (["--dat", "random"], 0.1, None),
    ],
)
def test_the_published_strength_is_a_share_where_eps_does_not_carry_over(
    arguments: list[str], eps: float, share: float | None
) -> None:
    attack = load_config(FinetuneConfig, arguments).dat.attack
    assert attack is not None
    assert (attack.eps, attack.share) == (eps, share)


def test_two_starts_are_refused() -> None:
    with pytest.raises(ConfigError, match="--pretrained and --finetune"):
        load_config(FinetuneConfig, ["--pretrained", "--finetune", "pre"])


def test_the_cool_down_comes_on_top() -> None:
    assert load_config(FinetuneConfig, ["--epochs", "300", "--cooldown_epochs", "10"]).optim.total_epochs == 310
    with pytest.raises(ConfigError, match="cooldown_epochs"):
        load_config(FinetuneConfig, ["--cooldown_epochs", "-1"])


@pytest.mark.parametrize(("script", "refusal"), [("main_pretrain.py", 2), ("main_finetune.py", 2), ("submit.py", 64)])
def test_help_and_mistyped_flags_are_answered_without_torch(script: str, refusal: int) -> None:
    told = (
        "import runpy, sys\n"
        f"for sys.argv in ([{script!r}, '--help'], [{script!r}, '--epochz', '3', 'main_pretrain.py']):\n"
        "    try:\n"
        f"        runpy.run_path({script!r}, run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        print(end.code, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", told], cwd=ROOT, capture_output=True, text=True, timeout=60)
    answers = [line for line in done.stderr.splitlines() if line.endswith(("True", "False"))]
    assert answers == ["0 False", f"{refusal} False"], done.stderr


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
