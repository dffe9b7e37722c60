"""Masked-autoencoder pretraining: `python main_pretrain.py --help`.

Runs as it is under python, torchrun and srun.
"""

from mae_dat.config import run_command


def main() -> None:
    """Imports late, so that Ctrl-C in the first seconds is answered as shortly as later."""
    from mae_dat.pretrain import main as command

    command()


if __name__ == "__main__":
    run_command(main)
