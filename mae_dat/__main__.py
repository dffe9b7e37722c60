"""Run `python -m mae_dat VERB`."""

from mae_dat.cli import main

if __name__ == "__main__":
    main()
