"""`python -m mae_dat.explore` runs `mae_dat.analysis.explore`."""

from mae_dat.analysis.explore import main
from mae_dat.config.parse import run_command

if __name__ == "__main__":
    run_command(main)
