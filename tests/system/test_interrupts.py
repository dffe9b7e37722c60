"""Ctrl-C at any moment: code 130, one word and no traceback, while a command imports, parses, works and ends.

The signal comes at an event of the interpreter, not after a time: a module `sitecustomize` sends it when a certain
module is imported, or right after a fork. Before our first line, while Python itself starts, it cannot be caught.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from whole_runs import folder

__all__ = ["folder"]  # fixtures

AT_IMPORT = """
import os, signal, sys

def interrupt(event, arguments):
    if event == "import" and arguments[0] == os.environ.get("INTERRUPT_AT"):
        del os.environ["INTERRUPT_AT"]
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
"""
AFTER_FORK = """
import os, signal
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))
"""
IN_A_SPAWNED_PROCESS = """
import os, signal, sys
if "--multiprocessing-fork" in sys.orig_argv:
    os.kill(os.getpid(), signal.SIGINT)
"""
CONSOLE_SCRIPT = "import sys; from mae_dat.__main__ import main; sys.exit(main())"
PROGRAMS = {
    "mae-dat": ["-c", CONSOLE_SCRIPT, "finetune"],
    "python -m mae_dat": ["-m", "mae_dat", "finetune"],
    "main_finetune.py": ["main_finetune.py"],
    "submit.py": ["submit.py", "--local", "main_finetune.py"],
}


def run(arguments: list[str], custom: str, tmp_path: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run python with a `sitecustomize` of this content."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(custom)
    paths = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["mae_dat.cli", "dataclasses", "mae_dat.config.parse"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_while_a_command_starts(program: str, module: str, tmp_path: Path) -> None:
    done = run([*PROGRAMS[program], "--help"], AT_IMPORT, tmp_path, INTERRUPT_AT=module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted.\n")


@pytest.mark.parametrize("module", ["torch", "torch._C", "timm", "mae_dat.training.session"])
def test_while_its_code_is_imported(module: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    flags = ["--data_path", str(tmp_path), "--output_dir", str(output)]
    done = run([*PROGRAMS["mae-dat"], *flags], AT_IMPORT, tmp_path, INTERRUPT_AT=module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted.\n")
    assert not output.exists()


@pytest.mark.slow
def test_while_it_works(folder: Path, tmp_path: Path) -> None:
    """An import amid the work, after the output folder was locked: the lock is released, and the run starts again."""
    flags = ["--data_path", str(folder), "--output_dir", str(tmp_path / "out"), "--model", "vit_demo_patch8"]
    flags += ["--input_size", "32", "--batch_size", "16", "--epochs", "1", "--warmup_epochs", "0"]
    flags += ["--num_workers", "1", "--device", "cpu", "--images_every", "0"]
    arguments = [*PROGRAMS["python -m mae_dat"], *flags]
    done = run(arguments, AT_IMPORT, tmp_path, INTERRUPT_AT="torch.utils.tensorboard")
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("interrupted.\n")
    assert "Traceback" not in done.stderr
    (tmp_path / "again").mkdir()
    # Every worker of the loader gets a Ctrl-C before it has a handler of its own.
    again = run(arguments, AFTER_FORK, tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert "KeyboardInterrupt" not in again.stderr
    assert "Traceback" not in again.stderr


POOL = """
from mae_dat.experiments.parallel_runs import TrainingProcess

if __name__ == "__main__":
    training = TrainingProcess(1, jobs=1)
    training.line.close()
    training.process.join()
    print(training.process.exitcode)
"""


@pytest.mark.slow
def test_while_the_processes_of_a_comparison_start(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(POOL)
    done = run([str(tmp_path / "pool.py")], IN_A_SPAWNED_PROCESS, tmp_path)
    assert (done.stdout, done.stderr) == ("0\n", "")


@pytest.mark.parametrize("ignores", [True, False])
def test_a_program_that_imports_the_package_keeps_its_handler(ignores: bool, tmp_path: Path) -> None:
    code = f"""
import signal
if {ignores}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
before = signal.getsignal(signal.SIGINT)
import mae_dat, mae_dat.cli, mae_dat.__main__
from mae_dat.config.interrupts import exit_on_interrupt, interruptible
with interruptible():
    assert signal.getsignal(signal.SIGINT) is before
assert signal.getsignal(signal.SIGINT) is before
if {ignores}:
    exit_on_interrupt()
    assert signal.getsignal(signal.SIGINT) is before
"""
    done = run(["-c", code], "", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
