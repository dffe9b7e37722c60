"""What a step, a checkpoint and a failure cost on 1 to 512 GPUs: `python benchmarks/cost_model.py [--write FILE]`.

Arithmetic from a few named figures, no measurement: each formula is one function below. --write puts the tables
between the marks in docs/explanation/scaling.md, where they are explained.
"""

import argparse
import dataclasses
import math
from pathlib import Path

GPUS = (1, 8, 32, 128, 512)
MARKS = (
    "<!-- tables: python benchmarks/cost_model.py --write docs/explanation/scaling.md -->",
    "<!-- end of tables -->",
)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A cluster. What is not said to be measured is a round figure of today's hardware: change it to yours."""

    name: str
    node_link: float
    """Bytes/s of an all-reduce ring through each GPU, inside a node."""
    network: float
    """Bytes/s between nodes, all network cards of a node together."""
    gpus_per_node: int = 8
    flops: float = 788e12
    """bf16 matrix multiplications, measured on an H200 ..."""
    share: float = 0.4
    """... and what of it a whole training step reaches (published: 0.24 to 0.38)."""
    memory: float = 4.8e12
    """Bytes/s of a GPU's memory."""
    achieved: float = 0.8
    """Share of a link's rate that a ring reaches."""
    hop: float = 20e-6
    """Seconds of latency a hop."""
    block_host: float = 0.3e-3
    """Seconds in which the host starts the kernels of one transformer block, forward and backward."""
    cores: int = 12
    """Per GPU, for decoding."""
    files: float = 20e9
    """Bytes/s that the file system reads for all nodes."""
    write: float = 1.5e9
    """Bytes/s of one process that writes a checkpoint ..."""
    snapshot: float = 5e9
    """... and that copies it to the host's memory, while training stands."""
    gpu_hours: float = 50_700
    """GPU-hours between failures: 419 in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, table 5)."""
    restart: float = 300.0
    """Seconds from a failure to the first new step, without the queue."""


FAST = Machine("fast: NVLink, 8 x 400 Gb/s per node", node_link=450e9, network=400e9)
SLOW = Machine("slow: PCIe, 1 x 100 Gb/s per node", node_link=25e9, network=12.5e9)


@dataclasses.dataclass(frozen=True)
class Work:
    """A training: GFLOP an image (all of its passes, and its last backward pass alone), trained parameters, global
    batch of the recipe, and blocks that the host starts (all passes)."""

    name: str
    gflop: float
    backward: float
    parameters: float
    batch: int
    blocks: int


def _dat(name: str, plain: float, factor: float, parameters: float, blocks: int) -> Work:
    return Work(name, plain * factor, plain * 2 / 3, parameters, 1024, 3 * blocks + 20)


WORKS = (
    Work("pretrain B/16", 58.5, 39.0, 111.7e6, 4096, 20),
    Work("pretrain L/16", 124, 82.7, 329.2e6, 4096, 32),
    Work("pretrain H/14", 291, 194, 656.6e6, 4096, 40),
    Work("fine-tune B/16", 105, 70, 86.6e6, 1024, 12),
    Work("fine-tune L/16", 369, 246, 304.3e6, 1024, 24),
    Work("fine-tune H/14", 1003, 669, 632.0e6, 1024, 32),
    _dat("DAT B/16, VQ-f8", 105, 12.8, 86.6e6, 12),
    _dat("DAT L/16, VQ-f8", 369, 5.6, 304.3e6, 24),
    _dat("DAT H/14, VQ-f8", 1003, 3.7, 632.0e6, 32),
)
ORIGINALS, SHRUNK = (200.0, 110e3), (400.0, 30e3)
"""Images/s a core, and bytes an image, of ImageNet's files as they are and of those shrunk to a shorter side of 256."""


# ---- seconds of one update ----


def compute(work: Work, machine: Machine, gpus: int) -> float:
    """Matrix work of one GPU's share of the batch, or the host that starts the kernels, whichever is longer."""
    images = work.batch / gpus
    return max(images * work.gflop * 1e9 / (machine.flops * machine.share), work.blocks * machine.block_host)


def optimizer(work: Work, machine: Machine) -> float:
    """AdamW reads four float32 numbers a parameter and writes three."""
    return 28 * work.parameters / machine.memory


def bus(machine: Machine, gpus: int) -> float:
    """Bytes/s of a ring over so many GPUs: that of its slowest link."""
    link = machine.node_link if gpus <= machine.gpus_per_node else min(machine.node_link, machine.network)
    return link * machine.achieved


def ring(volume: float, passes: int, machine: Machine, gpus: int) -> float:
    """`passes` times (n - 1) / n of `volume` bytes through every link, and the latency of a tree for each 25 MB."""
    if gpus == 1:
        return 0.0
    latency = machine.hop * math.ceil(math.log2(gpus)) * math.ceil(volume / 25e6)
    return passes * ((gpus - 1) / gpus * volume / bus(machine, gpus) + latency)


def all_reduce(work: Work, machine: Machine, gpus: int) -> float:
    """DDP: gradients in float32, once an update, as scatter and gather."""
    return ring(4 * work.parameters, 2, machine, gpus)


def waiting(work: Work, machine: Machine, gpus: int) -> float:
    """What of it does not hide behind the last backward pass.

    FSDP gathers the parameters for both passes and scatters the gradients, 1.5 times the bytes, and hides them behind
    both passes, 1.5 times the work: where it begins to wait is the same.
    """
    return max(0.0, all_reduce(work, machine, gpus) - compute(work, machine, gpus) * work.backward / work.gflop)


def step(work: Work, machine: Machine, gpus: int) -> float:
    """One update with DDP, the loader keeping up."""
    return compute(work, machine, gpus) + optimizer(work, machine) + waiting(work, machine, gpus)


def efficiency(work: Work, machine: Machine, gpus: int) -> float:
    """Images a second of each GPU, relative to one GPU alone."""
    return step(work, machine, 1) / (gpus * step(work, machine, gpus))


# ---- data, checkpoints, failures ----


def cores_needed(work: Work, machine: Machine, rate: float) -> float:
    """Cores a GPU for decoding at `rate` images/s a core, as fast as the GPU computes."""
    return machine.flops * machine.share / (work.gflop * 1e9) / rate


def gpus_fed(work: Work, machine: Machine, size: float) -> float:
    """GPUs that the file system feeds with images of `size` bytes."""
    return machine.files / (machine.flops * machine.share / (work.gflop * 1e9) * size)


def checkpoint(work: Work) -> float:
    """Bytes: weights and AdamW's two moments in float32."""
    return 12 * work.parameters


def best_interval(stop: float, between: float) -> float:
    """Seconds between saves that lose least time, where a save stops training for `stop` seconds and failures come
    every `between` seconds (Young 1974; Daly 2006, eq. 13)."""
    return math.sqrt(2 * stop * between)


def lost(stop: float, between: float, restart: float, interval: float) -> float:
    """Share of the time that goes into saves, work done again and restarts."""
    return stop / interval + (interval / 2 + restart) / between


# ---- tables ----


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: float) -> str:
    """Three digits at most."""
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def time_table() -> str:
    """Milliseconds of an update's parts."""
    head = ["time of an update in ms", "global batch", *[f"compute, {n} GPUs" for n in (8, 128, 512)], "AdamW"]
    head += [f"all-reduce, {name}, {n} GPUs" for name in ("fast", "slow") for n in (8, 512)]
    rows = []
    for work in WORKS:
        row = [work.name, f"{work.batch:,}", *[number(1e3 * compute(work, FAST, n)) for n in (8, 128, 512)]]
        row += [number(1e3 * optimizer(work, FAST))]
        row += [number(1e3 * all_reduce(work, machine, n)) for machine in (FAST, SLOW) for n in (8, 512)]
        rows.append(row)
    return table(head, rows)


def efficiency_table(machine: Machine) -> str:
    """Per cent of one GPU's speed, by number of GPUs."""
    head = [f"% of one GPU's speed, {machine.name}", *[f"{n} GPUs" for n in GPUS[1:]], "images/s, 1", "images/s, 512"]
    rows = [
        [work.name, *[f"{100 * efficiency(work, machine, n):.0f}" for n in GPUS[1:]]]
        + [f"{work.batch / step(work, machine, n):,.0f}" for n in (1, 512)]
        for work in WORKS
    ]
    return table(head, rows)


def first(holds: list[bool], sizes: tuple[int, ...]) -> str:
    """The first size at which something holds."""
    return next((f"{size:,}" for size, true in zip(sizes, holds, strict=True) if true), f"> {sizes[-1]:,}")


def takeover_table() -> str:
    """Table of the number of GPUs from which something other than the GPU's matrix rate limits the speed."""
    sizes = tuple(2**power for power in range(1, 10))
    head = ["number of GPUs from which something else limits the speed", "host", "all-reduce, fast", "all-reduce, slow"]
    head += ["files, originals", "files, shrunk", "cores per GPU, originals", "cores per GPU, shrunk"]
    rows = []
    for work in WORKS:
        row = [work.name, first([compute(work, FAST, n) <= work.blocks * FAST.block_host for n in sizes], sizes)]
        row += [first([waiting(work, machine, n) > 0 for n in sizes], sizes) for machine in (FAST, SLOW)]
        row += [f"{gpus_fed(work, FAST, size):,.0f}" for _, size in (ORIGINALS, SHRUNK)]
        row += [number(cores_needed(work, FAST, rate)) for rate, _ in (ORIGINALS, SHRUNK)]
        rows.append(row)
    return table(head, rows)


def checkpoint_table() -> str:
    """Size, time, best interval and lost share, with failures and with preemptions."""
    head = ["", *[work.name for work in WORKS[:3]]]
    rows = [
        ["checkpoint, GB", *[number(checkpoint(work) / 1e9) for work in WORKS[:3]]],
        ["time to write, s", *[number(checkpoint(work) / FAST.write) for work in WORKS[:3]]],
        ["training pauses, s", *[number(checkpoint(work) / FAST.snapshot) for work in WORKS[:3]]],
    ]
    cases = {f"{n} GPUs": FAST.gpu_hours * 3600 / n for n in (8, 64, 512)} | {"preempted every 2 h": 7200.0}
    for name, between in cases.items():
        stops = [checkpoint(work) / FAST.snapshot for work in WORKS[:3]]
        best = [best_interval(stop, between) for stop in stops]
        shares = [lost(stop, between, FAST.restart, each) for stop, each in zip(stops, best, strict=True)]
        rows.append([f"{name}: best interval, min", *[number(each / 60) for each in best]])
        rows.append([f"{name}: time lost, %", *[number(100 * share) for share in shares]])
    return table(head, rows)


def tables() -> str:
    """All tables, in the order of the text."""
    parts = [time_table(), efficiency_table(FAST), efficiency_table(SLOW), takeover_table(), checkpoint_table()]
    return "\n\n".join(parts)


def written(text: str) -> str:
    """The text with the tables between the marks renewed. ValueError where the marks are missing."""
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"the marks {MARKS} are missing")
    return f"{before}{mark}\n\n{tables()}\n\n{end}{after}"


def main() -> None:
    """Prints the tables, or writes them into a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="renew the tables in this document")
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(written(arguments.write.read_text()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
