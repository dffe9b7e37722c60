"""`python -m mae_dat.compare` runs `mae_dat.experiments.compare`."""

from mae_dat.config.parse import run_command
from mae_dat.experiments.compare import main

if __name__ == "__main__":
    run_command(main)
