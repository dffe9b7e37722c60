"""Every recipe in configs/: its header, its published numbers, the parts that it builds, a tiny run of each kind."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_runs import (
    FINETUNE,
    ROOT,
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
    pretrain_in,
    run_script,
    save_tokenizer,
)

from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.data.loader import eval_loader
from mae_dat.data.transforms import finetune_transform
from mae_dat.launch import submit as launch
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import VIT_SIZES, build_mae
from mae_dat.models.tokenizer import VQGAN, VQGAN_PRESETS, load_tokenizer
from mae_dat.models.weights.open import open_model
from mae_dat.runtime.run_log import read_log
from mae_dat.storage.released import find_released
from mae_dat.training.accuracy import evaluate_accuracy
from mae_dat.training.finetune import build_configured_classifier, check_mixup, initialize, validation_images
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT
from mae_dat.training.objectives.reconstruction import MaskedReconstruction
from mae_dat.training.optim import build_optimizer, effective_lr
from mae_dat.verbs import VERBS

# Detectors' have their own test, in test_train.py.
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("detect_"))
FIELDS = ("Paper", "Command", "Batch", "Hardware", "Wall time", "Expected")
# Effective batch, peak rate and epochs of the publications (of ours where none was published).
PUBLISHED = {
    "pretrain_vit_base": (4096, 2.4e-3, 800),
    "pretrain_vit_large": (4096, 2.4e-3, 800),
    "pretrain_vit_huge": (4096, 2.4e-3, 800),
    "finetune_vit_base": (1024, 2e-3, 100),
    "finetune_vit_large": (1024, 4e-3, 50),
    "finetune_vit_huge": (1024, 4e-3, 50),
    "probe_vit_base": (16384, 6.4, 90),
    "probe_vit_large": (16384, 6.4, 50),
    "probe_vit_huge": (16384, 6.4, 50),
    "dat_vit_base": (1024, 2e-3, 100),
    "dat_vit_large": (1024, 4e-3, 50),
    "dat_vit_huge": (1024, 4e-3, 50),
    "dat_scratch_vit_base": (1024, 1e-3, 310),
    "dat_warmstart_vit_base": (256, 1e-4, 30),
    "dat_resnet50": (1024, 0.4, 90),
    "dat_pretrain_vit_base": (4096, 2.4e-3, 200),
    "5k_pretrain": (256, 1.5e-4, 1600),
    "5k_pretrain_init": (256, 5e-5, 200),
    "100k_pretrain": (512, 3e-4, 400),
    "100k_pretrain_init": (512, 1e-4, 100),
    "10k_pretrain": (256, 1.5e-4, 800),
    "10k_finetune": (128, 2.5e-4, 100),
    "10k_dat": (128, 2.5e-4, 50),
}


def header(path: Path) -> dict[str, str]:
    """The fields of a recipe's leading comment."""
    text = re.match(r"(#.*\n)+", path.read_text())
    assert text
    found: dict[str, str] = {}
    for line in text[0].splitlines()[1:]:  # the first says what the recipe does
        if field := re.match(r"# (\w[\w ]*?): +(.+)", line):
            found[field[1]] = field[2]
        else:
            found[list(found)[-1]] += " " + line.lstrip("# ")
    return found


@functools.cache
def settings(path: Path) -> Any:
    """A recipe, read as the verb that its header names does."""
    kind = PretrainConfig if "mae-dat pretrain " in path.read_text() or "pretrain" in path.stem else FinetuneConfig
    return load_config(kind, ["--config", str(path)])


def recipe(name: str) -> Any:
    return settings(ROOT / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is_and_what_to_expect(path: Path) -> None:
    found = header(path)
    assert tuple(found) == FIELDS
    config = settings(path)
    if path.stem not in PUBLISHED:
        assert path.stem.startswith(("demo_", "small_", "proof_"))
        return
    assert f"--config {path.stem} " in found["Command"]
    assert "not run by us" in found["Expected"]
    numbers = re.match(r"([\d,]+) = batch_size (\d+) x accum_iter (\d+) x (\d+) GPUs?;", found["Batch"])
    assert numbers
    total, batch, accumulated, gpus = (int(number.replace(",", "")) for number in numbers.groups())
    optim = config.optim
    assert (optim.batch_size, optim.accum_iter) == (batch, accumulated)
    assert batch * accumulated * gpus == total
    if other := re.search(r"on (\d+) GPUs batch_size (\d+), accum_iter (\d+)", found["Batch"]):
        more, per_rank, steps = map(int, other.groups())
        assert more * per_rank * steps == total
    expected = PUBLISHED[path.stem]
    assert (total, optim.total_epochs) == (expected[0], expected[2])
    assert effective_lr(optim.lr, optim.blr, total) == pytest.approx(expected[1])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_builds_its_parts(path: Path) -> None:
    config = settings(path)
    objective: Objective
    with torch.device("meta"):
        if isinstance(config, PretrainConfig):
            mae = build_mae(config.mae.model, img_size=config.data.image_size)
            if config.mae.init:
                assert find_released(config.mae.init).model == config.mae.model
            objective = MaskedReconstruction(config.mae.mask_ratio, config.mae.norm_pix_loss)
            optimizer = build_optimizer(mae, 0.0, config.optim.weight_decay, betas=(0.9, 0.95))
            trained = sum(p.numel() for p in mae.parameters() if p.requires_grad)
        else:
            model, optimizer = classifier_parts(config)
            objective = Classification(config.augment, 1000)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        attack = config.dat.attack
        if attack:
            tokenizer = load_tokenizer() if config.dat.tokenizer == "embedded" else named_tokenizer(config)
            tokenizer.check(torch.zeros(1, 3, *config.data.image_size))
            assert WithDAT(tokenizer, attack, objective).strength_is_known == (attack.share is None)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == trained > 0
    assert bool(attack) == (path.stem.startswith("dat_") or path.stem == "10k_dat")


def classifier_parts(config: FinetuneConfig) -> tuple[Classifier, torch.optim.Optimizer]:
    """Network and optimizer for 1000 classes, and checks of what they start from and of the augmentation."""
    augment, chosen = config.augment, config.classifier
    check_mixup(config.augment, config.optim.batch_size)
    model = build_configured_classifier(config.classifier, config.data, 1000)
    if chosen.pretrained:
        assert chosen.model in timm.list_pretrained()
    elif chosen.finetune:
        assert find_released(chosen.finetune).model == f"mae_{chosen.model}"
    if chosen.linear_probe:
        model.make_linear_probe()
    finetune_transform(config.data.image_size, augment.aa, augment.color_jitter, augment.reprob, augment.remode)
    return model, build_optimizer(model, 0.0, config.optim.weight_decay, chosen.layer_decay, opt=chosen.opt)


def named_tokenizer(config: Any) -> VQGAN:
    return VQGAN(VQGAN_PRESETS[find_released(config.dat.tokenizer).model])


def commands(text: str) -> list[list[str]]:
    """The script and flags of every command of ours in a text, without what stands in brackets or after `#`."""
    text = re.sub(r"(?:mae-dat|-m mae_dat) submit (.*?)(pretrain|finetune)\b", r"python submit.py \1main_\2.py", text)
    text = re.sub(
        r"(?:mae-dat|torchrun --nproc_per_node 8 -m mae_dat) (pretrain|finetune)\b", r"python main_\1.py", text
    )
    lines = re.findall(r"(?:python|torchrun --nproc_per_node 8) ((?:main_\w+|submit)\.py [^#`\n]+)", text)
    return [shlex.split(re.sub(r"\[.*?\]", "", line)) for line in lines]


def test_the_commands_in_headers_and_guide_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MAE_DAT_DATA", "DIR")
    guide = (ROOT / "docs" / "how-to" / "reproduce.md").read_text()
    found = commands(guide) + [words for path in CONFIGS for words in commands(header(path)["Command"])]
    assert len(found) > len(PUBLISHED) + 8
    for script, *flags in found:
        if script == "submit.py":
            task = launch.parse_command(flags, VERBS)[1]
            script, flags = Path(task.script).name, list(task.args)
        load_config(PretrainConfig if script == "main_pretrain.py" else FinetuneConfig, flags)
    names = re.search(r"mae-dat get (\w[\w ]+)\n", guide)
    assert names
    assert [find_released(name).name for name in names[1].split()] == names[1].split()


def test_a_dat_recipe_is_its_plain_one_but_for_the_adversary() -> None:
    for size in ("base", "large", "huge"):
        plain, dat = recipe(f"finetune_vit_{size}"), recipe(f"dat_vit_{size}")
        assert (dat.classifier, dat.augment) == (plain.classifier, plain.augment)
        assert dat.dat.attack.eps == 0.1
    assert recipe("finetune_vit_huge").classifier.model in VIT_SIZES


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "light.safetensors"))


def as_recipe(name: str, *flags: str) -> list[str]:
    """Flags that make a tiny run of a recipe: its file first, then what makes it tiny."""
    tiny = ["--accum_iter", "1", "--cooldown_epochs", "0"]
    return ["--config", str(ROOT / "configs" / f"{name}.yaml"), *tiny, *flags]


def test_recipes_of_every_kind_run_at_tiny_size(images: Path, tokenizer: str, tmp_path: Path) -> None:
    dat = ["--tokenizer", tokenizer, "--dat_eps", "2"]
    pre = pretrain_in(tmp_path / "pre", images, *as_recipe("dat_pretrain_vit_base", *dat))
    assert read_log(pre / "log.txt")[-1]["train_changed_words"] > 0
    runs = {
        "dat_vit_huge": ["--finetune", str(pre), *dat],
        "probe_vit_base": ["--finetune", str(pre)],
        "dat_resnet50": ["--model", "test_resnet", *dat],
        "dat_scratch_vit_base": ["--model", "test_vit", *dat],
    }
    for name, flags in runs.items():
        output = tmp_path / name
        finetune_in(output, images, *as_recipe(name, *flags))
        record = read_log(output / "log.txt")[-1]
        assert (record.get("train_changed_words", 0.0) > 0) == name.startswith("dat_"), name
        assert (output / "model.safetensors").is_file()


SWIN = pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_vit", SWIN])
def test_any_timm_model_trains_stops_goes_on_and_is_evaluated(name: str, images: Path, tmp_path: Path) -> None:
    """What BatchNorm's statistics, windows, EMA, layer decay and drop path need to survive a checkpoint."""
    flags = ["--model", name, "--epochs", "2", "--ema_decay", "0.5", "--keep", "9"]
    final = finetune_in(tmp_path / "out", images, *flags)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    for last in (tmp_path / "out").glob("checkpoint-*6.*"):
        last.unlink()
    (tmp_path / "out" / "model.safetensors").unlink()
    assert finetune_in(tmp_path / "out", images, *flags) == final
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_timm_weights_are_the_start_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own loading, from a file in the place of its download."""
    trained = timm.create_model("test_resnet", num_classes=1000)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    create = timm.create_model
    overlay = {"file": str(tmp_path / "weights.pth")}
    monkeypatch.setattr(timm, "create_model", lambda name, **kw: create(name, pretrained_cfg_overlay=overlay, **kw))
    config = load_config(FinetuneConfig, ["--model", "test_resnet", "--pretrained"])
    net = build_configured_classifier(config.classifier, config.data, 7, pretrained=True).net
    assert torch.equal(net.conv1[0].weight, trained.conv1[0].weight)
    assert net.fc.out_features == 7
    origin = initialize(
        build_configured_classifier(config.classifier, config.data, 7, pretrained=True), config.classifier
    )
    assert origin is not None
    assert origin.describe() == f"timm's weights test_resnet.r160_in1k ({tmp_path / 'weights.pth'})"
    from_nothing = load_config(FinetuneConfig, ["--model", "test_resnet"]).classifier
    assert initialize(build_configured_classifier(from_nothing, config.data, 7), from_nothing) is None


@pytest.mark.slow
def test_ranks_evaluate_and_export_the_same_batchnorm(images: Path, tmp_path: Path) -> None:
    """Each rank has statistics of its own images: what is measured in the run is what the exported file gives."""
    flags = [*FINETUNE, "--model", "test_resnet", "--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    done = run_script(*torchrun, "main_finetune.py", *flags, "--batch_size", "4", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    config = load_config(FinetuneConfig, [*flags, "--num_workers", "0"])
    held_out = validation_images(config.data)
    model = open_model(tmp_path / "out").classifier()
    alone = evaluate_accuracy(model, eval_loader(held_out, 8, 0, 1, 0), torch.device("cpu"), None)
    record = read_log(tmp_path / "out" / "log.txt")[-1]
    assert record["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-5)
