"""Flags that were typed without the switch that makes them matter end with exit code 2 and the fix."""

from pathlib import Path

import pytest

from mae_dat.config.effects import EFFECTS
from mae_dat.config.errors import UsageError
from mae_dat.config.flags import flat_values
from mae_dat.verbs import VERBS


def load(line: str) -> dict[str, object]:
    """The settings that a command line of `mae-dat` gives."""
    words = line.split()
    verb = " ".join(words[:2]) if " ".join(words[:2]) in VERBS else words[0]
    return flat_values(VERBS[verb].load(words[len(verb.split()) :], f"mae-dat {verb}"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("finetune --dat_share 0.05", "--dat_share has no effect here: give --dat, or leave out --dat_share"),
        ("pretrain --dat_nearest 4", "--dat_nearest has no effect here: give --dat"),
        ("detect --dat_eps 0.1", "give --dat"),
        ("finetune --dat symbolic --dat_eps 0.1", "give --dat released or paper"),
        ("finetune --dat released --dat_nearest 8", "give --dat symbolic or random"),
        ("finetune --dat random --dat_steps 3", "give --dat released or symbolic"),
        ("pretrain --dat paper --dat_random_start 0.5", "give --dat released"),
        ("finetune --dat reconstruction --dat_share 0.1", "give --dat released or paper or symbolic or random"),
        ("finetune --adversary_hold 2", "give --dat, or --at pgd"),
        ("pretrain --adversary_ramp 2", "give --dat, or leave out --adversary_ramp"),
        ("detect --adversary_ramp 2", "give --dat"),
        ("finetune --dat reconstruction --adversary_ramp 2", "--adversary_ramp .* give --dat released or"),
        ("finetune --tokenizer x.ckpt", "give --dat"),
        ("pretrain --tokenizer x.ckpt", "give --dat, or --target words or both"),
        ("pretrain --words_weight 0.3", "give --target both"),
        ("pretrain --target words --norm_pix_loss --dat", "give --target pixels or both"),
        ("pretrain --decoder_warmup 3", "give --init WEIGHTS, or leave out --decoder_warmup"),
        ("pretrain --lr 0.1 --blr 0.1", "--blr has no effect here: leave out --lr, which sets the rate itself"),
        ("finetune --dat_jsd 1", "give --dat"),
        ("finetune --split_norms", "give --dat"),
        ("finetune --at_eps 0.03", "give --at pgd or advprop"),
        ("finetune --resplit", "give --jsd 12"),
        ("finetune --color_jitter 0.4", "give --aa None"),
        ("finetune --reprob 0 --recount 2", "give --reprob 0.25"),
        ("finetune --mixup_prob 0.5", "give --mixup 0.8 or --cutmix 1"),
        ("finetune --mixup 0.8 --mixup_switch_prob 0.3", "give both --mixup 0.8 and --cutmix 1"),
        ("finetune --cutmix 1 --cutmix_minmax 0.2 0.8", "leave out --cutmix_minmax, which replaces it"),
        ("finetune --linear_probe --layer_decay 0.5", "leave out --linear_probe"),
        ("finetune --suite corruptions", "give --eval"),
        ("finetune --limit 100", "give --eval"),
        ("finetune --eval --limit_corrupted 100", "give --eval --suite corruptions"),
        ("corrupt DIR --shard_mb 10", "give --shards"),
        ("corrupt DIR --crop 0.9", "give --input_size"),
        ("corrupt DIR --png --quality 90", "leave out --png, which is lossless"),
        ("visualize adversary --adversary_hold 1", "give it to a training"),
        ("detect --width 128", "give --model vit_base_patch16"),
        ("detect --corrupted", "give --eval"),
        ("detect --eval --severities 1 2", "give --eval --corrupted"),
        ("tokenizer train --gan_weight 0 --gan_start 0.1", "give --gan_weight 0.1"),
        ("features --knn_temperature 0.1 --output_dir x", "give --knn 20"),
        ("features --format npz --knn 20", "give --output_dir DIR"),
        ("evaluate --suite clean --rescore 10", "give --suite words-symbolic"),
        ("evaluate --suite clean --tokenizer x", "give --suite words-random words-symbolic"),
        ("analyze --views released --pixel_steps 3", "give --views pixel"),
        ("pack DIR OUT --quality 80", "give --size 256"),
        ("convert A B --to timm --license mit", "give --to hf"),
        ("doctor --quick --precision fp32", "leave out --quick"),
        ("compare --no_measure --suite clean", "give --measure"),
        ("compare --cross_arms plain", "give --pretrainings plain released"),
    ],
)  # fmt: skip
def test_a_flag_without_effect_is_rejected_with_the_fix(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load(line)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "line",
    [
        "finetune --dat --dat_share 0.05 --dat_steps 2 --adversary_hold 1 --tokenizer embedded",
        "finetune --at pgd --at_eps 0.03 --adversary_ramp 3",
        "finetune --dat symbolic --dat_share 0.05 --dat_nearest 8 --dat_rescore 4",
        "finetune --eval --suite corruptions --limit_corrupted 10",
        "finetune --no_split_norms --dat_share None",
        "pretrain --target both --words_weight 0.3 --tokenizer embedded",
        "pretrain --init x --decoder_warmup 3",
        # MAE's own command lines
        "finetune --batch_size 32 --model vit_base_patch16 --finetune x.pth --epochs 100 --blr 5e-4 --layer_decay 0.65 "
        "--weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --dist_eval",
        "finetune --eval --resume x.pth --model vit_base_patch16 --batch_size 16",
        "finetune --linear_probe --cls_token --finetune x.pth --epochs 90 --blr 0.1 --weight_decay 0.0 --dist_eval",
        "pretrain --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 --epochs 800 "
        "--warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05",
    ],
)
def test_flags_with_an_effect_are_accepted(line: str) -> None:
    load(line)


def test_a_recipe_may_contain_flags_that_wait_for_their_switch(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dat_share: 0.05\nat_eps: 0.03\n")
    assert load(f"finetune --config {recipe}")["dat_share"] == 0.05
    recipe.write_text("dat: symbolic\n")
    assert load(f"finetune --config {recipe} --dat_share 0.1")["dat_share"] == 0.1
    with pytest.raises(UsageError, match="--dat_share has no effect"):
        load(f"finetune --config {recipe} --dat none --dat_share 0.1")


def test_every_flag_in_the_table_exists() -> None:
    for verb, effects in EFFECTS.items():
        names = {flag.name for flag in VERBS[verb].command_line("").flags}
        unknown = {name for effect in effects for name in effect.flags} - names
        assert not unknown, verb
