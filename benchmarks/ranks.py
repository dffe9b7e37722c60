"""Weak scaling over local ranks, and what resumability costs in a step: `python -m benchmarks.ranks [--quick]`.

Weak scaling: MAE pretraining of the demo's size, as many images a rank on 1 and on 2 ranks, in turns; efficiency is the
step's time alone over that of two at once. One thread a rank on a CPU, so two ranks need two free cores.

Resumability: what a step of the engine does beyond forward, backward and update (seeds, the ranks' agreement about
stopping, the watchdog's beat, a look at the writer of checkpoints), timed by itself and given as a share of the median
step of the same run. Saving is measured by `python -m benchmarks --only checkpoint`.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import ours
from benchmarks.ours import make_batch
from mae_dat.models.mae import build_mae
from mae_dat.runtime.collectives import all_sum
from mae_dat.runtime.device import pick_device
from mae_dat.runtime.seeds import seed_everything, step_generator, step_seed
from mae_dat.runtime.watchdog import heartbeat, watchdog
from mae_dat.runtime.world import World, process_group
from mae_dat.storage.checkpoint import Saver
from mae_dat.training.objectives.reconstruction import MaskedReconstruction

MODEL = "mae_vit_demo_patch8"
Step = Callable[[int], object]


def mae_step(world: World, device: torch.device, batch_size: int) -> Step:
    """The engine's step, on random images."""
    torch.manual_seed(0)
    model = build_mae(MODEL).to(device).train()
    batch = make_batch(batch_size, model.img_size[0], device)
    step = ours.training_step(model, MaskedReconstruction(0.75, False), batch, device, world)
    return lambda number: step()


def resuming_step(world: World, device: torch.device, saver: Saver) -> Step:
    """What the engine does in each step so that a run can be stopped, watched and resumed."""

    def step(number: int) -> None:
        seed_everything(step_seed(0, number, world.rank))
        step_generator(0, number, world.rank, device)
        saver.check()
        (all_sum(torch.zeros(3, device=device)) > 0).tolist()
        saver.before_change()
        heartbeat()

    return step


def seconds_of(step: Step, rounds: int, device: torch.device) -> list[float]:
    """Wall time of each round after a few that do not count."""
    times = []
    for number in range(rounds + 3):
        start = time.perf_counter()
        step(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return times[3:]


def rank_main(rank: int, size: int, port: int, arguments: argparse.Namespace, found: Any) -> None:
    """One rank of a measurement; rank 0 reports the medians."""
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = World(rank, size, rank)
    device = pick_device(arguments.device, world)
    if device.type == "cpu":
        torch.set_num_threads(1)
    with process_group(world, device), watchdog(15, rank), tempfile.TemporaryDirectory() as folder:
        steps = seconds_of(mae_step(world, device, arguments.batch), arguments.rounds, device)
        extra = seconds_of(resuming_step(world, device, Saver(Path(folder))), 20 * arguments.rounds, device)
    if rank == 0:
        found.put((statistics.median(steps), statistics.median(extra)))


def measure(size: int, port: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a step and of what resuming adds to it, on so many ranks at once."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, size, port, arguments, found)) for rank in range(size)]
    for one in ranks:
        one.start()
    result: tuple[float, float] = found.get(timeout=600)
    for one in ranks:
        one.join()
    return result


def main() -> None:
    """Measures and prints a table; --output writes the same numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=64, help="images a rank")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON to this file")
    arguments = parser.parse_args()
    arguments.rounds, turns = (10, 1) if arguments.quick else (30, 3)
    times: dict[int, list[tuple[float, float]]] = {size: [] for size in arguments.ranks}
    for turn in range(turns):
        for size in arguments.ranks:
            times[size].append(measure(size, 23500 + 10 * turn + size, arguments))
    print(f"{MODEL}, {arguments.batch} images a rank, torch {torch.__version__}")
    print(f"{'ranks':>5} {'step ms':>9} {'images/s':>9} {'efficiency':>10} {'resuming ms':>12} {'of a step':>10}")
    results = []
    alone = statistics.median(step for step, _ in times[arguments.ranks[0]])
    for size, turns_of in times.items():
        step, extra = (statistics.median(column) for column in zip(*turns_of, strict=True))
        facts = {"ranks": size, "step": step, "images": size * arguments.batch / step, "efficiency": alone / step}
        results.append({**facts, "resuming": extra, "share": extra / step})
        print(
            f"{size:>5} {1000 * step:>9.1f} {facts['images']:>9.1f} {alone / step:>9.1%} "
            f"{1000 * extra:>12.3f} {extra / step:>9.2%}"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
