"""Fine-tune or evaluate a classifier, with MAE's flags: the same as `mae-dat finetune`.

Runs under python, torchrun and srun.
"""

from mae_dat.config.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()
    from mae_dat.cli import main_script

    main_script("finetune")
