"""Submit a training to SLURM: `python submit.py --nodes 4 main_finetune.py --dat`; the same as `mae-dat submit`."""

from mae_dat.config.interrupts import exit_on_interrupt

if __name__ == "__main__":
    exit_on_interrupt()
    from mae_dat.cli import submit_script

    submit_script()
