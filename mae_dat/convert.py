"""`python -m mae_dat.convert` runs `mae_dat.models.weights.convert`."""

from mae_dat.config.parse import run_command
from mae_dat.models.weights.convert import main

if __name__ == "__main__":
    run_command(main)
