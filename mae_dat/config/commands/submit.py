"""Flags of `mae-dat submit` and submit.py, the launcher."""

import dataclasses
from typing import Literal

from mae_dat.config.arguments import Command, description_of
from mae_dat.config.flags import flags_of

SUBMIT_USAGE = "[flags] VERB|SCRIPT.py [flags of the verb or script]"


@dataclasses.dataclass(frozen=True)
class JobConfig:
    """Submit a verb of mae-dat or a script as a job to SLURM, or run it on this machine in the background.

    Everything after the verb or script is passed to it. A job that is preempted, runs out of time or loses a node
    queues again and resumes from the newest checkpoint in its output folder.
    """

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


def launcher_command(program: str) -> Command:
    """Return the command line of the launcher; `program` is the command in the usage line."""
    python = "python " if program.endswith(".py") else ""
    jobs = ("--nodes 4 finetune --data_path DIR --dat", "--nodes 4 main_finetune.py --data_path DIR --dat")
    examples = [f"{python}{program} {words}" for words in jobs]
    return Command(program, description_of(JobConfig), flags_of(JobConfig), examples, SUBMIT_USAGE)
