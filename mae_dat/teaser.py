"""`python -m mae_dat.teaser` runs `mae_dat.experiments.teaser`."""

from mae_dat.config.parse import run_command
from mae_dat.experiments.teaser import main

if __name__ == "__main__":
    run_command(main)
