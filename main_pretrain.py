"""Masked-autoencoder pretraining: `python main_pretrain.py --help`.

Runs as it is under python, torchrun and srun.
"""

import sys
from collections.abc import Sequence

from mae_dat.config.parse import load_config, run_command
from mae_dat.config.runs import PretrainConfig


def main(arguments: Sequence[str]) -> None:
    """Pretrain. --help and mistyped flags end here, before torch is imported."""
    load_config(PretrainConfig, arguments)
    from mae_dat.training.pretrain import main as command

    command(arguments)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
