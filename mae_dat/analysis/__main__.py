"""`python -m mae_dat.analysis` runs `mae_dat.analysis.why_dat`."""

from mae_dat.analysis.why_dat import main
from mae_dat.config.parse import run_command

if __name__ == "__main__":
    run_command(main)
