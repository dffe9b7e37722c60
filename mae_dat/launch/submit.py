"""The command line of submit.py and `mae-dat submit`: jobs on a cluster through submitit, one task for each GPU, with
torch's rank variables.

`submit [flags] VERB|SCRIPT.py [flags of the verb or script]`: everything after the verb or script is passed to it
unchanged. A job that is preempted, runs out of time or loses a node is put back into the queue with the same command.
The script resumes from its output folder, so the launcher keeps no progress.
"""

import itertools
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

from submitit.core.core import Job

from mae_dat.config.arguments import split_verb
from mae_dat.config.commands.submit import SUBMIT_USAGE, JobConfig, launcher_command
from mae_dat.config.errors import ConfigError, InterruptError, MissingInputError, UsageError, UserError, suggest
from mae_dat.config.flags import build_config, flat_values
from mae_dat.config.groups import data_root
from mae_dat.config.recipes import find_recipe
from mae_dat.config.terminal import print_text
from mae_dat.launch.code_copy import collect_code, write_code_copy
from mae_dat.launch.executors import batch_file, clean_environment, submit_job
from mae_dat.launch.follow import follow
from mae_dat.launch.job import ResolvedJob, resolve_job
from mae_dat.launch.task import ScriptTask
from mae_dat.runtime.environment import PACKAGE_FOLDER
from mae_dat.storage.files import prepare_output_folder
from mae_dat.storage.released import released_weights

logger = logging.getLogger(__name__)


class LoadableVerb(Protocol):
    """A verb of `mae-dat`, from which the launcher needs only its flags."""

    def load(self, arguments: Sequence[str], program: str) -> Any:
        """Build the configuration from the flags. Raises UserError."""


Verbs = Mapping[str, LoadableVerb]

_SCRIPTS = ("main_pretrain.py", "main_finetune.py")
"""Scripts that are verbs too, so that their flags can be checked before the job starts."""


# ---- the command line ----


def parse_command(argv: Sequence[str], verbs: Verbs, program: str = "submit.py") -> tuple[JobConfig, ScriptTask]:
    """Parse the command line; `verbs` are those of `mae-dat`.

    Raises UsageError for a misspelled flag or verb, a value of the wrong type, or nothing to run; MissingInputError if
    there is no such script.
    """
    words, script_words = split_command(argv)
    config = build_config(JobConfig, launcher_command(program).parse(words))
    if not script_words:
        raise UsageError(f"nothing to run: give {program} {SUBMIT_USAGE}. `{program} --help` lists all flags.")
    name, *args = script_words
    if name.endswith(".py") or "/" in name:
        task = ScriptTask(str(_existing_script(Path(name))), tuple(args))
    else:
        split_verb(script_words, list(verbs))
        task = ScriptTask(PACKAGE_FOLDER.name, tuple(script_words), module=True)
    for word in task.args:
        if word.startswith("--") and _takes_value(word) is not None:
            flag = word.partition("=")[0]
            logger.warning("%s comes after %s, so it is passed to it; flags of the launcher come before.", flag, name)
    return config, task


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into launcher flags and [verb or script, its flags...].

    The verb or script is the first word that is neither a flag nor its value. Raises UsageError for a flag before it
    that the launcher does not have.
    """
    position = 0
    while position < len(argv) and argv[position].startswith("-"):
        flag, equals, _ = argv[position].partition("=")
        takes_value = _takes_value(flag)
        if takes_value is None:
            hint = suggest(flag, [f"--{field.name}" for field in fields(JobConfig)])
            raise UsageError(f"the launcher has no flag {flag}: {hint} Flags of a verb or script come after it.")
        position += 2 if takes_value and not equals else 1
    return list(argv[:position]), list(argv[position:])


def _takes_value(flag: str) -> bool | None:
    """Return whether a launcher flag, with underscores or hyphens, takes a value; None if there is no such flag."""
    takes_value = {field.name: field.type is not bool for field in fields(JobConfig)}
    name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
    return False if flag in ("-h", "--help") else takes_value.get(name)


def _existing_script(path: Path) -> Path:
    if path.is_file() and path.suffix == ".py":
        return path.absolute()
    if path.exists():
        raise ConfigError(f"{path} is not a Python script: name one that ends in .py")
    scripts = sorted(map(str, path.parent.glob("*.py")))
    raise MissingInputError(f"no such script: {path}: {suggest(str(path), scripts) if scripts else 'wrong folder?'}")


# ---- the script's own flags ----


def script_settings(task: ScriptTask, verbs: Verbs) -> dict[str, Any] | None:
    """Return the settings that a verb, or a script of this package, reads from its flags; None for another script.

    Raises UserError for wrong flags, as the verb does.
    """
    if task.module:
        name, args = split_verb(task.args, list(verbs))
        return flat_values(verbs[name].load(args, f"mae-dat {name}"))
    script = Path(task.script).name
    verb = verbs.get(script.removeprefix("main_").removesuffix(".py")) if script in _SCRIPTS else None
    return flat_values(verb.load(task.args, script)) if verb else None


def check_settings(settings: Mapping[str, Any], dry_run: bool) -> None:
    """Raise UserError now for a training that would fail at its start, instead of after hours in the queue.

    A dry run, which needs no data, only logs a warning.
    """
    try:
        if "data_path" in settings and "resume" in settings:
            data_root(settings["data_path"])
        for flag in ("finetune", "resume"):
            _check_weights(f"--{flag}", settings.get(flag))
        if settings.get("output_dir") and not dry_run:
            prepare_output_folder(Path(settings["output_dir"]))
    except UserError as error:
        if not dry_run:
            raise
        logger.warning("the job would fail at its start: %s", error)


def _check_weights(flag: str, source: str | None) -> None:
    if source and not Path(source).exists() and source not in released_weights():
        raise MissingInputError(
            f"{flag} {source}: there is no such file or folder, and no released weights of that name"
        )


def checked_tasks(job: ResolvedJob, task: ScriptTask, verbs: Verbs) -> list[ScriptTask]:
    """Return the task, or one task for each index of the array, after checking the settings of its script.

    Raises UserError, also for an array whose jobs would all write into one folder.
    """
    tasks = [task] if job.indices is None else [task.at_index(index) for index in job.indices]
    outputs = []
    for first_task in tasks[:2]:  # the others differ from these only by their index
        if settings := script_settings(first_task, verbs):
            check_settings(settings, job.config.dry_run)
            outputs += [settings["output_dir"]] if settings.get("output_dir") else []
    if len(outputs) != len(set(outputs)):
        raise ConfigError(
            f"--array {job.config.array}: all jobs would write into {outputs[0]}; put %a, which becomes each job's "
            "index, into the flag: --output_dir OUT/%a"
        )
    return tasks


# ---- the copy of the code ----


def copy_code(
    job: ResolvedJob, tasks: Sequence[ScriptTask], command: str, verbs: Verbs
) -> tuple[Path, list[ScriptTask]]:
    """Copy the code, the script and its configs; return the copy's folder and the tasks that run from it.

    A dry run names the folder and copies nothing. Raises UserError.
    """
    task = tasks[0]
    if job.config.no_snapshot:
        return PACKAGE_FOLDER.parent, list(tasks)
    settings = script_settings(task, verbs)
    results = [job.folder, *([Path(settings["output_dir"])] if settings and settings.get("output_dir") else [])]
    tree = collect_code(PACKAGE_FOLDER.parent if task.module else Path(task.script).resolve().parent, results)
    for name in tree.too_large:
        logger.warning("%s is too large for a file of code and is not copied", name)
    script = task.script if task.module else tree.add(Path(task.script))
    configs: dict[Path, str] = {}
    if settings is not None:  # for other scripts, --config may mean anything
        configs = {path: tree.add(path) for task in tasks for path in _config_files(task.args)}
    folder = job.folder.absolute() / "code"
    code = folder / tree.name if job.config.dry_run else write_code_copy(tree, folder, command)

    def in_copy(word: str) -> str:
        """Return a word of the command line with the path of a config replaced by its copy."""
        flag, equals, path = word.rpartition("=")
        return f"{flag}{equals}{code / configs[Path(path)]}" if Path(path) in configs else word

    script = script if task.module else str(code / script)
    return code, [replace(task, script=script, args=tuple(map(in_copy, task.args))) for task in tasks]


def _config_files(args: Sequence[str]) -> list[Path]:
    """Return the files given by `--config FILE` and `--config=FILE`; recipes are part of every copy.

    Raises MissingInputError for a value that is neither a file nor a recipe.
    """
    names = [name for flag, name in itertools.pairwise(args) if flag == "--config"]
    names += [word.removeprefix("--config=") for word in args if word.startswith("--config=")]
    return [Path(name) for name in names if find_recipe(name) == Path(name)]


# ---- submitting ----


def describe_submission(jobs: Sequence[Job[int]], job: ResolvedJob, task: ScriptTask, command: str) -> str:
    """Describe what was submitted: its log, how to follow and cancel it, and how to resume after its end."""
    slurm, first = job.cluster == "slurm", jobs[0]
    log = str(first.paths.stdout)
    job_id, _, _ = first.job_id.partition("_")
    array = f", array {job.config.array}" if job.indices else ""
    rows = {
        "log": log if len(jobs) == 1 else log.replace(first.job_id, f"{job_id}_*"),
        "follow": f"tail -F {shlex.quote(log)}",
        "state": f"squeue --job {job_id}" if slurm else f"ps {job_id}",
        "cancel": f"scancel {job_id}" if slurm else f"kill {job_id}",
        "resume": command,
    }
    size = f"{job.cluster}, {job.config.nodes} x {job.tasks_per_node} tasks{array}"
    lines = [f"submitted job {job_id} ({size}): {task.name}"]
    return "\n".join(lines + [f"  {name:<7} {value}" for name, value in rows.items()])


def run_in_this_process(job: Job[int], code: Path) -> int:
    """Run a debug job to its end and return the script's exit code."""
    with clean_environment(code):
        os.environ["SUBMITIT_DEBUG_JOB_ID"] = job.job_id
        try:
            # job.result() is not used, because it opens a debugger on an error.
            if error := job.exception():
                raise error
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def wait_for_jobs(jobs: Sequence[Job[int]], job: ResolvedJob, tasks: Sequence[ScriptTask]) -> int:
    """Show the log until the jobs have ended, and return the script's exit code; Ctrl-C ends only the waiting."""
    exits = [task.rank_exits(job.paths.folder, job.job_id) for job, task in zip(jobs, tasks, strict=True)]
    try:
        return follow(jobs, exits, job.cluster == "slurm")
    except KeyboardInterrupt:
        logger.info("no longer waiting; the job continues")
        return InterruptError.exit_code


def main(argv: Sequence[str], verbs: Verbs, program: str = "submit.py") -> int:
    """Submit a job and return the exit code; `verbs` are those of `mae-dat`, `program` the command in messages.

    Raises UserError.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config, task = parse_command(argv, verbs, program)
    job = resolve_job(config)
    tasks = checked_tasks(job, task, verbs)
    command = f"{'python ' if program.endswith('.py') else ''}{program} {shlex.join(argv)}"
    code, tasks = copy_code(job, tasks, command, verbs)
    if config.dry_run:
        print(batch_file(job, tasks[0], code, command), end="")
        return 0
    jobs = submit_job(job, tasks, code, command)
    if job.cluster == "debug":
        return run_in_this_process(jobs[0], code)
    print_text(describe_submission(jobs, job, task, command))
    return wait_for_jobs(jobs, job, tasks) if config.wait else 0
