"""`python -m mae_dat.visualize` runs `mae_dat.analysis.visualize`."""

from mae_dat.analysis.visualize import main
from mae_dat.config.parse import run_command

if __name__ == "__main__":
    run_command(main)
