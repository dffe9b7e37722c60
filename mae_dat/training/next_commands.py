"""The commands that a user is likely to run after a training, printed at its end."""

import logging
import shlex
from collections.abc import Sequence

from mae_dat.config.groups import DataConfig
from mae_dat.config.runs import PretrainConfig

logger = logging.getLogger(__name__)


def after_finetuning(output_dir: str, data: DataConfig) -> list[str]:
    """Return commands that use a classifier: predict, evaluate, convert."""
    output = shlex.quote(output_dir)
    return [
        f"mae-dat predict IMAGES --checkpoint {output} --output_dir PREDICTIONS",
        f"mae-dat evaluate --checkpoint {output}{_data_path(data)}",
        f"mae-dat convert {output} model.safetensors --to timm",
    ]


def after_pretraining(config: PretrainConfig) -> list[str]:
    """Return commands that use a pretrained autoencoder: fine-tune it, extract features, draw reconstructions."""
    output, data = shlex.quote(config.run.output_dir), _data_path(config.data)
    sides = config.data.image_size
    size = "" if sides == (224, 224) else f" --input_size {' '.join(map(str, dict.fromkeys(sides)))}"
    model = config.mae.model.removeprefix("mae_")
    return [
        f"mae-dat finetune --finetune {output} --model {model}{size}{data} --output_dir CLASSIFIER",
        f"mae-dat features --checkpoint {output}{data} --output_dir FEATURES",
        f"mae-dat visualize reconstruction --checkpoint {output} --images IMAGES",
    ]


def after_detection(output_dir: str, data: DataConfig) -> list[str]:
    """Return commands that use a detector: predict boxes, measure it on corrupted images."""
    output = shlex.quote(output_dir)
    return [
        f"mae-dat predict IMAGES --checkpoint {output} --output_dir PREDICTIONS",
        f"mae-dat detect --eval --corrupted --resume {output}{_data_path(data)}",
    ]


def _data_path(data: DataConfig) -> str:
    """Return the flag of the image folder, preceded by a space; nothing where the environment names it."""
    return f" --data_path {shlex.quote(data.data_path)}" if data.data_path else ""


def log_next_commands(output_dir: str, commands: Sequence[str]) -> None:
    """Log where the model is, and the commands that may follow."""
    logger.info("The model is in %s. Next:\n%s", output_dir, "\n".join(f"  {command}" for command in commands))
