"""The command line of submit.py: training on a cluster through submitit, one task a GPU, each running the script with
torch's rank variables set.

`submit.py [launcher flags] SCRIPT.py [script flags]`: everything after the script is passed on untouched. A job that
is preempted, runs out of time or loses a node is put back into the queue with the same command; that it goes on where
it stopped is a property of the script's output folder, so nothing about progress is kept here.
"""

import argparse
import itertools
import logging
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path

from submitit.core.core import Job

from mae_dat.config.errors import ConfigError, InterruptError, MissingInputError, UserError
from mae_dat.config.groups import data_root
from mae_dat.config.parse import load_config, suggest
from mae_dat.config.runs import FinetuneConfig, PretrainConfig, load_finetune_config
from mae_dat.launch.code_copy import code_tree, write_snapshot
from mae_dat.launch.executors import JobConfig, ResolvedJob, batch_file, outside_other_jobs, submit
from mae_dat.launch.follow import follow
from mae_dat.launch.task import ScriptTask
from mae_dat.runtime.environment import PACKAGE_FOLDER
from mae_dat.storage.files import prepare_output_folder
from mae_dat.storage.released import released_weights

logger = logging.getLogger(__name__)

Settings = FinetuneConfig | PretrainConfig


def _flag_names() -> dict[str, bool]:
    """Every spelling of every launcher flag, and whether it takes a value."""
    names: dict[str, bool] = {"-h": False, "--help": False}
    for item in fields(JobConfig):
        for spelling in (item.name, item.name.replace("_", "-")):
            names[f"--{spelling}"] = item.metadata.get("action") != "store_true"
    return names


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split into launcher flags and [script, script flags...]; the first word that is no flag or value is the script,
    or `-m` with `mae_dat` and a command after it.

    ConfigError for a flag before the script that the launcher does not have.
    """
    names = _flag_names()
    position = 0
    while position < len(argv) and argv[position].startswith("-") and argv[position] != "-m":
        name, equals, _ = argv[position].partition("=")
        if name not in names:
            hint = suggest(name, [f"--{item.name}" for item in fields(JobConfig)])
            raise ConfigError(f"unknown launcher flag {name}: {hint} Flags of the script come after the script.")
        position += 2 if names[name] and not equals else 1
    return list(argv[:position]), list(argv[position:])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit.py",
        usage="submit.py [launcher flags] SCRIPT.py [script flags]   or, for SCRIPT.py, -m mae_dat COMMAND",
        description="Submit a training script to SLURM, or run it on this machine in the background.",
        epilog="Everything after the script goes to the script. Jobs that are preempted, run out of time or lose a "
        "node queue again and go on from the newest checkpoint in the script's output folder.",
        allow_abbrev=False,
    )
    for item in fields(JobConfig):
        options = {"default": item.default, **item.metadata}
        if item.default not in (None, False):
            options["help"] += f" (default: {str(item.default).replace('%', '%%')})"
        parser.add_argument(*dict.fromkeys((f"--{item.name}", f"--{item.name.replace('_', '-')}")), **options)
    return parser


def parse(argv: Sequence[str], commands: Collection[str] = ()) -> tuple[JobConfig, ScriptTask]:
    """Read the command line; `commands` are those of `python -m mae_dat`, which `-m` may name.

    Raises ConfigError for a mistyped flag or no script, MissingInputError if there is no such file or command. A value
    of the wrong type ends the program with exit code 2 and a message.
    """
    flags, rest = split_command(argv)
    config = JobConfig(**vars(_parser().parse_args(flags)))
    if not rest or rest == ["-m"]:
        raise ConfigError("no script: submit.py [launcher flags] SCRIPT.py [script flags]")
    if rest[0] == "-m":
        script, rest = _existing_module(rest[1:3], commands), rest[1:]
    else:
        script = str(_existing_script(Path(rest[0])))
    names = _flag_names()
    for flag in (word.partition("=")[0] for word in rest[1:]):
        if flag in names:
            logger.warning("%s stands after %s and so goes to the script, not to the launcher", flag, rest[0])
    return config, ScriptTask(script, tuple(rest[1:]), module=not script.endswith(".py"))


def _existing_script(path: Path) -> Path:
    if path.is_file() and path.suffix == ".py":
        return path.absolute()
    if path.exists():
        raise ConfigError(f"{path} is no Python script: name one that ends in .py")
    scripts = sorted(map(str, path.parent.glob("*.py")))
    raise MissingInputError(f"no such script: {path}: {suggest(str(path), scripts) if scripts else 'wrong folder?'}")


def _existing_module(words: Sequence[str], commands: Collection[str]) -> str:
    if words[0] != PACKAGE_FOLDER.name or words[1:2] == []:
        raise MissingInputError(f"no such module: -m {words[0]}: use -m {PACKAGE_FOLDER.name} COMMAND.")
    if words[1] not in commands:
        raise MissingInputError(f"no such command: -m {' '.join(words)}: {suggest(words[1], sorted(commands))}")
    return words[0]


def script_settings(task: ScriptTask) -> Settings | None:
    """The settings that one of our two scripts would read from its flags; None for any other script.

    Raises ConfigError; a mistyped flag ends the program with exit code 2 and a message, as in the script.
    """
    name = Path(task.script).name
    if name == "main_finetune.py":
        return load_finetune_config(task.args)
    return load_config(PretrainConfig, task.args) if name == "main_pretrain.py" else None


def check_script(settings: Settings, dry_run: bool) -> None:
    """UserError for a script that would stop at its start: now, not after a night in the queue. On a dry run, which
    needs no data, only a warning."""
    try:
        data_root(settings.data.data_path)
        if isinstance(settings, FinetuneConfig):
            _check_weights("--finetune", settings.classifier.finetune)
        _check_weights("--resume", settings.run.resume)
        if not dry_run:
            prepare_output_folder(Path(settings.run.output_dir))
    except UserError as error:
        if not dry_run:
            raise
        logger.warning("as it stands the job would stop at once: %s", error)


def _check_weights(flag: str, source: str | None) -> None:
    if source and not Path(source).exists() and source not in released_weights():
        raise MissingInputError(
            f"{flag} {source}: there is no such file or folder, and no released weights of that name"
        )


def tasks_of(launch: ResolvedJob, task: ScriptTask) -> list[ScriptTask]:
    """The task, or one for each index of the array; its script's settings are checked.

    Raises UserError, also for an array whose jobs would all write into one folder.
    """
    dry_run = launch.config.dry_run
    if launch.indices is None:
        settings = script_settings(task)
        if settings:
            check_script(settings, dry_run)
        return [task]
    tasks = [task.at_index(index) for index in launch.indices]
    outputs = []
    for one in tasks[:2]:  # the others differ from these by their number alone
        if settings := script_settings(one):
            check_script(settings, dry_run)
            outputs.append(settings.run.output_dir)
    if len(outputs) != len(set(outputs)):
        raise ConfigError(
            f"--array {launch.config.array}: all jobs would write into {outputs[0]}; put %a, which becomes each job's "
            "index, into the flag: --output_dir OUT/%a"
        )
    return tasks


def copied(launch: ResolvedJob, tasks: Sequence[ScriptTask], command: str) -> tuple[Path, list[ScriptTask]]:
    """The folder that the jobs import code from, and the tasks as they run from it, with its script and its configs.

    A dry run names the folder and copies nothing. Raises UserError.
    """
    task = tasks[0]
    if launch.config.no_snapshot:
        return PACKAGE_FOLDER.parent, list(tasks)
    settings = script_settings(task)
    results = [launch.folder, *([Path(settings.run.output_dir)] if settings else [])]
    tree = code_tree(PACKAGE_FOLDER.parent if task.module else Path(task.script).resolve().parent, results)
    for name in tree.too_large:
        logger.warning("%s is too large for a file of code and is not copied", name)
    script = task.script if task.module else tree.add(Path(task.script))
    ours = task.module or settings
    configs = {path: tree.add(path) for one in tasks for path in (_configs(one.args) if ours else ())}
    code = launch.folder.absolute() / "code"
    code = code / tree.name if launch.config.dry_run else write_snapshot(tree, code, command)

    def there(word: str) -> str:
        flag, equals, path = word.rpartition("=")
        return f"{flag}{equals}{code / configs[Path(path)]}" if Path(path) in configs else word

    script = script if task.module else str(code / script)
    return code, [replace(one, script=script, args=tuple(map(there, one.args))) for one in tasks]


def _configs(args: Sequence[str]) -> list[Path]:
    """The files that `--config FILE` and `--config=FILE` name."""
    pairs = itertools.pairwise(args)
    words = [value for flag, value in pairs if flag == "--config"]
    return [Path(word) for word in words + [word[9:] for word in args if word.startswith("--config=")]]


def describe(jobs: Sequence[Job[int]], launch: ResolvedJob, task: ScriptTask, command: str) -> str:
    """Say what was submitted, where its log is, how to follow and cancel it, and how to go on after its end."""
    slurm, first = launch.cluster == "slurm", jobs[0]
    log = str(first.paths.stdout)
    whole, _, _ = first.job_id.partition("_")
    array = f", array {launch.config.array}" if launch.indices else ""
    rows = {
        "log": log if len(jobs) == 1 else log.replace(first.job_id, f"{whole}_*"),
        "follow": f"tail -F {shlex.quote(log)}",
        "state": f"squeue --job {whole}" if slurm else f"ps {whole}",
        "cancel": f"scancel {whole}" if slurm else f"kill {whole}",
        "go on": command,
    }
    where = f"{launch.cluster}, {launch.config.nodes} x {launch.tasks_per_node} tasks{array}"
    lines = [f"submitted job {whole} ({where}): {task.name}"]
    return "\n".join(lines + [f"  {name:<7} {value}" for name, value in rows.items()])


def run_here(job: Job[int], code: Path) -> int:
    """Run a debug job to its end in this process and return the script's exit code."""
    with outside_other_jobs(code):
        os.environ["SUBMITIT_DEBUG_JOB_ID"] = job.job_id
        try:
            # Not through job.result(): that opens a debugger on an error.
            if error := job.exception():
                raise error
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def wait_for(jobs: Sequence[Job[int]], launch: ResolvedJob, tasks: Sequence[ScriptTask]) -> int:
    """Show the log until the jobs have ended, and return the script's exit code; Ctrl-C stops the showing alone."""
    try:
        ends = [task.ends(job.paths.folder, job.job_id) for job, task in zip(jobs, tasks, strict=True)]
        return follow(jobs, ends, launch.cluster == "slurm")
    except KeyboardInterrupt:
        logger.info("no longer waiting; the job goes on")
        return InterruptError.exit_code


def main(argv: Sequence[str] | None = None, commands: Collection[str] = ()) -> int:
    """Run submit.py and return the exit code; `commands` are those of `python -m mae_dat`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, task = parse(argv, commands)
        launch = config.resolve()
        tasks = tasks_of(launch, task)
        command = shlex.join(["python", "submit.py", *argv])
        code, tasks = copied(launch, tasks, command)
        if config.dry_run:
            print(batch_file(launch, tasks[0], code, command), end="")
            return 0
        jobs = submit(launch, tasks, code, command)
        if launch.cluster == "debug":
            return run_here(jobs[0], code)
        print(describe(jobs, launch, task, command), flush=True)
        return wait_for(jobs, launch, tasks) if config.wait else 0
    except UserError as error:
        print(f"submit.py: {error}", file=sys.stderr)
        return error.exit_code
