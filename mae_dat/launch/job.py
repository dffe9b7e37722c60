"""The launcher's flags, and the job that they describe once the cluster is known."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from submitit.core.utils import JobPaths

from mae_dat.config.errors import ConfigError
from mae_dat.launch.slurm import array_indices


@dataclass(frozen=True)
class JobConfig:
    """Where and how long a job runs. Names follow MAE's launcher; None leaves the choice to the cluster."""

    nodes: int = 1
    """Machines."""
    ngpus: int | None = None
    """GPUs on each machine, with one task for each; 0 for one task without a GPU (default: 8 on SLURM, otherwise 1)."""
    timeout: int = 4320
    """Minutes after which SLURM stops the job; it then queues again."""
    partition: str | None = None
    """SLURM partition."""
    account: str | None = None
    """SLURM account."""
    qos: str | None = None
    """SLURM quality of service."""
    constraint: str | None = None
    """SLURM node features, such as volta32gb."""
    exclude: str | None = None
    """Nodes not to use, such as node[03-05],node17."""
    mem_gb: float | None = None
    """Memory on each machine in GB."""
    cpus_per_task: int = 10
    """CPU cores for each task."""
    array: str | None = None
    """Submit one job for each index, which replaces %a in the flags of the verb or script: 0-4, or 0,3,7, or 0-8:2;
    with %2 at the end, two jobs at a time."""
    comment: str | None = None
    """SLURM comment, such as the reason why the job needs priority."""
    job_dir: str = "output/jobs/%j"
    """Folder for logs and files of the job, which all machines can read; %j is the id of the job."""
    python: str | None = None
    """Command that starts Python on the nodes, such as 'apptainer exec --nv image.sif python'."""
    cluster: Literal["auto", "slurm", "local", "debug"] = "auto"
    """slurm, local (this machine, in the background), debug (this process), or auto: slurm if srun is found, otherwise
    local."""
    wait: bool = False
    """Show the log until the job ends, and return its exit code."""
    no_snapshot: bool = False
    """Run the code as it is when the job starts, and not a copy made now."""
    dry_run: bool = False
    """Print the batch file for SLURM, and submit nothing."""

    def resolve(self) -> "ResolvedJob":
        """Check the values and return the job on its cluster. Raises ConfigError for values that cannot work there."""
        cluster = self._choose_cluster()
        ngpus = (8 if cluster == "slurm" else 1) if self.ngpus is None else self.ngpus
        self._check_numbers(ngpus)
        self._check_text()
        if cluster != "slurm" and self.nodes > 1:
            raise ConfigError(
                f"--nodes {self.nodes}: without SLURM there is one machine; leave it out, or run where sbatch is"
            )
        if cluster != "slurm" and self.array is not None:
            raise ConfigError(f"--array {self.array}: only SLURM has arrays; without it, submit one job for each index")
        return ResolvedJob(self, cluster, ngpus, self._parse_array())

    def _choose_cluster(self) -> str:
        has_slurm = shutil.which("srun") is not None
        if self.dry_run:
            return "slurm"
        if self.cluster == "slurm" and not has_slurm:
            raise ConfigError(
                "--cluster slurm: there is no srun on PATH; submit from a login node, or use --cluster local"
            )
        if self.cluster == "auto":
            return "slurm" if has_slurm else "local"
        return self.cluster

    def _check_numbers(self, ngpus: int) -> None:
        minimum = {"nodes": 1, "ngpus": 0, "timeout": 1, "cpus_per_task": 1}
        for name, value in {**vars(self), "ngpus": ngpus}.items():
            if name in minimum and value < minimum[name]:
                raise ConfigError(f"--{name} {value}: must be {minimum[name]} or more")
        if self.mem_gb is not None and self.mem_gb <= 0:
            raise ConfigError(f"--mem_gb {self.mem_gb}: must be above 0")

    def _check_text(self) -> None:
        """Reject control characters: in a batch file, what follows a line break would be run as a command."""
        texts = {name: value for name, value in vars(self).items() if isinstance(value, str)}
        for name, value in {**texts, "job_dir": str(Path(self.job_dir).absolute())}.items():
            if not value.isprintable():
                raise ConfigError(f"--{name} {value!r}: line breaks and other control characters are not allowed")

    def _parse_array(self) -> tuple[int, ...] | None:
        try:
            return None if self.array is None else tuple(array_indices(self.array))
        except ValueError as error:
            raise ConfigError(
                f"--array {self.array}: {error}; it takes 0-4, 0,3,7 or 0-8:2, with %2 for two at once"
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
            raise ConfigError(f"--ngpus {self.ngpus}: CUDA_VISIBLE_DEVICES names only {len(gpus)}")
        return gpus
