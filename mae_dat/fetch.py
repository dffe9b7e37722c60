"""`python -m mae_dat.fetch` runs `mae_dat.models.weights.get`."""

from mae_dat.config.parse import run_command
from mae_dat.models.weights.get import main

if __name__ == "__main__":
    run_command(main)
