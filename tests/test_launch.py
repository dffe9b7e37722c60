"""The launcher: what SLURM would get, what the script gets, and real jobs on this machine through submitit."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mae_dat import launch
from mae_dat.errors import ConfigError, MissingInputError, UserError

ROOT = Path(__file__).parent.parent
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Writes what it was given to <folder>/<rank>.json and ends with the exit code in its first argument.
SCRIPT = f"""
import json, os, pathlib, sys
folder = pathlib.Path(__file__).parent
seen = {{"argv": sys.argv[1:], **{{name: os.environ[name] for name in {RANKS}}}}}
(folder / (os.environ["RANK"] + ".json")).write_text(json.dumps(seen))
print("rank", os.environ["RANK"], "is here")
sys.exit(int(sys.argv[1]))
"""

# Stands for training: the first attempt preempts its own task and saves on SIGTERM, the second one resumes.
PREEMPTED = """
import os, pathlib, signal, sys, time
state = pathlib.Path(__file__).with_suffix(".state")
if state.exists():
    sys.exit(0 if state.read_text() == "saved" else 9)
def save(*_):
    state.write_text("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
os.kill(os.getpid(), signal.SIGUSR2)  # SLURM signals the whole process tree: this must not end the script
os.kill(os.getppid(), signal.SIGUSR2)
time.sleep(30)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def submit_py(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SUBMITIT_")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(ROOT / "submit.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def wait_for(path: Path, seconds: float = 30) -> Path:
    """Wait until submitit has written a task's result, which it does last."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path.name}; there is {sorted(item.name for item in path.parent.iterdir())}"
        time.sleep(0.05)
    return path


def wait_for_line(path: Path, text: str, seconds: float = 30) -> None:
    """Wait for what submitit writes after a task's result: the traceback in its log."""
    end = time.monotonic() + seconds
    while text not in path.read_text():
        assert time.monotonic() < end, f"no {text!r} in {path.name}:\n{path.read_text()}"
        time.sleep(0.05)


def outcome(path: Path) -> str:
    """ "success" or "error", from a task's result file."""
    import cloudpickle

    return str(cloudpickle.loads(wait_for(path).read_bytes())[0])


def job_id(stdout: str) -> str:
    return stdout.split("submitted job ")[1].split()[0]


def test_dry_run_prints_the_batch_file_and_leaves_no_trace(script: Path, tmp_path: Path) -> None:
    flags = ["--nodes", 4, "--ngpus=2", "--timeout", 60, "--partition", "gpu", "--account", "lab", "--qos", "high"]
    flags += ["--constraint", "a100", "--mem-gb", 1.5, "--cpus_per_task", 3, "--comment", "two words"]
    before = sorted(tmp_path.iterdir())
    done = submit_py(
        "--dry_run", *flags, "--job_dir", tmp_path / "jobs" / "%j", script, "--dat", "--lr", "1e-3", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    wanted = {"nodes=4", "ntasks-per-node=2", "gpus-per-node=2", "time=60", "partition=gpu", "account=lab", "qos=high"}
    wanted |= {"constraint=a100", "mem=1536MB", "cpus-per-task=3", "comment='two words'", "job-name=train"}
    directives = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH --")}
    assert wanted <= directives
    assert f"output={tmp_path}/jobs/%j/%j_0_log.out" in directives
    assert any(line.startswith("signal=USR2@") for line in directives)
    assert any(line.startswith("srun ") and "--kill-on-bad-exit=1" in line for line in lines)
    assert lines[-1].endswith(f"{script} --dat --lr 1e-3")
    assert sorted(tmp_path.iterdir()) == before


def test_unset_flags_leave_the_choice_to_the_cluster(script: Path) -> None:
    config, task = launch.parse(["--dry_run", str(script)])
    text = launch.batch_file(config.resolve(), task)
    assert "--nodes=2" in text
    assert "--ntasks-per-node=8" in text
    assert "--time=4320" in text
    assert not any(f"--{name}" in text for name in ("partition", "account", "qos", "constraint", "mem", "comment"))


def test_everything_after_the_script_is_the_scripts(script: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--config", "a b.yaml", "--dat", "--lr=1e-3", "--nodes", "7", "--", "-x", "--partiton", "other.py"]
    with caplog.at_level(logging.WARNING):
        config, task = launch.parse(["--nodes", "3", "--dry-run", "--partition=p", str(script), *words])
    assert (config.nodes, config.partition, config.dry_run) == (3, "p", True)
    assert (task.script, task.args) == (str(script), tuple(words))
    assert [record.getMessage().split()[0] for record in caplog.records] == ["--nodes"]


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--node", "4", "train.py"], ConfigError, "--node: did you mean --nodes"),
        (["--job_dri=x", "train.py"], ConfigError, "did you mean --job_dir"),
        (["--zzz", "train.py"], ConfigError, "unknown launcher flag --zzz: known are --nodes, "),
        (["--nodes", "4"], ConfigError, "no script"),
        ([], ConfigError, "no script"),
        (["tran.py", "--dat"], MissingInputError, "no such script: tran.py: did you mean train.py"),
        (["nowhere/train.py"], MissingInputError, "no such script"),
        (["."], ConfigError, "no Python script"),
        (["--nodes", "0", "--dry_run", "train.py"], ConfigError, "--nodes 0: must be 1 or more"),
        (["--mem_gb", "-1", "--dry_run", "train.py"], ConfigError, "--mem_gb -1.0"),
        (["--cluster", "local", "--nodes", "2", "train.py"], ConfigError, "there is one machine"),
    ],
)
def test_mistakes_are_named(
    script: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], error: type[UserError], message: str
) -> None:
    monkeypatch.chdir(script.parent)
    with pytest.raises(error) as caught:
        launch.parse(words)[0].resolve()
    assert message in str(caught.value)


def test_slurm_where_there_is_none(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(script.parent))
    config, _ = launch.parse(["--cluster", "slurm", str(script)])
    with pytest.raises(ConfigError, match="--cluster local"):
        config.resolve()
    assert launch.JobConfig().resolve().cluster == "local"


def test_a_mistake_ends_with_its_exit_code_and_one_line(script: Path) -> None:
    done = submit_py("--job_dir", script.parent / "jobs", "--ngpu", 2, script)
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.count("\n") == 1
    assert "did you mean --ngpus" in done.stderr
    assert not (script.parent / "jobs").exists()


def test_a_value_of_the_wrong_type_is_refused(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch.main(["--nodes", "four", str(script)])
    assert ended.value.code == 2
    assert "argument --nodes: invalid int value: 'four'" in capsys.readouterr().err


def test_mistyped_flags_of_our_scripts_are_found_before_the_queue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "main_finetune.py"
    script.touch()
    assert launch.parse(["--dry_run", str(script), "--dat", "--epochs", "3"])[1].args == ("--dat", "--epochs", "3")
    with pytest.raises(SystemExit) as ended:
        launch.parse(["--dry_run", str(script), "--epoch", "3"])
    assert ended.value.code == 2
    assert "--epochs" in capsys.readouterr().err
    with pytest.raises(MissingInputError, match="missing.yaml"):
        launch.parse(["--dry_run", str(script), "--config", str(tmp_path / "missing.yaml")])


def test_a_job_without_images_is_refused_before_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "main_finetune.py"
    script.touch()
    monkeypatch.delenv("MAE_DAT_DATA", raising=False)
    with pytest.raises(ConfigError, match="MAE_DAT_DATA"):
        launch.parse(["--nodes", "4", str(script), "--dat"])
    launch.parse(["--dry_run", str(script), "--dat"])
    assert "would stop at once: no images" in caplog.text
    caplog.clear()
    monkeypatch.setenv("MAE_DAT_DATA", "images")
    config, task = launch.parse(["--nodes", "4", str(script), "--dat"])
    assert (config.nodes, task.args) == (4, ("--dat",))
    assert not caplog.messages


def test_a_refusal_of_sbatch_is_passed_on(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in {
        "srun": "exit 0",
        "sbatch": "echo sbatch: error: invalid partition specified: gpux >&2; exit 1",
    }.items():
        (script.parent / name).write_text(f"#!/bin/sh\n{body}\n")
        (script.parent / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    done = submit_py("--job_dir", script.parent / "jobs" / "%j", "--partition", "gpux", script)
    assert done.returncode == ConfigError.exit_code
    assert "invalid partition specified: gpux" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_ranks_run_on_this_machine(script: Path) -> None:
    jobs = script.parent / "jobs"
    done = submit_py("--cluster", "local", "--ngpus", 2, "--job_dir", jobs / "%j", script, 0, "--dat", "two words")
    assert done.returncode == 0, done.stderr
    job = job_id(done.stdout)
    for rank in (0, 1):
        assert outcome(jobs / job / f"{job}_{rank}_result.pkl") == "success"
        assert f"rank {rank} is here" in (jobs / job / f"{job}_{rank}_log.out").read_text()
    seen = [json.loads((script.parent / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [item["argv"] for item in seen] == [["0", "--dat", "two words"]] * 2
    assert [(item["RANK"], item["LOCAL_RANK"], item["WORLD_SIZE"]) for item in seen] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ]
    assert seen[0]["MASTER_PORT"] == seen[1]["MASTER_PORT"]
    assert f"kill -INT {job}" in done.stdout
    assert str(jobs / job / f"{job}_0_log.out") in done.stdout


def test_a_failing_script_fails_its_job(script: Path) -> None:
    jobs = script.parent / "jobs"
    done = submit_py("--cluster", "local", "--job_dir", jobs / "%j", script, 3)
    job = job_id(done.stdout)
    assert outcome(jobs / job / f"{job}_0_result.pkl") == "error"
    wait_for_line(jobs / job / f"{job}_0_log.err", "ended with exit code 3")


@pytest.mark.parametrize(("code", "returned"), [(0, 0), (3, 1)])
def test_debug_runs_here_and_returns_the_outcome(script: Path, code: int, returned: int) -> None:
    before = dict(os.environ)
    words = ["--cluster", "debug", "--job_dir", str(script.parent / "jobs"), str(script), str(code)]
    assert launch.main(words) == returned
    assert json.loads((script.parent / "0.json").read_text())["WORLD_SIZE"] == "1"
    assert dict(os.environ) == before


def test_a_preempted_job_saves_and_is_run_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(PREEMPTED)
    done = submit_py("--cluster", "local", "--job_dir", tmp_path / "jobs" / "%j", script)
    job = job_id(done.stdout)
    assert outcome(tmp_path / "jobs" / job / f"{job}_0_result.pkl") == "success"
    assert script.with_suffix(".state").read_text() == "saved"
    log = (tmp_path / "jobs" / job / f"{job}_0_log.err").read_text()
    assert "this job is preempted" in log
    assert (tmp_path / "jobs" / job / f"{job}_0_log.out").read_text().count("Starting with JobEnvironment") == 2


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
    done = submit_py("--cluster", "local", "--ngpus", 2, "--job_dir", tmp_path / "jobs" / "%j", script)
    job = job_id(done.stdout)
    for rank in (0, 1):
        result = wait_for(tmp_path / "jobs" / job / f"{job}_{rank}_result.pkl", 120)
        assert outcome(result) == "success"
        assert "sum 3.0" in (result.parent / f"{job}_{rank}_log.out").read_text()
