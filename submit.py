"""Submit a training script to SLURM: python submit.py --nodes 4 --ngpus 8 main_finetune.py --dat --output_dir OUT."""

import sys

from mae_dat.cli import COMMANDS
from mae_dat.launch.submit import main

if __name__ == "__main__":
    sys.exit(main(commands=COMMANDS))
