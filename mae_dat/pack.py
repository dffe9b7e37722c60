"""`python -m mae_dat.pack` runs `mae_dat.data.shards.pack`."""

from mae_dat.config.parse import run_command
from mae_dat.data.shards.pack import main

if __name__ == "__main__":
    run_command(main)
