"""`python -m mae_dat.demo` runs `mae_dat.experiments.demo`."""

from mae_dat.config.parse import run_command
from mae_dat.experiments.demo import main

if __name__ == "__main__":
    run_command(main)
