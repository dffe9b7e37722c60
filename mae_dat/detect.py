"""`python -m mae_dat.detect` runs `mae_dat.detection.train`."""

from mae_dat.config.parse import run_command
from mae_dat.detection.train import main

if __name__ == "__main__":
    run_command(main)
