"""Train from Python: `mae_dat.pretrain` and `mae_dat.finetune`."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, TypeVar

from mae_dat.config.errors import ConfigError
from mae_dat.config.flags import flat_values
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.config.signature import check_flag_names, takes_flags
from mae_dat.runtime.console import console_for_python
from mae_dat.runtime.device import restore_numerics
from mae_dat.runtime.run_log import read_log
from mae_dat.runtime.threads import set_threads
from mae_dat.storage.weight_files import WEIGHTS_FILE
from mae_dat.training.finetune import run_finetuning
from mae_dat.training.pretrain import run_pretraining

RunSettings = TypeVar("RunSettings", PretrainConfig, FinetuneConfig)


@dataclasses.dataclass(frozen=True, repr=False)
class TrainingResult:
    """What a training left behind."""

    output_dir: Path
    """The output folder: checkpoints, log.txt, config.yaml, weights. `load_model` opens it."""
    weights: Path
    """The exported model, `model.safetensors` in the output folder."""
    scores: dict[str, float]
    """Fine-tuning: test_acc1, test_acc5 and test_balanced_acc in percent, and test_loss, on the validation images.
    Pretraining: the losses of the last epoch."""

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.scores.items())
        return f"TrainingResult: {self.weights}\n{scores}".rstrip()


@takes_flags(FinetuneConfig, ("eval",))
def finetune(
    config: FinetuneConfig | str | Path | None = None, *, progress: bool = True, **flags: Any
) -> TrainingResult:
    """Fine-tune a classifier, plainly or with DAT: `mae-dat finetune`, from Python. To resume, repeat the call.

    Args:
        config: the settings: a `FinetuneConfig`, or a YAML file, or the name of a recipe such as "small_finetune".
        progress: whether to show a progress bar and the log.
        flags: flags of `mae-dat finetune` by their names, listed below; they take precedence over `config`. `dat=True`
            is `--dat`.

    Returns:
        A `TrainingResult` with the output folder, the exported weights and the scores on the validation images.

    Raises:
        UserError: settings, images or weights cannot be used (before the first step), the loss is not finite, or the
            run was interrupted after its progress was saved.

    Examples:
        >>> import mae_dat
        >>> result = mae_dat.finetune(
        ...     data_path="photos", output_dir="out", model="vit_demo_patch8", input_size=32, batch_size=4,
        ...     epochs=1, dat=True, num_workers=0, progress=False,
        ... )
        >>> result.weights.name, sorted(result.scores)
        ('model.safetensors', ['test_acc1', 'test_acc5', 'test_balanced_acc', 'test_loss'])
    """
    settings = _settings(FinetuneConfig, config, flags, "finetune")
    if settings.evaluation.eval:
        raise ConfigError("finetune(eval=True) evaluates nothing in Python: call mae_dat.evaluate.")
    with console_for_python(progress) as console, restore_numerics():
        set_threads(settings.run.threads)
        scores = run_finetuning(settings, console)
    return _result(settings.run.output_dir, scores)


@takes_flags(PretrainConfig)
def pretrain(
    config: PretrainConfig | str | Path | None = None, *, progress: bool = True, **flags: Any
) -> TrainingResult:
    """Pretrain a masked autoencoder on any images: `mae-dat pretrain`, from Python. To resume, repeat the call.

    Args:
        config: the settings: a `PretrainConfig`, or a YAML file, or the name of a recipe such as "small_pretrain".
        progress: whether to show a progress bar and the log.
        flags: flags of `mae-dat pretrain` by their names, listed below; they take precedence over `config`. `dat=True`
            is `--dat`.

    Returns:
        A `TrainingResult` with the output folder, the exported weights and the losses of the last epoch.

    Raises:
        UserError: as `finetune`.

    Examples:
        >>> import mae_dat
        >>> result = mae_dat.pretrain(
        ...     data_path="photos", output_dir="pre", model="mae_vit_demo_patch8", input_size=32, batch_size=4,
        ...     epochs=1, num_workers=0, progress=False,
        ... )
        >>> result.scores["train_loss"] > 0
        True
    """
    settings = _settings(PretrainConfig, config, flags, "pretrain")
    with console_for_python(progress) as console, restore_numerics():
        set_threads(settings.run.threads)
        run_pretraining(settings, console)
    records = read_log(Path(settings.run.output_dir) / "log.txt")
    losses = {name: value for name, value in (records[-1] if records else {}).items() if name.startswith("train_loss")}
    return _result(settings.run.output_dir, losses)


def _result(output_dir: str, scores: dict[str, float]) -> TrainingResult:
    return TrainingResult(Path(output_dir), Path(output_dir) / WEIGHTS_FILE, scores)


def _settings(
    kind: type[RunSettings], config: RunSettings | str | Path | None, flags: dict[str, Any], function: str
) -> RunSettings:
    """Return the settings of a call: those of `config`, the flags, then the defaults. Raises ConfigError."""
    check_flag_names(kind, flags, (), function)
    if _is_interactive():
        # Where someone works at the prompt, the watchdog would end their session together with a training that hangs.
        flags = {"hang_minutes": 0, **flags}
    if config is None:
        return kind.from_flags(**flags)
    if isinstance(config, str | Path):
        return kind.from_yaml(config, **flags)
    if not isinstance(config, kind):
        raise ConfigError(f"{function} takes a {kind.__name__}, a YAML file or a recipe, got {type(config).__name__}.")
    return kind.from_flags(**flat_values(config) | flags)  # also checks, and replaces ~, as on the command line


def _is_interactive() -> bool:
    """Return whether this process is a notebook or a prompt."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
