"""The threads of this process, no more than the CPU cores that it may keep busy.

With more threads than cores, all of them wait for the one that does not run: under a quota of 0.6 CPU a training step
takes several times as long with sixteen threads as with one.
"""

import os

import torch

from mae_dat.config.errors import ConfigError
from mae_dat.config.limits import available_cores

_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def set_threads(threads: int | None, processes: int = 1) -> None:
    """Set the threads with which torch computes in this process.

    None stands for torch's own number, but at most this process's share of the cores if it starts `processes` of them.
    A number that the environment sets (OMP_NUM_THREADS) is kept. Raises ConfigError for less than 1.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {threads}.")
    if threads is None and not any(os.environ.get(name) for name in _VARIABLES):
        threads = min(torch.get_num_threads(), max(1, available_cores() // processes))
    if threads is not None and threads != torch.get_num_threads():
        torch.set_num_threads(threads)
