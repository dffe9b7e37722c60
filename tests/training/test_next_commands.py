"""The commands that a training prints at its end can be copied: each is a verb with valid flags."""

import shlex
from typing import Any

from mae_dat.config.arguments import split_verb
from mae_dat.config.groups import DataConfig, MaskConfig, RunConfig
from mae_dat.config.runs import PretrainConfig
from mae_dat.training.next_commands import after_detection, after_finetuning, after_pretraining
from mae_dat.verbs import VERBS

OUTPUT = "my runs/first"


def configurations(commands: list[str]) -> dict[str, Any]:
    """Parses each command as its verb does."""
    found: dict[str, Any] = {}
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "mae-dat"
        name, flags = split_verb(words, list(VERBS))
        found[name] = VERBS[name].load(flags, f"mae-dat {name}")
    return found


def test_after_pretraining() -> None:
    config = PretrainConfig(
        run=RunConfig(output_dir=OUTPUT),
        data=DataConfig("my images", input_size=(64, 96)),
        mae=MaskConfig("mae_vit_demo_patch8"),
    )
    found = configurations(after_pretraining(config))
    assert list(found) == ["finetune", "features", "visualize reconstruction"]
    finetuning = found["finetune"]
    assert (finetuning.classifier.finetune, finetuning.classifier.model) == (OUTPUT, "vit_demo_patch8")
    assert (finetuning.data.data_path, finetuning.data.image_size) == ("my images", (64, 96))
    assert finetuning.run.output_dir != OUTPUT
    (command, *_) = after_pretraining(PretrainConfig())
    assert command == "mae-dat finetune --finetune ./output_dir --model vit_large_patch16 --output_dir CLASSIFIER"


def test_after_finetuning() -> None:
    found = configurations(after_finetuning(OUTPUT, DataConfig("my images")))
    assert list(found) == ["predict", "evaluate", "convert"]
    assert found["evaluate"].suites.data_path == "my images"


def test_after_detection() -> None:
    found = configurations(after_detection(OUTPUT, DataConfig("my images")))
    assert list(found) == ["predict", "detect"]
    assert found["detect"].run.resume == OUTPUT
