"""`python -m mae_dat.distill_tokenizer` runs `mae_dat.training.tokenizer.distill`."""

from mae_dat.config.parse import run_command
from mae_dat.training.tokenizer.distill import main

if __name__ == "__main__":
    run_command(main)
