"""Several trainings at a time: the same bits as one after another, and what is left when one fails, is killed, or all
are stopped."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import FINETUNE, PRETRAIN, ROOT, draw_folder, environment, one_thread  # noqa: F401 - used by itself

from mae_dat.config.errors import ConfigError, RetryError, UserError
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.experiments.parallel_runs import Stage, TrainingProcess, check_jobs, train_all
from mae_dat.runtime.console import Console
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.storage.files import sha256_of


def stages(output: Path, data: Path) -> list[Stage]:
    """A pretraining and two fine-tunings after it."""
    pre = [*PRETRAIN, "--data_path", str(data), "--output_dir", str(output / "pre")]
    found = [Stage("pre", functools.partial(load_config, PretrainConfig, pre))]
    for seed in ("0", "1"):
        own = ["--data_path", str(data), "--output_dir", str(output / seed), "--seed", seed]
        flags = [*FINETUNE, *own, "--finetune", str(output / "pre")]
        found.append(Stage(seed, functools.partial(load_config, FinetuneConfig, flags), ("pre",)))
    return found


def weights(output: Path) -> dict[str, str]:
    return {path.parent.name: sha256_of(path) for path in output.glob("*/model.safetensors")}


@pytest.mark.slow
def test_the_weights_are_those_of_one_after_another(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "images")
    train_all(stages(tmp_path / "one", data), 1, Console(quiet=True))
    train_all(stages(tmp_path / "two", data), 2, Console({"pre": 1.0, "0": 1.0, "1": 1.0}, quiet=True), threads=1)
    assert len(weights(tmp_path / "one")) == 3
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


@pytest.mark.slow
def test_a_failure_is_reported_with_its_title_and_exit_code(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "images")
    broken = [*PRETRAIN, "--data_path", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "broken")]
    first, *_ = stages(tmp_path, data)
    other = Stage("no images", functools.partial(load_config, PretrainConfig, broken), ("pre",))
    with pytest.raises(UserError, match=r"no images: .*nowhere") as caught:
        train_all([first, other], 2, Console(quiet=True))
    assert caught.value.exit_code in (65, 66)
    assert set(weights(tmp_path)) == {"pre"}, "what was done before counts"


@pytest.mark.slow
def test_a_killed_process_is_reported_and_may_be_retried(tmp_path: Path) -> None:
    data = draw_folder(tmp_path / "images", train=4000)
    process = TrainingProcess(1, jobs=1)
    process.line.send((stages(tmp_path, data)[0].settings(), "pre"))
    process.process.kill()
    with pytest.raises(RetryError, match=r"pre: its process died \(code -9"):
        process.wait("pre")


def begin(output: Path, data: Path) -> subprocess.Popen[str]:
    """A comparison of two arms, two at a time, amid its first step."""
    flags = " ".join(FINETUNE[2:-2]) + " --epochs 1000"
    command = [sys.executable, "-m", "mae_dat", "compare", "--data_path", str(data), "--output_dir", str(output)]
    command += ["--arms", "plain", "random", "--seeds", "0", "--jobs", "2", "--no_measure"]
    command += [f"--pretrain_flags={' '.join(PRETRAIN[2:])}", f"--finetune_flags={flags}"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    arms = [output / f"{arm}-seed0" for arm in ("plain", "random")]
    deadline = time.monotonic() + 300
    while not all((arm / "log.txt").is_file() and (arm / "log.txt").stat().st_size for arm in arms):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return process


def children(process: subprocess.Popen[str]) -> list[int]:
    """Its own, now."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(one) for one in listed.split()]


def gone(numbers: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(number) for number in numbers):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_a_signal_saves_every_training_and_leaves_no_process(tmp_path: Path) -> None:
    process = begin(tmp_path / "out", draw_folder(tmp_path / "images"))
    found = children(process)
    assert len(found) >= 2
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=120)
    assert process.returncode == RetryError.exit_code, log
    assert "Run the same command again to resume" in log
    assert gone(found, 5)
    for arm in ("plain", "random"):
        saved = newest_checkpoint(tmp_path / "out" / f"{arm}-seed0")
        assert saved is not None


@pytest.mark.slow
def test_processes_of_a_killed_comparison_end(tmp_path: Path) -> None:
    process = begin(tmp_path / "out", draw_folder(tmp_path / "images"))
    found = children(process)
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    for number in found:  # they train on, as a job whose launcher was lost; asked to stop, they save and are gone
        os.kill(number, signal.SIGTERM)
    assert gone(found, 60)


def test_no_training_at_a_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="--jobs must be at least 1"):
        check_jobs(0)
