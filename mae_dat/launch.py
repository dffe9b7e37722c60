"""Training on a cluster through submitit: one task a GPU, each running the script with torch's rank variables set.

`submit.py [launcher flags] SCRIPT.py [script flags]`: everything after the script is passed on untouched. A preempted
or timed-out job is put back into the queue with the same command; that it goes on where it stopped is a property of
the script's output folder, so nothing about progress is kept here.
"""

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import submitit
from submitit.core.core import PicklingExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.local.debug import DebugExecutor

from mae_dat.config import FinetuneConfig, PretrainConfig, data_root, load_config, nearest
from mae_dat.errors import ConfigError, MissingInputError, UserError
from mae_dat.files import prepare_output_folder

logger = logging.getLogger(__name__)

_KNOWN_SCRIPTS: dict[str, type] = {"main_pretrain.py": PretrainConfig, "main_finetune.py": FinetuneConfig}
_SIGNAL_DELAY_S = 120  # how long before the end of its time a job is told: enough to write a checkpoint
_STOP_GRACE_S = 60  # how long a script may take to end after SIGTERM; below the delay above


def _flag(default: Any, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class JobConfig:
    """Where and how long a job runs. Names follow MAE's launcher; None leaves the choice to the cluster."""

    nodes: int | None = _flag(None, "machines (default: 2 on SLURM, else 1)", type=int)
    ngpus: int | None = _flag(None, "GPUs, and so tasks, on each machine (default: 8 on SLURM, else 1)", type=int)
    timeout: int = _flag(4320, "minutes after which the job is stopped and put back into the queue", type=int)
    partition: str | None = _flag(None, "SLURM partition")
    account: str | None = _flag(None, "SLURM account")
    qos: str | None = _flag(None, "SLURM quality of service")
    constraint: str | None = _flag(None, "SLURM node features, for instance volta32gb")
    mem_gb: float | None = _flag(None, "memory on each machine in GB", type=float)
    cpus_per_task: int = _flag(10, "CPU cores for each task", type=int)
    comment: str | None = _flag(None, "SLURM comment, for instance why the job needs priority")
    job_dir: str = _flag(
        "output/jobs/%j", "folder for logs and the job's files, seen by all machines; %%j is the job id"
    )
    cluster: str = _flag(
        "auto", "auto: SLURM if it is here, else this machine", choices=("auto", "slurm", "local", "debug")
    )
    dry_run: bool = _flag(False, "print the batch file that SLURM would get and submit nothing", action="store_true")

    def resolve(self) -> "ResolvedJob":
        """Settle what depends on the cluster. ConfigError for counts below 1 and for several machines without SLURM."""
        cluster = self._chosen_cluster()
        scale = (2, 8) if cluster == "slurm" else (1, 1)
        nodes = scale[0] if self.nodes is None else self.nodes
        ngpus = scale[1] if self.ngpus is None else self.ngpus
        counts = {"nodes": nodes, "ngpus": ngpus, "timeout": self.timeout, "cpus_per_task": self.cpus_per_task}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"--{name} {value}: must be 1 or more")
        if self.mem_gb is not None and self.mem_gb <= 0:
            raise ConfigError(f"--mem_gb {self.mem_gb}: must be above 0")
        if cluster != "slurm" and nodes > 1:
            raise ConfigError(
                f"--nodes {nodes}: without SLURM there is one machine; leave --nodes out, or run where sbatch is"
            )
        return ResolvedJob(self, cluster, nodes, ngpus)

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


@dataclass(frozen=True)
class ResolvedJob:
    """A launch whose cluster ("slurm", "local" or "debug") and counts are settled."""

    config: JobConfig
    cluster: str
    nodes: int
    ngpus: int


@dataclass
class ScriptTask:
    """What one task of the job does: run the script as a process of its own and answer for its exit code."""

    script: str
    args: tuple[str, ...]

    def __post_init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        """The script's command line, in the Python that runs this."""
        return [sys.executable, self.script, *self.args]

    def __call__(self) -> int:
        """Run the script with torch's rank variables in its environment; RuntimeError unless it ends with 0."""
        with self._running() as child:
            _has_ended(child.pid)
            code = child.wait()
        if code != 0:
            raise RuntimeError(f"{shlex.join(self.command)} ended with exit code {code}; its own messages stand above")
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Let the script save and end, then name its successor; submitit calls this before it requeues the job."""
        if self._child is not None:
            _stop(self._child)
        return submitit.helpers.DelayedSubmission(ScriptTask(self.script, self.args))

    @contextlib.contextmanager
    def _running(self) -> Iterator[subprocess.Popen[bytes]]:
        environment = os.environ | rank_variables() | {"PYTHONUNBUFFERED": "1"}
        # SLURM may send the preemption signal to every process of the task; its default action would kill the script
        # before it could save. The shell makes the script ignore it, unless that sets a handler of its own.
        shield = ["/bin/sh", "-c", f"trap '' {submitit.JobEnvironment.USR_SIG}; exec \"$@\"", "sh"]
        self._child = subprocess.Popen([*shield, *self.command], env=environment)
        try:
            yield self._child
        finally:
            _stop(self._child)
            self._child.wait()
            self._child = None


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """End the script: SIGTERM, on which it saves; SIGKILL if it takes longer than the grace time."""
    if child.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_GRACE_S
        while not _has_ended(child.pid, os.WNOHANG):
            if time.monotonic() > deadline:
                os.kill(child.pid, signal.SIGKILL)
                return
            time.sleep(0.05)


def _has_ended(pid: int, flags: int = 0) -> bool:
    """Whether a child has ended; without WNOHANG it waits until then.

    Not `Popen.wait`, which holds a lock: submitit calls `checkpoint` from a signal handler, while we are waiting.
    """
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | flags) is not None
    except ChildProcessError:
        return True


def rank_variables() -> dict[str, str]:
    """Return torch's env:// variables for the task that calls; RuntimeError outside a submitit job."""
    place = submitit.helpers.TorchDistributedEnvironment()
    # One machine talks to itself: not every machine can resolve its own name.
    address = "127.0.0.1" if submitit.JobEnvironment().num_nodes == 1 else place.master_addr
    return {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(place.master_port),
        "RANK": str(place.rank),
        "WORLD_SIZE": str(place.world_size),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
    }


class _AnywhereSlurmExecutor(submitit.SlurmExecutor):
    """SLURM's executor without the check that SLURM is here, so that a dry run needs no cluster."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def make_executor(launch: ResolvedJob, name: str) -> PicklingExecutor | DebugExecutor:
    """Build submitit's executor for the launch; `name` is the job's name in the queue."""
    folder = Path(launch.config.job_dir)
    if launch.cluster == "debug":
        return DebugExecutor(folder)
    if launch.cluster == "local":
        executor: PicklingExecutor = submitit.LocalExecutor(folder)
        counts = {"nodes": launch.nodes, "tasks_per_node": launch.ngpus, "gpus_per_node": launch.ngpus}
        executor.update_parameters(timeout_min=launch.config.timeout, signal_delay_s=_SIGNAL_DELAY_S, **counts)
        return executor
    executor = _AnywhereSlurmExecutor(folder)
    executor.update_parameters(**_slurm_parameters(launch, name))
    return executor


def _slurm_parameters(launch: ResolvedJob, name: str) -> dict[str, Any]:
    config = launch.config
    parameters = {
        "job_name": name,
        "nodes": launch.nodes,
        "ntasks_per_node": launch.ngpus,
        "gpus_per_node": launch.ngpus,
        "cpus_per_task": config.cpus_per_task,
        "time": config.timeout,
        "mem": None if config.mem_gb is None else f"{round(config.mem_gb * 1024)}MB",
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "comment": config.comment,
        "signal_delay_s": _SIGNAL_DELAY_S,
        # Without it the other ranks wait for a dead one until the time limit.
        "srun_args": ["--kill-on-bad-exit=1"],
    }
    return {key: value for key, value in parameters.items() if value is not None}


def batch_file(launch: ResolvedJob, task: ScriptTask) -> str:
    """Return the text that sbatch would get, with the script's command line as a comment below."""
    executor = make_executor(launch, Path(task.script).stem)
    assert isinstance(executor, submitit.SlurmExecutor)
    text = executor._make_submission_file_text(executor._submitit_command_str, "")
    return f"{text}\n# every task runs: {shlex.join(task.command)}\n"


def submit(launch: ResolvedJob, task: ScriptTask) -> submitit.Job[int]:
    """Submit the job. OutputError for an unwritable job folder, ConfigError with sbatch's own words if it refuses."""
    prepare_output_folder(JobPaths.get_first_id_independent_folder(launch.config.job_dir))
    try:
        with _outliving_this_terminal():
            return make_executor(launch, Path(task.script).stem).submit(task)
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(f"sbatch refused the job: {error}. Look at the batch file with --dry_run.") from error


@contextlib.contextmanager
def _outliving_this_terminal() -> Iterator[None]:
    """Start processes that no hang-up ends and that do not hold our output: `submit.py | tee` would wait for them."""
    saved = {stream: os.dup(stream) for stream in (1, 2)}
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in saved:
            os.dup2(nowhere, stream)
        yield
    finally:
        signal.signal(signal.SIGHUP, hang_up)
        for stream, copy in saved.items():
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def _flag_names() -> dict[str, bool]:
    """Every spelling of every launcher flag, and whether it takes a value."""
    names: dict[str, bool] = {"-h": False, "--help": False}
    for item in fields(JobConfig):
        for spelling in (item.name, item.name.replace("_", "-")):
            names[f"--{spelling}"] = item.metadata.get("action") != "store_true"
    return names


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into launcher flags and [script, script flags...]; the first word that is no flag or value is the script.

    ConfigError for a flag before the script that the launcher does not have.
    """
    names = _flag_names()
    position = 0
    while position < len(argv) and argv[position].startswith("-"):
        name, equals, _ = argv[position].partition("=")
        if name not in names:
            hint = nearest(name, [f"--{item.name}" for item in fields(JobConfig)])
            raise ConfigError(f"unknown launcher flag {name}: {hint} Flags of the script come after the script.")
        position += 2 if names[name] and not equals else 1
    return list(argv[:position]), list(argv[position:])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        usage="submit.py [launcher flags] SCRIPT.py [script flags]",
        description="Submit a training script to SLURM, or run it on this machine in the background.",
        epilog="Everything after the script goes to the script. Jobs that are preempted or run out of time are put "
        "back into the queue with the same command and go on from the newest checkpoint in the script's output folder.",
        allow_abbrev=False,
    )
    for item in fields(JobConfig):
        options = {"default": item.default, **item.metadata}
        if item.default not in (None, False):
            options["help"] += f" (default: {str(item.default).replace('%', '%%')})"
        parser.add_argument(*dict.fromkeys((f"--{item.name}", f"--{item.name.replace('_', '-')}")), **options)
    return parser


def parse(argv: Sequence[str]) -> tuple[JobConfig, ScriptTask]:
    """Read the command line. ConfigError for a mistyped flag or no script, MissingInputError if there is no such file.

    A value of the wrong type, and a mistyped flag of our own scripts, end the program with exit code 2 and a message.
    """
    flags, rest = split_command(argv)
    config = JobConfig(**vars(_parser().parse_args(flags)))
    if not rest:
        raise ConfigError("no script: submit.py [launcher flags] SCRIPT.py [script flags]")
    script = _existing_script(Path(rest[0]))
    names = _flag_names()
    for flag in (word.partition("=")[0] for word in rest[1:]):
        if flag in names:
            logger.warning("%s stands after %s and so goes to the script, not to the launcher", flag, script.name)
    if kind := _KNOWN_SCRIPTS.get(script.name):
        _check_script(load_config(kind, rest[1:]), config.dry_run)  # now, not after a night in the queue
    return config, ScriptTask(str(script), tuple(rest[1:]))


def _check_script(settings: FinetuneConfig | PretrainConfig, dry_run: bool) -> None:
    """ConfigError for a script that would stop for want of images; the environment goes to the job with it."""
    try:
        data_root(settings.data.data_path)
    except ConfigError as error:
        if not dry_run:
            raise
        logger.warning("as it stands the job would stop at once: %s", error)


def _existing_script(path: Path) -> Path:
    if path.is_file() and path.suffix == ".py":
        return path.absolute()
    if path.exists():
        raise ConfigError(f"{path} is no Python script: name one that ends in .py")
    scripts = sorted(map(str, path.parent.glob("*.py")))
    raise MissingInputError(f"no such script: {path}: {nearest(str(path), scripts) if scripts else 'wrong folder?'}")


def describe(job: submitit.Job[int], launch: ResolvedJob, task: ScriptTask) -> str:
    """Say what was submitted, where its log is, and how to follow and cancel it."""
    slurm = launch.cluster == "slurm"
    rows = {
        "log": f"{job.paths.stdout} (errors: {job.paths.stderr})",
        "follow": f"tail -F {shlex.quote(str(job.paths.stdout))} {shlex.quote(str(job.paths.stderr))}",
        "state": f"squeue --job {job.job_id}" if slurm else f"ps {job.job_id}",
        "cancel": f"scancel {job.job_id}" if slurm else f"kill -INT {job.job_id}",
    }
    where = f"{launch.cluster}, {launch.nodes} x {launch.ngpus} tasks"
    lines = [f"submitted job {job.job_id} ({where}): {Path(task.script).name}"]
    return "\n".join(lines + [f"  {name:<7} {value}" for name, value in rows.items()])


def _run_here(job: submitit.Job[int]) -> int:
    """Run a debug job to its end in this process and return the exit code."""
    # Not through job.result(): that opens a debugger on an error.
    os.environ["SUBMITIT_DEBUG_JOB_ID"] = job.job_id
    try:
        error = job.exception()
    finally:
        del os.environ["SUBMITIT_DEBUG_JOB_ID"]
    if error is not None:
        logger.error("the job failed: %s", error)
    return int(error is not None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of submit.py; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config, task = parse(sys.argv[1:] if argv is None else argv)
        launch = config.resolve()
        if config.dry_run:
            print(batch_file(launch, task), end="")
            return 0
        job = submit(launch, task)
        if launch.cluster == "debug":
            return _run_here(job)
        print(describe(job, launch, task))
        return 0
    except UserError as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return error.exit_code
