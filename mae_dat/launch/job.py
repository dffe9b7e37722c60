"""The job that the flags of the launcher describe, once the cluster is known."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import JobPaths

from mae_dat.config.commands.submit import JobConfig
from mae_dat.config.errors import ConfigError
from mae_dat.launch.slurm import array_indices


def resolve_job(config: JobConfig) -> "ResolvedJob":
    """Check the flags and return the job on its cluster. Raises ConfigError for values that cannot work there."""
    cluster = _choose_cluster(config)
    ngpus = (8 if cluster == "slurm" else 1) if config.ngpus is None else config.ngpus
    _check_numbers(config)
    _check_text(config)
    if cluster != "slurm" and config.nodes > 1:
        raise ConfigError(
            f"--nodes {config.nodes}: without SLURM there is one machine. Leave the flag out, or submit from a machine "
            "with sbatch."
        )
    if cluster != "slurm" and config.array is not None:
        raise ConfigError(f"--array {config.array}: only SLURM has arrays. Without SLURM, submit a job for each index.")
    return ResolvedJob(config, cluster, ngpus, _parse_array(config.array))


def _choose_cluster(config: JobConfig) -> str:
    has_slurm = shutil.which("srun") is not None
    if config.dry_run:
        return "slurm"
    if config.cluster == "slurm" and not has_slurm:
        raise ConfigError("--cluster slurm: srun is not on PATH. Submit from a login node, or give --cluster local.")
    if config.cluster == "auto":
        return "slurm" if has_slurm else "local"
    return config.cluster


def _check_numbers(config: JobConfig) -> None:
    for name, minimum in {"nodes": 1, "ngpus": 0, "timeout": 1, "cpus_per_task": 1}.items():
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ConfigError(f"--{name} must be {minimum} or more, got {value}.")
    if config.mem_gb is not None and config.mem_gb <= 0:
        raise ConfigError(f"--mem_gb must be above 0, got {config.mem_gb:g}.")


def _check_text(config: JobConfig) -> None:
    """Reject control characters: in a batch file, what follows a line break would be run as a command."""
    texts = {name: value for name, value in vars(config).items() if isinstance(value, str)}
    for name, value in {**texts, "job_dir": str(Path(config.job_dir).absolute())}.items():
        if not value.isprintable():
            raise ConfigError(f"--{name} {value!r} contains a line break or another control character: remove it.")


def _parse_array(array: str | None) -> tuple[int, ...] | None:
    try:
        return None if array is None else tuple(array_indices(array))
    except ValueError as error:
        raise ConfigError(
            f"--array {array}: {error}. Give indices such as 0-4, 0,3,7 or 0-8:2, with %2 at the end for two at a time."
        ) from error


@dataclass(frozen=True)
class ResolvedJob:
    """A job whose cluster ("slurm", "local" or "debug"), number of GPUs and array indices are known."""

    config: JobConfig
    cluster: str
    ngpus: int
    indices: tuple[int, ...] | None = None

    @property
    def tasks_per_node(self) -> int:
        """One task for each GPU, or one task without GPUs."""
        return max(1, self.ngpus)

    @property
    def folder(self) -> Path:
        """The part of the job folder's path that does not depend on the job id."""
        return Path(JobPaths.get_first_id_independent_folder(self.config.job_dir))

    def visible_gpus(self) -> tuple[int, ...]:
        """Return the GPUs of this machine that CUDA_VISIBLE_DEVICES names; empty for the first ones.

        Raises ConfigError if they are fewer than `ngpus`.
        """
        words = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = tuple(int(word) for word in words if word.strip().isdecimal())
        if gpus and len(gpus) < self.ngpus:
            raise ConfigError(f"--ngpus {self.ngpus}: CUDA_VISIBLE_DEVICES names only {len(gpus)}.")
        return gpus
