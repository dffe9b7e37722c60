"""Masked-autoencoder pretraining: `python main_pretrain.py --help`.

Runs as it is under python, torchrun and srun.
"""

import sys

from mae_dat.config.parse import load_config, run_command
from mae_dat.config.runs import PretrainConfig


def main() -> None:
    """Answers --help and mistyped flags before torch is imported, which takes seconds."""
    load_config(PretrainConfig, sys.argv[1:])
    from mae_dat.training.pretrain import main as command

    command(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
