"""The launcher: what SLURM would get, what the script gets, and real jobs on this machine through submitit."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_dat.config.commands.submit import JobConfig
from mae_dat.config.errors import ConfigError, MissingInputError, NoProgressError, OutputError, UsageError, UserError
from mae_dat.launch.executors import batch_file
from mae_dat.launch.job import resolve_job
from mae_dat.launch.submit import checked_tasks, main, parse_command
from mae_dat.launch.task import ScriptTask
from mae_dat.verbs import VERBS

ROOT = Path(__file__).parents[2]
RANKS = ("MAE_DAT_RESTARTS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Writes its arguments and rank variables to <folder>/<rank>.json and exits with the code in its first argument.
SCRIPT = f"""
import json, os, pathlib, sys
folder = pathlib.Path("FOLDER")
facts = {{"argv": sys.argv[1:], **{{name: os.environ[name] for name in {RANKS}}}}}
(folder / (os.environ["RANK"] + ".json")).write_text(json.dumps(facts))
print("rank", os.environ["RANK"], "is here")
sys.exit(int(sys.argv[1]))
"""

# A stand-in for training: the first attempt is preempted by the signal in its argument, saves on SIGTERM and asks for a
# restart; the second one resumes.
PREEMPTED = """
import os, pathlib, signal, sys, time
state = pathlib.Path("STATE")
if "MAE_DAT_RESTARTS" in os.environ and state.exists():
    sys.exit(0 if state.read_text() == "saved" and os.environ["MAE_DAT_RESTARTS"] == "1" else 9)
def save(*_):
    state.write_text("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
os.kill(os.getpid(), signal.SIGUSR2)  # SLURM signals the whole process tree: this must not end the script
os.kill(os.getppid(), int(sys.argv[1]))
time.sleep(30)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.replace("FOLDER", str(tmp_path)))
    return path


def submit_py(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SUBMITIT_")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "submit.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def wait_for_text(path: Path, text: str = "", seconds: float = 30) -> str:
    """Wait until a file is there and holds a text; returns all of it."""
    end = time.monotonic() + seconds
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"no {text!r} in {path}: {path.read_text() if path.exists() else 'no file'}"
        time.sleep(0.05)
    return path.read_text()


def job_id(stdout: str) -> str:
    return stdout.split("submitted job ")[1].split()[0]


def test_dry_run_prints_the_batch_file_and_leaves_no_trace(script: Path, tmp_path: Path) -> None:
    flags = ["--nodes", 4, "--ngpus=2", "--timeout", 60, "--partition", "gpu", "--account", "lab", "--qos", "high"]
    flags += ["--constraint", "a100", "--mem-gb", 1.5, "--cpus_per_task", 3, "--comment", "two words"]
    flags += ["--exclude", "n[03-05]", "--python", "apptainer exec --nv i.sif python"]
    before = sorted(tmp_path.iterdir())
    result = submit_py(
        "--dry_run", *flags, "--job_dir", tmp_path / "jobs" / "%j", script, "--dat", "--lr", "1e-3", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    expected = {"nodes=4", "ntasks-per-node=2", "gpus-per-node=2", "time=60", "partition=gpu", "account=lab"}
    expected |= {"constraint=a100", "mem=1536MB", "cpus-per-task=3", "comment='two words'", "job-name=train"}
    expected |= {"qos=high", "exclude='n[03-05]'", "requeue", f"output={tmp_path}/jobs/%j/%j_0_log.out"}
    directives = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")}
    assert expected <= directives
    assert any(line.startswith("signal=USR2@") for line in directives)
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--kill-on-bad-exit=1" in srun
    assert "--cpus-per-task=3" in srun  # srun does not take it over from sbatch
    assert "sh apptainer exec --nv i.sif python -P -u -m submitit" in srun
    (code,) = [line for line in lines if line.startswith("export PYTHONPATH=")]
    assert lines[-1].endswith("train.py --dat --lr 1e-3")
    assert lines[-1].split()[-4].removesuffix("/train.py") in code
    assert sorted(tmp_path.iterdir()) == before


def batch_text(*words: str) -> str:
    """The batch file of a dry run in this process."""
    config, task = parse_command(["--dry_run", *words], VERBS)
    return batch_file(resolve_job(config), task, ROOT, "python submit.py")


def test_unset_flags_are_left_to_the_cluster(script: Path) -> None:
    text = batch_text(str(script))
    assert "--nodes=1" in text
    assert "--ntasks-per-node=8" in text
    assert "--time=4320" in text
    unset = ("partition", "account", "qos", "constraint", "exclude", "mem", "comment", "array", "hold")
    assert not any(f"#SBATCH --{name}" in text for name in unset)


def test_nodes_without_gpus_run_one_task_each(script: Path) -> None:
    text = batch_text("--ngpus", "0", "--nodes", "3", str(script))
    assert "--ntasks-per-node=1" in text
    assert "--gpus" not in text


def test_an_array_has_the_users_indices_and_waits_for_its_files(script: Path) -> None:
    text = batch_text("--array", "0-8:4,9%2", str(script))
    assert "#SBATCH --array=0-8:4,9%2" in text
    assert "#SBATCH --hold" in text
    assert "%A_%a_0_log.out" in text


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--comment", "x\ntouch pwned"), ("--partition", "a\rb"), ("--job_dir", "a\nb/%j"), ("--python", "p\n")],
)
def test_a_line_break_would_be_a_command_of_the_batch_file(script: Path, flag: str, value: str) -> None:
    config, _ = parse_command([flag, value, "--dry_run", str(script)], VERBS)
    with pytest.raises(ConfigError, match=f"{flag} .*line break"):
        resolve_job(config)


def test_what_is_typed_is_never_run_by_the_batch_file(tmp_path: Path) -> None:
    script = tmp_path / "a\ntouch pwned1 $(touch pwned2).py"
    script.touch()
    words = ["--dry_run", "--comment", "'; touch pwned3 $(touch pwned4) `touch pwned5`", "--job_dir", "$(touch pwned6)"]
    result = submit_py(*words, script, "x\ntouch pwned7", "$(touch pwned8)", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    text = result.stdout[: result.stdout.index("# every task runs")]  # the rest is only shown
    for name in ("srun", "python"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, check=True)
    assert not list(tmp_path.glob("pwned*"))


def test_everything_after_the_script_is_the_scripts(script: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--config", "a b.yaml", "--dat", "--lr=1e-3", "--nodes", "7", "--", "-x", "--partiton", "other.py"]
    with caplog.at_level(logging.WARNING):
        config, task = parse_command(["--nodes", "3", "--dry-run", "--partition=p", str(script), *words], VERBS)
    assert (config.nodes, config.partition, config.dry_run) == (3, "p", True)
    assert (task.script, task.args) == (str(script), tuple(words))
    assert [record.getMessage().split()[0] for record in caplog.records] == ["--nodes"]


def test_a_verb_is_submitted_like_a_script() -> None:
    for verb in (["compare", "--seeds", "0"], ["tokenizer", "train", "--steps", "3"]):
        config, task = parse_command(["--dry_run", *verb], VERBS)
        assert task.command == [sys.executable, "-P", "-m", "mae_dat", *verb]
        assert config.dry_run
    with pytest.raises(UsageError, match=r"no verb 'compar': did you mean compare"):
        parse_command(["compar"], VERBS)
    with pytest.raises(UsageError, match=r"tokenizer has no kind 'trian': did you mean train"):
        parse_command(["tokenizer", "trian"], VERBS)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--node", "4", "train.py"], UsageError, "--node: did you mean --nodes"),
        (["--job_dri=x", "train.py"], UsageError, "did you mean --job_dir"),
        (["--zzz", "train.py"], UsageError, "the launcher has no flag --zzz: known are --nodes, "),
        (["--nodes", "4"], UsageError, "nothing to run"),
        ([], UsageError, "nothing to run"),
        (["tran.py", "--dat"], MissingInputError, "no such script: tran.py: did you mean train.py"),
        (["nowhere/train.py"], MissingInputError, "no such script"),
        (["./"], ConfigError, "not a Python script"),
        (["--nodes", "0", "--dry_run", "train.py"], ConfigError, "--nodes must be 1 or more, got 0"),
        (["--ngpus", "-1", "--dry_run", "train.py"], ConfigError, "--ngpus must be 0 or more, got -1"),
        (["--mem_gb", "-1", "--dry_run", "train.py"], ConfigError, "--mem_gb must be above 0, got -1"),
        (["--cluster", "local", "--nodes", "2", "train.py"], ConfigError, "there is one machine"),
        (["--cluster", "local", "--array", "0-3", "train.py"], ConfigError, "only SLURM has arrays"),
        (["--array", "0-", "--dry_run", "train.py"], ConfigError, "'0-' is not an index"),
        (["--array", "3-1", "--dry_run", "train.py"], ConfigError, "'3-1' is not a range"),
        (["--array", "0-3%", "--dry_run", "train.py"], ConfigError, "not a number of jobs at once"),
    ],
)
def test_mistakes_are_named(
    script: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], error: type[UserError], message: str
) -> None:
    monkeypatch.chdir(script.parent)
    with pytest.raises(error) as caught:
        resolve_job(parse_command(words, VERBS)[0])
    assert message in str(caught.value)


def test_slurm_where_there_is_none(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(script.parent))
    config, _ = parse_command(["--cluster", "slurm", str(script)], VERBS)
    with pytest.raises(ConfigError, match="--cluster local"):
        resolve_job(config)
    assert resolve_job(JobConfig()).cluster == "local"


def test_a_mistake_ends_with_its_exit_code_and_one_line(script: Path) -> None:
    result = submit_py("--job_dir", script.parent / "jobs", "--ngpu", 2, script)
    assert result.returncode == UsageError.exit_code
    assert result.stderr.count("\n") == 1
    assert "did you mean --ngpus" in result.stderr
    assert not (script.parent / "jobs").exists()


def test_a_value_of_the_wrong_type_is_rejected(script: Path) -> None:
    with pytest.raises(UsageError, match="--nodes must be a whole number, got 'four'"):
        main(["--nodes", "four", str(script)], VERBS)


def checked(*words: str) -> list[ScriptTask]:
    """The tasks of a command line, after the checks that precede every submission."""
    config, task = parse_command(words, VERBS)
    return checked_tasks(resolve_job(config), task, VERBS)


@pytest.fixture
def finetune_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Our script by its name, in an empty folder, with images named by the environment."""
    monkeypatch.setenv("MAE_DAT_DATA", "images")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main_finetune.py").touch()
    return "main_finetune.py"


def test_mistyped_flags_of_our_scripts_are_rejected_before_the_queue(finetune_script: str) -> None:
    assert checked("--dry_run", finetune_script, "--dat", "--epochs", "3")[0].args == ("--dat", "--epochs", "3")
    with pytest.raises(UsageError, match=r"main_finetune.py has no flag --epoch: did you mean --epochs"):
        checked("--dry_run", finetune_script, "--epoch", "3")
    with pytest.raises(UsageError, match="mae-dat evaluate has no flag --chekpoint: did you mean --checkpoint"):
        checked("--dry_run", "evaluate", "--chekpoint", "OUT")
    with pytest.raises(UsageError, match="mae-dat tokenizer train has no flag --step: did you mean --steps"):
        checked("--dry_run", "tokenizer", "train", "--step", "3")
    with pytest.raises(MissingInputError, match="missing.yaml"):
        checked("--dry_run", finetune_script, "--config", "missing.yaml")


def test_a_job_without_images_is_rejected_before_the_queue(
    finetune_script: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("MAE_DAT_DATA")
    words = ["--cluster", "local", finetune_script, "--dat"]
    with pytest.raises(ConfigError, match="MAE_DAT_DATA"):
        checked(*words)
    checked("--dry_run", *words)
    assert "would fail at its start: no images" in caplog.text
    caplog.clear()
    monkeypatch.setenv("MAE_DAT_DATA", "images")
    checked(*words)
    assert not caplog.messages


def test_weights_and_output_folder_are_checked_before_the_queue(finetune_script: str, tmp_path: Path) -> None:
    words = ["--cluster", "local", finetune_script]
    with pytest.raises(MissingInputError, match="--finetune nowhere.pth: there is no such file"):
        checked(*words, "--finetune", "nowhere.pth")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        checked(*words, "--output_dir", "file")
    checked(*words, "--finetune", "mae_vit_base_patch16")


def test_jobs_of_an_array_must_not_share_a_folder(finetune_script: str) -> None:
    words = ["--array", "0,3,7%2", "--dry_run", finetune_script, "--seed", "%a"]
    with pytest.raises(ConfigError, match="--output_dir OUT/%a"):
        checked(*words)
    tasks = checked(*words, "--output_dir", "out/%a")
    assert [task.args for task in tasks] == [("--seed", n, "--output_dir", f"out/{n}") for n in ("0", "3", "7")]


def test_the_error_of_sbatch_is_passed_on(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in {
        "srun": "exit 0",
        "sbatch": "echo sbatch: error: invalid partition specified: gpux >&2; exit 1",
    }.items():
        (script.parent / name).write_text(f"#!/bin/sh\n{body}\n")
        (script.parent / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    result = submit_py("--job_dir", script.parent / "jobs" / "%j", "--partition", "gpux", script)
    assert result.returncode == ConfigError.exit_code
    assert "invalid partition specified: gpux" in result.stderr
    assert "Traceback" not in result.stderr


def run_local(script: Path, *words: object, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a script as a job on this machine, in the background, and waits for it."""
    jobs = script.parent / "jobs" / "%j"
    return submit_py("--cluster", "local", "--wait", *flags, "--job_dir", jobs, script, *words)


def test_two_ranks_run_on_this_machine(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As from inside another job, of which nothing may reach this one.
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "MASTER_PORT", "WORLD_SIZE", "SUBMITIT_LOCAL_NTASKS"):
        monkeypatch.setenv(name, "7")
    result = run_local(script, 0, "--dat", "two words", flags=("--ngpus", "2"))
    assert result.returncode == 0, result.stderr
    job = job_id(result.stdout)
    log = script.parent / "jobs" / job / f"{job}_1_log.out"
    assert "rank 0 is here" in result.stdout
    assert "rank 1 is here" in log.read_text()
    facts = [json.loads((script.parent / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [item["argv"] for item in facts] == [["0", "--dat", "two words"]] * 2
    assert [(item["RANK"], item["LOCAL_RANK"], item["WORLD_SIZE"]) for item in facts] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert facts[0]["MASTER_PORT"] == facts[1]["MASTER_PORT"] != "7"
    assert [item["MAE_DAT_RESTARTS"] for item in facts] == ["0", "0"]
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines()[1:6])
    assert rows["cancel"] == f"kill {job}"
    assert rows["log"] == str(log).replace("_1_", "_0_")
    assert result.stdout.splitlines()[5].split("resume")[1].split() == [
        "python",
        "submit.py",
        *result.args[2:-1],
        "'two",
        "words'",
    ]


@pytest.mark.parametrize("code", [3, 74])
def test_waiting_returns_the_scripts_exit_code(script: Path, code: int) -> None:
    result = run_local(script, code)
    assert result.returncode == code
    assert f"ended with exit code {code}" in result.stdout


@pytest.mark.parametrize("code", [0, 3])
def test_debug_runs_here_and_returns_the_exit_code(script: Path, code: int) -> None:
    before = dict(os.environ)
    words = ["--cluster", "debug", "--job_dir", str(script.parent / "jobs"), str(script), str(code)]
    assert main(words, VERBS) == code
    assert json.loads((script.parent / "0.json").read_text())["WORLD_SIZE"] == "1"
    assert dict(os.environ) == before


def test_a_preempted_job_saves_and_is_run_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PREEMPTED.replace("STATE", str(script.with_suffix(".state"))))
    result = run_local(script, int(signal.SIGUSR2))
    assert result.returncode == 0, result.stdout
    assert script.with_suffix(".state").read_text() == "saved"
    assert "SIGUSR2: requesting the script to save and stop" in result.stdout
    assert result.stdout.count("restarting the script") == 1


def test_a_canceled_job_saves_and_is_not_run_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PREEMPTED.replace("STATE", str(script.with_suffix(".state"))))
    result = run_local(script, int(signal.SIGTERM))
    assert result.returncode == 75, result.stdout
    assert script.with_suffix(".state").read_text() == "saved"
    assert "restarting the script" not in result.stdout


def test_a_script_that_is_killed_at_every_start_is_not_started_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import os\nos.kill(os.getpid(), 9)\n")
    result = run_local(script)
    assert result.returncode == NoProgressError.exit_code
    assert "3 times in a row: giving up" in result.stdout


def test_an_error_of_one_rank_prevails_over_a_restart_of_another(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, sys, time\nrank = int(os.environ['RANK'])\ntime.sleep(rank)\nsys.exit((75, 65)[rank])\n"
    )
    assert run_local(script, flags=("--ngpus", "2")).returncode == 65


def test_ctrl_c_ends_the_waiting_and_not_the_job(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import pathlib, sys, time\nprint('begun', flush=True)\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\nprint('done', flush=True)\n"
    )
    words = ["--cluster", "local", "--wait", "--job_dir", tmp_path / "jobs" / "%j", script, tmp_path / "go"]
    command = [sys.executable, str(ROOT / "submit.py"), *map(str, words)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stderr is not None
        shown = ""
        while "begun" not in shown:
            shown += waiting.stdout.readline()
        os.killpg(waiting.pid, signal.SIGINT)  # as the terminal does: to all that was started from it
        assert waiting.wait(20) == 130
        assert "the job continues" in waiting.stderr.read()
    (tmp_path / "go").touch()
    job = job_id(shown)
    wait_for_text(tmp_path / "jobs" / job / f"{job}_0_log.out", "done\n")


def test_a_job_runs_the_code_that_was_submitted(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import sys\nimport neighbor\nprint(neighbor.word, sys.path[0])\nsys.exit(neighbor.code())\n")
    neighbor = tmp_path / "neighbor.py"
    submitted = f"""
import os, pathlib
word = "as submitted"
def code():
    pathlib.Path({str(neighbor)!r}).write_text("word = 'edited meanwhile'\\ndef code(): return 0\\n")
    return 0 if os.environ["MAE_DAT_RESTARTS"] == "1" else 75
"""
    neighbor.write_text(submitted)
    result = run_local(script)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("as submitted") == 2
    neighbor.write_text(submitted)
    edited = run_local(script, flags=("--no_snapshot",))
    assert (edited.stdout.count("as submitted"), edited.stdout.count("edited meanwhile")) == (1, 1)


@pytest.mark.slow
def test_two_ranks_talk_to_each_other(tmp_path: Path) -> None:
    script = tmp_path / "reduce.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        "x = torch.tensor([dist.get_rank() + 1.0])\n"
        "dist.all_reduce(x)\n"
        "print('sum', x.item())\n"
        "dist.destroy_process_group()\n"
    )
    result = run_local(script, flags=("--ngpus", "2"))
    assert result.returncode == 0
    assert "sum 3.0" in result.stdout
