"""Cold starts, each in a process of its own: imports, --help, and the first training step of the demo."""

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.timing import Case, Step

ROOT = Path(__file__).parents[1]
FIRST_STEP = """
import sys, torch, mae_dat.cli, mae_dat.training.loop
def first_step_is_done():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    raise SystemExit
mae_dat.training.loop.heartbeat = first_step_is_done
recipe = ["--config", "demo_pretrain", "--data_path", "demo"]
mae_dat.cli.run(["pretrain", *recipe, "--output_dir", sys.argv[1], "--device", sys.argv[2]])
"""


def command(*arguments: str) -> Step:
    """Builds a call of Python with these arguments in the repository's root."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def step() -> None:
        call = [sys.executable, *arguments]
        found = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True)
        if found.returncode:
            raise RuntimeError(f"{' '.join(call)[:60]} ...: {found.stderr[-500:]}")

    return step


def first_step(device: torch.device) -> Step:
    """Builds the demo's pretraining, until its first step is done; each in a new folder."""

    def step() -> None:
        with tempfile.TemporaryDirectory() as folder:
            command("-c", FIRST_STEP, folder, str(device))()

    return step


def cases(quick: bool, device: torch.device) -> list[Case]:
    """Seconds, against an import of torch alone. The goal of a `--help` is half a second at most."""
    imports = partial(command, "-c", "import torch")
    whats = {
        "import mae_dat": partial(command, "-c", "import mae_dat"),
        "mae-dat --help": partial(command, "-m", "mae_dat", "--help"),
        "mae-dat finetune --help": partial(command, "-m", "mae_dat", "finetune", "--help"),
        "first step of the demo's pretraining": partial(first_step, device),
    }
    return [
        Case(what, build, imports, "import torch", unit="s", is_cost=True, in_process=False)
        for what, build in whats.items()
    ]
