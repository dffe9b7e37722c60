"""Pretrain a masked autoencoder, with MAE's flags: the same as `mae-dat pretrain`.

Runs under python, torchrun and srun.
"""

from mae_dat.cli import main_script

if __name__ == "__main__":
    main_script("pretrain")
