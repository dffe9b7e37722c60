"""Fine-tuning and evaluation of classifiers: `python main_finetune.py --help`.

Runs as it is under python, torchrun and srun.
"""

import sys
from collections.abc import Sequence

from mae_dat.config.parse import run_command
from mae_dat.config.runs import load_finetune_config


def main(arguments: Sequence[str]) -> None:
    """Fine-tune, or evaluate with `--eval`. --help and mistyped flags end here, before torch is imported."""
    if load_finetune_config(arguments).evaluation.eval:
        from mae_dat.robustness.evaluate_run import main as command
    else:
        from mae_dat.training.finetune import main as command
    command(arguments)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
