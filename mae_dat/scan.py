"""`python -m mae_dat.scan` runs `mae_dat.data.scan`."""

from mae_dat.config.parse import run_command
from mae_dat.data.scan import main

if __name__ == "__main__":
    run_command(main)
