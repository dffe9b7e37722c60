"""Kills training at random instants with SIGKILL, lets it go on, and compares what comes out with an undisturbed run.

    python tests/support/kill_loop.py --kills 1000 --arm dat --ranks 2
    python tests/support/kill_loop.py --arm plain --ranks 1 2 4       (each attempt on another number of ranks)

Every process of a run is forked from this one, which has imported everything, so that an attempt starts in a fraction
of a second. One rank or all of them are killed, whatever they are doing: starting, training, saving, evaluating. A
checkpoint follows every update.
"""

import argparse
import json
import math
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tiny_runs import MEASURED, draw_folder, save_tokenizer, verb

import mae_dat.training.finetune  # noqa: F401 - before the first fork, not after each
from mae_dat.config.parse import run_command
from mae_dat.models import mae
from mae_dat.models.mae import MaeSize, ViTSize
from mae_dat.runtime.watchdog import STACKS_S, STACKS_SIGNAL
from mae_dat.training.loop import Trainer

TINY = ViTSize(32, 8, 32, 2, 2)
PATIENCE_S = 120  # an attempt is a matter of two seconds, of ten on a busy machine
SURVIVORS_S = 30  # how long ranks may live after the death of another
RETRY = 75
FLAGS = ["--input_size", "32", "--batch_size", "4", "--accum_iter", "2", "--epochs", "3", "--warmup_epochs", "1"]
FLAGS += ["--blr", "0.05", "--precision", "fp32", "--device", "cpu", "--num_workers", "1", "--images_every", "0"]
FLAGS += ["--save_minutes", "0"]
DAT = ["--dat", "released", "--dat_share", "0.05", "--drop_path", "0.2", "--mixup", "0.8", "--ema_decay", "0.8"]


class Arm(NamedTuple):
    """What is trained: a command and its flags."""

    main: Callable[[Sequence[str]], int | None]
    flags: list[str]


class Tally(NamedTuple):
    """What a loop found."""

    kills: int
    runs: int
    """Complete ones."""
    unequal: int
    """Runs whose weights or log differ from the undisturbed run's in a single bit; where the number of ranks changes,
    whose losses differ by more than rounding."""
    steps: int
    redone: int
    """Steps done more than once."""
    worst: int
    """The most steps that one kill cost."""
    slowest_s: float
    """The longest that other ranks outlived a killed one."""

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.runs} runs completed, {self.unequal} with another result; "
            f"of {self.steps} steps {self.redone} redone, at most {self.worst} for a kill; "
            f"survivors gone after {self.slowest_s:.1f} s"
        )


def arms(folder: Path) -> dict[str, Arm]:
    """The commands to be killed, on images and a tokenizer drawn into `folder`."""
    mae.MAE_MODELS["mae_tiny"], mae.VIT_SIZES["vit_tiny"] = MaeSize(TINY, 16, 1, 2), TINY
    images = ["--data_path", str(draw_folder(folder / "images", train=34, val=20))]
    tokenizer = ["--tokenizer", str(save_tokenizer(folder / "words.safetensors"))]
    return {
        "mae": Arm(verb("pretrain"), ["--model", "mae_tiny", *images, *FLAGS]),
        "plain": Arm(verb("finetune"), ["--model", "vit_tiny", "--drop_path", "0", *images, *FLAGS]),
        "dat": Arm(verb("finetune"), ["--model", "vit_tiny", *images, *FLAGS, *DAT, *tokenizer]),
    }


def fork_rank(arm: Arm, output: Path, rank: int, ranks: int, port: int) -> int:
    """Starts one rank of a run and returns its process id. Its words go to output/../log-RANK.txt."""
    if pid := os.fork():
        return pid
    os.setsid()
    log = os.open(output.parent / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1)
    if ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["main.py", *arm.flags, "--output_dir", str(output)]
    code = 1
    try:
        tell_progress(output.parent, rank)
        run_command(lambda: arm.main(sys.argv[1:]))
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def tell_progress(folder: Path, rank: int) -> None:
    """Marks when this rank has joined the others, and every step that is done; no kill can take that back."""
    joined, steps = folder / f"joined-{rank}", folder / f"steps-{rank}.txt"
    real_run, real_step = Trainer.run, Trainer.train_step

    def run(trainer: Trainer) -> None:
        joined.touch()
        real_run(trainer)

    def step(trainer: Trainer) -> None:
        real_step(trainer)
        with steps.open("a") as file:
            file.write(f"{trainer.state.step}\n")

    Trainer.run, Trainer.train_step = run, step  # type: ignore[method-assign]


def wait_for(pids: set[int], seconds: float) -> dict[int, int]:
    """Exit codes (negative for signals) of those that end within the time."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid in pids - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return codes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Plan(NamedTuple):
    """When to kill, in seconds from the start or from the moment that rank 0 has done `steps` steps; and whom."""

    seconds: float
    steps: int
    whom: int | None
    """A rank, or None for all."""


def wait_until(plan: Plan, pids: list[int], marks: Path) -> dict[int, int]:
    """Sleeps to the planned moment; exit codes of those that ended before."""
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE_S
    while plan.steps and time.monotonic() < end and not codes:
        if marks.exists() and len(marks.read_text().split()) >= plan.steps:
            break
        codes |= wait_for(set(pids), 0.005)
    return codes | wait_for(set(pids) - set(codes), plan.seconds)


def attempt(arm: Arm, output: Path, ranks: int, plan: Plan | None) -> tuple[bool, bool, float]:
    """Runs until the end or the planned kill: whether it was killed, whether it is complete, and how long others lived
    on.

    Before the ranks have found each other, none can miss another: there all are killed, as a launcher would do.
    """
    port = free_port()
    marks = [output.parent / f"joined-{rank}" for rank in range(ranks)]
    for mark in marks:
        mark.unlink(missing_ok=True)
    pids = [fork_rank(arm, output, rank, ranks, port) for rank in range(ranks)]
    codes = wait_until(plan, pids, output.parent / "steps-0.txt") if plan else wait_for(set(pids), PATIENCE_S)
    killed, survived = False, 0.0
    if plan and len(codes) < ranks:
        whom = plan.whom if all(mark.exists() for mark in marks) else None
        victims = [pid for rank, pid in enumerate(pids) if whom in (None, rank) and pid not in codes]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
            killed = True
        start = time.monotonic()
        codes |= wait_for(set(pids) - set(codes), SURVIVORS_S)
        survived = time.monotonic() - start
    hanging = set(pids) - set(codes)
    for pid in hanging:
        os.kill(pid, STACKS_SIGNAL)
    time.sleep(STACKS_S if hanging else 0)
    for pid in hanging:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    words = "\n".join(path.read_text()[-3000:] for path in sorted(output.parent.glob("log-*.txt")))
    assert not hanging, f"{len(hanging)} of {ranks} ranks hang (killed: {killed}):\n{words}"
    allowed = {0, RETRY, -signal.SIGKILL} if killed else {0}
    assert set(codes.values()) <= allowed, f"exit codes {sorted(codes.values())}:\n{words}"
    return killed, all(code == 0 for code in codes.values()), survived


def log_of(output: Path, name: str = "log.txt") -> list[dict[str, float]]:
    """The records of a log without their times."""
    lines = [json.loads(line) for line in (output / name).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def same(output: Path, whole: Path, exactly: bool) -> bool:
    """Whether two runs have the same weights and log: every bit of them, or up to what another order of sums does."""
    if exactly:
        weights = [(one / "model.safetensors").read_bytes() for one in (output, whole)]
        logs = [[log_of(one, name) for name in ("log.txt", "steps.jsonl")] for one in (output, whole)]
        return weights[0] == weights[1] and logs[0] == logs[1]
    pairs = zip(log_of(output), log_of(whole), strict=True)
    return all(math.isclose(one["train_loss"], other["train_loss"], rel_tol=1e-5) for one, other in pairs)


def plan_of(draws: random.Random, duration: float, did: int, ranks: int) -> Plan:
    """One kill in three at any time of a run, the others within a step of its training and saving."""
    whom = draws.choice([None, *range(ranks)])
    if draws.random() < 1 / 3:
        return Plan(draws.uniform(0, duration), 0, whom)
    return Plan(draws.uniform(0, 0.1), did + draws.randint(1, 4), whom)


def loop(folder: Path, name: str, ranks: Sequence[int], kills: int, seed: int = 0) -> Tally:
    """Kills runs of one arm until `kills` are reached and the last run is complete; attempts take the numbers of ranks
    in turn."""
    arm = arms(folder)[name]
    draws = random.Random(seed)
    whole = folder / "whole" / "run"
    whole.parent.mkdir()
    start = time.monotonic()
    assert attempt(arm, whole, ranks[0], None)[1]
    duration = time.monotonic() - start
    total = len((whole.parent / "steps-0.txt").read_text().split())
    done = runs = unequal = steps = redone = worst = attempts = 0
    slowest = 0.0
    while done < kills:
        output = folder / f"killed-{runs}" / "run"
        output.parent.mkdir()
        complete, before, did = False, 0, 0
        while not complete:
            # What the global batch is to be, a checkpoint tells; before the first one it is ranks x --batch_size.
            count = ranks[attempts % len(ranks) if any(output.glob("checkpoint-*.json")) else 0]
            plan = plan_of(draws, duration, did, count) if done < kills else None
            killed, complete, survived = attempt(arm, output, count, plan)
            attempts += 1
            done, slowest = done + killed, max(slowest, survived)
            marks = output.parent / "steps-0.txt"
            numbers = marks.read_text().split() if marks.exists() else []
            did, again = len(numbers), len(numbers) - len(set(numbers))
            worst, before = max(worst, again - before), again
        runs += 1
        steps, redone = steps + total, redone + before
        unequal += not same(output, whole, exactly=len(set(ranks)) == 1)
    return Tally(done, runs, unequal, steps, redone, worst, slowest)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--arm", choices=("mae", "plain", "dat"), default="dat")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mae_dat_kills_") as folder:
        tally = loop(Path(folder), chosen.arm, chosen.ranks, chosen.kills, chosen.seed)
    print(f"{chosen.arm}, {' '.join(map(str, chosen.ranks))} ranks, seed {chosen.seed}: {tally}")
    sys.exit(tally.unequal > 0)


if __name__ == "__main__":
    main()
