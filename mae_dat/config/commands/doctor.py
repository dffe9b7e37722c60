"""Flags of `mae-dat doctor`."""

import dataclasses
from typing import Literal

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.command_config import CommandConfig
from mae_dat.config.groups import ImageSize, image_size

_DEMO_SIZE, _USUAL_SIZE = (64, 64), (224, 224)


@dataclasses.dataclass(frozen=True)
class DoctorConfig(CommandConfig):
    """Check the installation: versions, devices, disks, one run of each kind, and the batch size that fits.

    A problem is shown with its fix. The exit code is 0 if no check failed, and 78 otherwise. No files are left behind.
    """

    verb = "doctor"
    quick: bool = False
    """Check only versions, devices and disks: no training, no second process, no batch size."""
    output_dir: str = "./output_dir"
    """Folder whose disk is checked. It is not created."""
    device: str = "auto"
    """cuda, cuda:N, cpu, or auto: CUDA if there is a GPU."""
    threads: int | None = None
    """Threads of each process for computation (default: its share of the CPU cores that a quota leaves)."""
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    """Precision of the trainings, as in `mae-dat finetune`."""
    model: str | None = None
    """Model whose batch size is measured: as in `mae-dat finetune`, or mae_NAME as in `mae-dat pretrain` (default:
    vit_base_patch16; on a CPU vit_demo_patch8)."""
    input_size: tuple[int, ...] = ()
    """Side, or height and width, in pixels (default: 224; 64 for the demo's models)."""
    checkpoint_activations: bool = False
    """Measure with recomputed activations, as in `mae-dat finetune`."""
    dat: DatConfig = DatConfig()

    def __post_init__(self) -> None:
        if self.input_size:
            image_size(self.input_size)
        _ = self.dat.attack  # raises ConfigError for settings that cannot work

    def model_on(self, device_type: str) -> str:
        """Return the model whose batch size is measured on a device of this type, `cuda` or `cpu`."""
        return self.model or ("vit_demo_patch8" if device_type == "cpu" else "vit_base_patch16")

    def size_of(self, model: str) -> ImageSize:
        """Return the input's height and width in pixels for a model."""
        if self.input_size:
            return image_size(self.input_size)
        return _DEMO_SIZE if "_demo_" in model else _USUAL_SIZE
