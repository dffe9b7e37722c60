"""Fine-tune or evaluate a classifier, with MAE's flags: the same as `mae-dat finetune`.

Runs under python, torchrun and srun.
"""

from mae_dat.cli import main_script

if __name__ == "__main__":
    main_script("finetune")
