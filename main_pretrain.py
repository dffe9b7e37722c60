"""Masked-autoencoder pretraining: `python main_pretrain.py --help`. Runs as it is under python, torchrun and srun."""

from mae_dat.config import run_command

if __name__ == "__main__":
    from mae_dat.pretrain import main

    run_command(main)
