"""A command that fails before it wrote anything leaves no output folder, whichever command it is."""

from pathlib import Path

import pytest

from mae_dat.cli import run
from mae_dat.config.errors import UserError

DATA = ["--data_path", "IMAGES"]
SMALL = [*DATA, "--input_size", "32", "--epochs", "1", "--num_workers", "0", "--device", "cpu"]
FAILING = {
    "pretrain": ["--model", "mae_vit_demo_patch8", *SMALL, "--dat", "--tokenizer", "none.safetensors"],
    "finetune": ["--model", "vit_demo_patch8", *SMALL, "--nb_classes", "3"],
    "finetune --eval": ["--resume", "mae_dat_demo", *DATA, "--suite", "none"],
    "detect": ["--data_path", "demo", "--model", "none"],
    "tokenizer distill": ["--teacher", "none", *DATA],
    "evaluate": ["--checkpoint", "mae_dat_demo", *DATA, "--suite", "imagenet-a", "--device", "cpu"],
    "predict": ["IMAGES/val", "--checkpoint", "mae_dat_demo", "--calibrate", "none", "--device", "cpu"],
    "features": ["--checkpoint", "none", *DATA],
    "compare": [*DATA, "--finetune_flags=--batch_size 999"],
    "proof": ["--data_path", "IMAGES", "IMAGES"],
    "demo": ["--finetune_config", "none"],
    "visualize reconstruction": ["--checkpoint", "mae_dat_demo", "--images", "IMAGES/val"],
    "analyze": ["--checkpoint", "mae_dat_demo", *DATA, "--views", "none"],
    "report": ["IMAGES"],
    "get": ["none"],
}


@pytest.mark.parametrize("verb", FAILING)
def test_a_failed_command_leaves_no_folder(
    verb: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("IMAGES", str(images)) for word in [*verb.split(), *FAILING[verb]]]
    with pytest.raises(UserError):
        run([*words, "--output_dir", "new/out"])
    assert not list(tmp_path.iterdir())
