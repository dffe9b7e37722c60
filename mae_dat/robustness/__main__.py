"""`python -m mae_dat.robustness` runs `mae_dat.robustness.command`."""

from mae_dat.config.parse import run_command
from mae_dat.robustness.command import main

if __name__ == "__main__":
    run_command(main)
