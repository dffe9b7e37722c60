"""Runs of a few seconds for the end-to-end tests: tiny image folders, tiny models, and the commands as a user calls
them."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mae_dat.cli import run
from mae_dat.config.parse import load_config, run_command
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.runtime.console import Console
from mae_dat.training.finetune import run_finetuning
from mae_dat.training.pretrain import run_pretraining

ROOT = Path(__file__).parents[2]
SMALL = ["--input_size", "32", "--batch_size", "8", "--epochs", "1", "--warmup_epochs", "0", "--num_workers", "0"]
SMALL += ["--images_every", "0"]
PRETRAIN = ["--model", "mae_vit_demo_patch8", *SMALL]
MEASURED = ("seconds", "cpu_seconds", "peak_memory_gb", "train_images_per_second")
"""Keys of log.txt and steps.jsonl in which no two runs agree."""
FINETUNE = ["--model", "vit_demo_patch8", "--aa", "None", "--reprob", "0", *SMALL]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and on a busy machine it makes every step wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_folder(root: Path, train: int = 24, val: int = 20, conflict: int = 20, size: int = 32) -> Path:
    """Generated images of ten classes as an ordinary image folder."""
    return write_image_folder(root, FolderSettings(train=train, val=val, conflict=conflict, silhouette=0, size=size))


def save_tokenizer(path: Path, factor: int = 4) -> Path:
    """An untrained light tokenizer: its words mean nothing, but everything else about it is real."""
    torch.manual_seed(0)
    LightTokenizer(LightConfig(factor=factor, width=16, num_words=64)).save(path)
    return path


def pretrain_in(output: Path, data: Path | str, *flags: str) -> Path:
    """Pretrains in this process and returns the output folder."""
    given = [*PRETRAIN, "--data_path", str(data), "--output_dir", str(output), *flags]
    run_pretraining(load_config(PretrainConfig, given), Console(quiet=True))
    return output


def finetune_in(output: Path, data: Path | str, *flags: str) -> dict[str, float]:
    """Fine-tunes in this process and returns the accuracy."""
    given = [*FINETUNE, "--data_path", str(data), "--output_dir", str(output), *flags]
    return run_finetuning(load_config(FinetuneConfig, given), Console(quiet=True))


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    stderr: str


Command = Callable[..., Outcome]


def verb(name: str) -> Callable[[Sequence[str]], int]:
    """The `main` of a verb: runs `mae-dat NAME` with arguments in this process."""
    return lambda arguments: run([*name.split(), *arguments])


def outcome_of(
    main: Callable[[Sequence[str]], int | None],
    arguments: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Outcome:
    """Runs a command's `main` in this process as the script would: its arguments, its exit code, its messages."""
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    code = 0
    try:
        run_command(lambda: main(arguments))
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    return Outcome(code, capsys.readouterr().err)


def environment(**changes: str) -> dict[str, str]:
    """The environment for a process of its own: one thread, this working tree first."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def run_script(*arguments: str | Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a script or module of the repository in a process of its own and waits for it."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(**changes), capture_output=True, text=True, timeout=600)
