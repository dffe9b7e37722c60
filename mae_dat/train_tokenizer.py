"""`python -m mae_dat.train_tokenizer` runs `mae_dat.training.tokenizer.train`."""

from mae_dat.config.parse import run_command
from mae_dat.training.tokenizer.train import main

if __name__ == "__main__":
    run_command(main)
