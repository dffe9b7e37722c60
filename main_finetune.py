"""Fine-tuning and evaluation of classifiers: `python main_finetune.py --help`.

Runs as it is under python, torchrun and srun.
"""

import sys

from mae_dat.config.parse import run_command
from mae_dat.config.runs import load_finetune_config


def main() -> None:
    """Answers --help and mistyped flags before torch is imported, which takes seconds."""
    load_finetune_config(sys.argv[1:])
    from mae_dat.robustness.evaluate_run import main as command

    command(sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
