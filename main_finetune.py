"""Fine-tuning and evaluation of classifiers: `python main_finetune.py --help`. Runs as it is under python, torchrun and
srun."""

from mae_dat.config import run_command

if __name__ == "__main__":
    from mae_dat.evaluate import main

    run_command(main)
