"""Run `mae-dat VERB`, which is the same as `python -m mae_dat VERB`."""

from typing import NoReturn

from mae_dat.config.interrupts import exit_on_interrupt


def main() -> NoReturn:
    """Run the command line. Ctrl-C is handled before anything else is imported."""
    exit_on_interrupt()
    from mae_dat.cli import main as run

    run()


if __name__ == "__main__":
    main()
