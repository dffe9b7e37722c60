"""Submit a training to SLURM: `python submit.py --nodes 4 main_finetune.py --dat`; the same as `mae-dat submit`."""

from mae_dat.cli import submit_script

if __name__ == "__main__":
    submit_script()
