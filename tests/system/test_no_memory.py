"""Trainings that run out of memory for real: an address space with a limit, and what the message promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from whole_runs import folder

from mae_dat.storage.checkpoint import newest_checkpoint

__all__ = ["folder"]  # fixtures

# The limit is what the process has after its imports, and so many MiB more.
LIMITED = """
import resource, sys
import mae_dat.training.finetune, torch.utils.tensorboard
from mae_dat.cli import main
size = next(line for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = 1024 * int(size.split()[1]) + 2**20 * int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
main()
"""


def finetune(megabytes: int, *flags: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", LIMITED, str(megabytes), "finetune", "--model", "vit_demo_patch8"]
    command += ["--input_size", "128", "--num_workers", "0", "--device", "cpu", "--precision", "fp32", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit of the address space")
@pytest.mark.slow
def test_a_training_without_memory_loses_nothing_and_its_advice_works(folder: Path, tmp_path: Path) -> None:
    flags = ["--data_path", str(folder), "--output_dir", str(tmp_path / "out"), "--warmup_epochs", "0"]
    flags += ["--images_every", "0", "--batch_size", "32", "--epochs"]
    started = finetune(8000, *flags, "1")
    assert started.returncode == 0, started.stderr
    checkpoint = newest_checkpoint(tmp_path / "out")
    assert checkpoint is not None
    before = checkpoint.path.read_bytes()
    failed = finetune(150, *flags, "2", "--allow_change", "epochs")
    assert failed.returncode == 64, failed.stderr
    assert "Traceback" not in failed.stderr
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: out of memory (can't allocate memory: you tried to allocate")
    assert "The last checkpoint in" in line
    assert checkpoint.path.read_bytes() == before
    advice = re.search(r"--batch_size (\d+) --accum_iter (\d+)", line)
    assert advice
    assert (int(advice[1]), int(advice[2])) == (16, 2)
    resumed = finetune(8000, *flags, "2", "--allow_change", "epochs", *advice[0].split(), "--checkpoint_activations")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    assert "epoch 2/2" in resumed.stderr
