"""`python -m mae_dat.features` runs `mae_dat.analysis.features`."""

from mae_dat.analysis.features import main
from mae_dat.config.parse import run_command

if __name__ == "__main__":
    run_command(main)
