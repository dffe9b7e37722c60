"""`python -m mae_dat.proof` runs `mae_dat.experiments.proof`."""

from mae_dat.config.parse import run_command
from mae_dat.experiments.proof import main

if __name__ == "__main__":
    run_command(main)
