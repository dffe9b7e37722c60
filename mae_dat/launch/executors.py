"""Jobs through submitit: on SLURM, on this machine in the background, or in this process."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.core import Job, PicklingExecutor
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths
from submitit.local.debug import DebugExecutor

from mae_dat.config.errors import ConfigError
from mae_dat.launch.slurm import array_indices
from mae_dat.launch.task import SIGNAL_DELAY_S, ScriptTask
from mae_dat.storage.files import prepare_output_folder

_FOR_EVER = 60 * 24 * 365 * 100  # minutes: nobody waits for a job on this machine to end
# The launcher's own Python must not die of a signal before it can pass it on.
_UNTIL_READY = "trap '' TERM USR1 USR2; exec \"$@\""
# Of an allocation that we are submitting from, nothing may reach the job.
_OF_ANOTHER_JOB = re.compile(
    r"(SLURM|SLURMD|SRUN|SUBMITIT|TORCHELASTIC)_.*|MASTER_(ADDR|PORT)|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MAE_DAT_RESTARTS"
)
_NAMES_THE_CLUSTER = {"SLURM_CONF", "SLURM_CLUSTERS", "SUBMITIT_PREEMPT_SIGNAL"}


def _flag(default: Any, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class JobConfig:
    """Where and how long a job runs. Names follow MAE's launcher; None leaves the choice to the cluster."""

    nodes: int = _flag(1, "machines", type=int)
    ngpus: int | None = _flag(
        None, "GPUs, and so tasks, on each machine; 0: one task without (default: 8 on SLURM, else 1)", type=int
    )
    timeout: int = _flag(4320, "minutes after which SLURM stops the job, which then queues again", type=int)
    partition: str | None = _flag(None, "SLURM partition")
    account: str | None = _flag(None, "SLURM account")
    qos: str | None = _flag(None, "SLURM quality of service")
    constraint: str | None = _flag(None, "SLURM node features, for instance volta32gb")
    exclude: str | None = _flag(None, "nodes not to use, for instance node[03-05],node17")
    mem_gb: float | None = _flag(None, "memory on each machine in GB", type=float)
    cpus_per_task: int = _flag(10, "CPU cores for each task", type=int)
    array: str | None = _flag(
        None, "one job for each index, which replaces %%a in the script's flags: 0-4, 0,3,7, 0-8:2; %%2 for two at once"
    )
    comment: str | None = _flag(None, "SLURM comment, for instance why the job needs priority")
    job_dir: str = _flag(
        "output/jobs/%j", "folder for logs and the job's files, seen by all machines; %%j is the job id"
    )
    python: str | None = _flag(
        None, "command that starts Python on the nodes, for instance 'apptainer exec --nv image.sif python'"
    )
    cluster: str = _flag(
        "auto", "auto: SLURM if it is here, else this machine", choices=("auto", "slurm", "local", "debug")
    )
    wait: bool = _flag(False, "show the log until the end, and return the script's exit code", action="store_true")
    no_snapshot: bool = _flag(
        False, "run the code as it will be when the job starts, not a copy of it as it is now", action="store_true"
    )
    dry_run: bool = _flag(False, "print the batch file that SLURM would get and submit nothing", action="store_true")

    def resolve(self) -> "ResolvedJob":
        """Settle what depends on the cluster. ConfigError for values that cannot work, there or anywhere."""
        cluster = self._chosen_cluster()
        ngpus = (8 if cluster == "slurm" else 1) if self.ngpus is None else self.ngpus
        least = {"nodes": (self.nodes, 1), "ngpus": (ngpus, 0), "timeout": (self.timeout, 1)}
        least["cpus_per_task"] = (self.cpus_per_task, 1)
        for name, (value, smallest) in least.items():
            if value < smallest:
                raise ConfigError(f"--{name} {value}: must be {smallest} or more")
        if self.mem_gb is not None and self.mem_gb <= 0:
            raise ConfigError(f"--mem_gb {self.mem_gb}: must be above 0")
        if cluster != "slurm" and self.nodes > 1:
            raise ConfigError(
                f"--nodes {self.nodes}: without SLURM there is one machine; leave it out, or run where sbatch is"
            )
        if cluster != "slurm" and self.array is not None:
            raise ConfigError(f"--array {self.array}: only SLURM has arrays; without it, submit one job for each index")
        self._check_text()
        return ResolvedJob(self, cluster, ngpus, _indices(self.array))

    def _check_text(self) -> None:
        """In a batch file, what follows a line break would be run as a command."""
        values = {name: value for name, value in vars(self).items() if isinstance(value, str)}
        for name, value in {**values, "job_dir": str(Path(self.job_dir).absolute())}.items():
            if not value.isprintable():
                raise ConfigError(f"--{name} {value!r}: line breaks and other control characters cannot stand here")

    def _chosen_cluster(self) -> str:
        slurm_here = shutil.which("srun") is not None
        if self.dry_run:
            return "slurm"
        if self.cluster == "slurm" and not slurm_here:
            raise ConfigError(
                "--cluster slurm: there is no srun on PATH; submit from a login node, or use --cluster local"
            )
        if self.cluster == "auto":
            return "slurm" if slurm_here else "local"
        return self.cluster


def _indices(array: str | None) -> tuple[int, ...] | None:
    try:
        return None if array is None else tuple(array_indices(array)[0])
    except ValueError as error:
        raise ConfigError(f"--array {array}: {error}; it takes 0-4, 0,3,7 or 0-8:2, with %2 for two at once") from error


@dataclass(frozen=True)
class ResolvedJob:
    """A launch whose cluster ("slurm", "local" or "debug"), GPUs and array indices are settled."""

    config: JobConfig
    cluster: str
    ngpus: int
    indices: tuple[int, ...] | None = None

    @property
    def tasks_per_node(self) -> int:
        """One for each GPU, or one."""
        return max(1, self.ngpus)

    @property
    def folder(self) -> Path:
        """The part of the job folder's path that is the same for all jobs."""
        return Path(JobPaths.get_first_id_independent_folder(self.config.job_dir))


class _SlurmExecutor(submitit.SlurmExecutor):
    """SLURM's executor with the array's own indices, and without the check that SLURM is here: a dry run needs none."""

    indices: tuple[int, ...] | None = None

    @classmethod
    def affinity(cls) -> int:
        return 2

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[Job[Any]]:
        if self.indices is None:
            jobs: list[Job[Any]] = super()._internal_process_submissions(delayed_submissions)
            return jobs
        # The array is held until the folder and the command of every element are there.
        array = self._submit_command(self._submitit_command_str).job_id
        try:
            jobs = []
            for index, delayed in zip(self.indices, delayed_submissions, strict=True):
                jobs.append(self.job_class(self.folder, f"{array}_{index}", range(self._num_tasks())))
                temporary = JobPaths.get_first_id_independent_folder(self.folder) / f"{uuid.uuid4().hex}.pkl"
                delayed.dump(temporary)
                jobs[-1].paths.move_temporary_file(temporary, "submitted_pickle")
            subprocess.run(["scontrol", "release", array], check=True, capture_output=True, text=True)
        except BaseException:
            subprocess.run(["scancel", array])
            raise
        return jobs


def make_executor(launch: ResolvedJob, name: str, code: Path, command: str) -> PicklingExecutor | DebugExecutor:
    """Build submitit's executor. `name` is the job's in the queue, `code` the folder that mae_dat is imported from,
    `command` what was typed to submit it."""
    folder = Path(launch.config.job_dir)
    if launch.cluster == "debug":
        return DebugExecutor(folder)
    python = launch.config.python or shlex.quote(sys.executable)
    # -P: not the package below the current folder, but the one that PYTHONPATH names.
    start = f"/bin/sh -c {shlex.quote(_UNTIL_READY)} sh {python} -P"
    if launch.cluster == "local":
        executor: PicklingExecutor = submitit.LocalExecutor(folder, python=start)
        executor.update_parameters(
            tasks_per_node=launch.tasks_per_node,
            gpus_per_node=launch.ngpus,
            visible_gpus=_visible_gpus(launch.ngpus),
            timeout_min=_FOR_EVER,
            stderr_to_stdout=True,
        )
        return executor
    executor = _SlurmExecutor(folder, python=start)
    executor.update_parameters(**_slurm_parameters(launch, name, code, command))
    if launch.indices is not None:
        executor.indices = launch.indices
        executor.parameters["map_count"] = len(launch.indices)
        executor.parameters["additional_parameters"] |= {"array": launch.config.array, "hold": True}
    return executor


def _visible_gpus(ngpus: int) -> tuple[int, ...]:
    """The GPUs of this machine that the user has chosen; empty for the first ones. ConfigError if they are too few."""
    chosen = [word for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip().isdecimal()]
    if chosen and len(chosen) < ngpus:
        raise ConfigError(f"--ngpus {ngpus}: CUDA_VISIBLE_DEVICES names only {len(chosen)}")
    return tuple(map(int, chosen))


def _slurm_parameters(launch: ResolvedJob, name: str, code: Path, command: str) -> dict[str, Any]:
    config = launch.config
    paths = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    parameters = {
        "job_name": re.sub(r"[^\w.+-]", "_", name),
        "nodes": config.nodes,
        "ntasks_per_node": launch.tasks_per_node,
        "gpus_per_node": launch.ngpus or None,
        "cpus_per_task": config.cpus_per_task,
        "time": config.timeout,
        "mem": None if config.mem_gb is None else f"{round(config.mem_gb * 1024)}MB",
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "exclude": config.exclude,
        "comment": config.comment,
        "signal_delay_s": SIGNAL_DELAY_S,
        "stderr_to_stdout": True,  # one log, in order
        # As JSON: in a comment, what follows a line break would be run.
        "setup": [f"# submitted with {json.dumps(command)}", paths],
        # Without the first, the other ranks wait for a dead one until the time limit. Without the second, SLURM from
        # 22.05 on gives each task a single core.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={config.cpus_per_task}"],
        # Also where the cluster's default is not to: after a node's loss, and for our own `scontrol requeue`.
        "additional_parameters": {"requeue": True},
    }
    return {key: value for key, value in parameters.items() if value is not None}


def batch_file(launch: ResolvedJob, task: ScriptTask, code: Path, command: str) -> str:
    """Return the text that sbatch would get, with the script's command line as a comment below."""
    executor = make_executor(launch, task.name, code, command)
    assert isinstance(executor, submitit.SlurmExecutor)
    text = executor._make_submission_file_text(executor._submitit_command_str, "")
    return f"{text}\n# every task runs: {shlex.join(task.command)}\n"


def submit(launch: ResolvedJob, tasks: Sequence[ScriptTask], code: Path, command: str) -> list[Job[int]]:
    """Submit the job, or the array with a task for each index. OutputError for an unwritable job folder, ConfigError
    with sbatch's own words if it refuses."""
    prepare_output_folder(launch.folder)
    try:
        with outside_other_jobs(code), _outliving_this_terminal():
            executor = make_executor(launch, tasks[0].name, code, command)
            if launch.indices is None:
                return [executor.submit(tasks[0])]
            return executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        told = str(error) if not isinstance(error, subprocess.CalledProcessError) else f"{error}: {error.stderr}"
        hint = "Its nodes may have fewer GPUs, cores or memory: --ngpus, --cpus_per_task, --mem_gb. "
        hint = hint if "configuration is not available" in told else ""
        raise ConfigError(f"SLURM refused the job: {told}. {hint}Look at the batch file with --dry_run.") from error


@contextlib.contextmanager
def outside_other_jobs(code: Path) -> Iterator[None]:
    """The environment as of a login node, and of the code that runs, for the processes that are started inside."""
    before = dict(os.environ)
    for name in before:
        if _OF_ANOTHER_JOB.fullmatch(name) and name not in _NAMES_THE_CLUSTER:
            del os.environ[name]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [before.get("PYTHONPATH")])])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _outliving_this_terminal() -> Iterator[None]:
    """Start processes that neither hang-up nor Ctrl-C ends and that do not hold our output: `submit.py | tee` would
    wait for them."""
    saved = {stream: os.dup(stream) for stream in (1, 2)}
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in saved:
            os.dup2(nowhere, stream)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for stream, copy in saved.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)
