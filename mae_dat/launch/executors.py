"""Submission through submitit: to SLURM, to this machine in the background, or to this process."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.core import Job, PicklingExecutor
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError, JobPaths
from submitit.local.debug import DebugExecutor

from mae_dat.config.errors import ConfigError
from mae_dat.launch.job import ResolvedJob
from mae_dat.launch.task import SIGNAL_DELAY_S, ScriptTask
from mae_dat.storage.files import prepare_output_folder

_NO_TIMEOUT_MINUTES = 60 * 24 * 365 * 100  # a job on this machine has no time limit
# A signal must not end the launcher's own Python before it can pass the signal on.
_UNTIL_READY = "trap '' TERM USR1 USR2; exec \"$@\""
# Variables of the allocation that the launcher may run in; they must not reach the job. submitit's `clean_env` is not
# used: it also removes the variables that name the cluster, and the user's own defaults for sbatch.
_OTHER_JOB_VARIABLES = re.compile(
    r"(SLURM|SLURMD|SRUN|SUBMITIT|TORCHELASTIC)_.*|MASTER_(ADDR|PORT)|(LOCAL_)?RANK|(LOCAL_)?WORLD_SIZE|MAE_DAT_RESTARTS"
)
_CLUSTER_VARIABLES = {"SLURM_CONF", "SLURM_CLUSTERS", "SUBMITIT_PREEMPT_SIGNAL"}


class _SlurmExecutor(submitit.SlurmExecutor):
    """SLURM's executor with the array's own indices, and without the check for SLURM, which a dry run does not need."""

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


def make_executor(job: ResolvedJob, name: str, code: Path, command: str) -> PicklingExecutor | DebugExecutor:
    """Build submitit's executor.

    `name` is the job's name in the queue, `code` the folder that mae_dat is imported from, `command` the command line
    that submits the job.
    """
    folder = Path(job.config.job_dir)
    if job.cluster == "debug":
        return DebugExecutor(folder)
    python = job.config.python or shlex.quote(sys.executable)
    # -P: import the package from PYTHONPATH, not one below the current folder.
    start = f"/bin/sh -c {shlex.quote(_UNTIL_READY)} sh {python} -P"
    if job.cluster == "local":
        executor: PicklingExecutor = submitit.LocalExecutor(folder, python=start)
        executor.update_parameters(
            tasks_per_node=job.tasks_per_node,
            gpus_per_node=job.ngpus,
            visible_gpus=job.visible_gpus(),
            timeout_min=_NO_TIMEOUT_MINUTES,
            stderr_to_stdout=True,
        )
        return executor
    executor = _SlurmExecutor(folder, python=start)
    executor.update_parameters(**_slurm_parameters(job, name, code, command))
    if job.indices is not None:
        executor.indices = job.indices
        executor.parameters["map_count"] = len(job.indices)
        executor.parameters["additional_parameters"] |= {"array": job.config.array, "hold": True}
    return executor


def _slurm_parameters(job: ResolvedJob, name: str, code: Path, command: str) -> dict[str, Any]:
    config = job.config
    python_path = f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    parameters = {
        "job_name": re.sub(r"[^\w.+-]", "_", name),
        "nodes": config.nodes,
        "ntasks_per_node": job.tasks_per_node,
        "gpus_per_node": job.ngpus or None,
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
        # As JSON, because text after a line break in a comment would be run.
        "setup": [f"# submitted with {json.dumps(command)}", python_path],
        # Without the first, the other ranks wait for a dead one until the time limit. Without the second, SLURM 22.05
        # and later give each task a single core.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={config.cpus_per_task}"],
        # Some clusters turn this off by default: it allows a restart after the loss of a node, and our own
        # `scontrol requeue`.
        "additional_parameters": {"requeue": True},
    }
    return {key: value for key, value in parameters.items() if value is not None}


def batch_file(job: ResolvedJob, task: ScriptTask, code: Path, command: str) -> str:
    """Return the batch file for sbatch, followed by the script's command line as a comment."""
    executor = make_executor(job, task.name, code, command)
    assert isinstance(executor, submitit.SlurmExecutor)
    text = executor._make_submission_file_text(executor._submitit_command_str, "")
    return f"{text}\n# every task runs: {shlex.join(task.command)}\n"


def submit_job(job: ResolvedJob, tasks: Sequence[ScriptTask], code: Path, command: str) -> list[Job[int]]:
    """Submit a job, or an array with a task for each index, and return its jobs.

    Raises OutputError for a job folder that cannot be written, ConfigError with sbatch's message if SLURM rejects it.
    """
    prepare_output_folder(job.folder)
    try:
        with clean_environment(code), _detached_from_terminal():
            executor = make_executor(job, tasks[0].name, code, command)
            if job.indices is None:
                return [executor.submit(tasks[0])]
            return executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        message = f"{error}: {error.stderr}" if isinstance(error, subprocess.CalledProcessError) else str(error)
        hint = ""
        if "configuration is not available" in message:
            hint = "Its nodes may have fewer GPUs, cores or memory: --ngpus, --cpus_per_task, --mem_gb. "
        raise ConfigError(f"SLURM rejected the job: {message}. {hint}See the batch file with --dry_run.") from error


@contextlib.contextmanager
def clean_environment(code: Path) -> Iterator[None]:
    """Give processes started in the block the environment of a login node, with `code` first on PYTHONPATH."""
    before = dict(os.environ)
    for name in before:
        if _OTHER_JOB_VARIABLES.fullmatch(name) and name not in _CLUSTER_VARIABLES:
            del os.environ[name]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [before.get("PYTHONPATH")])])
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _detached_from_terminal() -> Iterator[None]:
    """Start processes that survive a hang-up and Ctrl-C, and do not keep our output open; otherwise `submit.py | tee`
    would wait for them."""
    saved_streams = {stream: os.dup(stream) for stream in (1, 2)}
    handlers_before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGINT)}
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in saved_streams:
            os.dup2(devnull, stream)
        yield
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
        for stream, copy in saved_streams.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(devnull)
