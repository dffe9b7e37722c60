"""Run `python -m mae_dat COMMAND`."""

from mae_dat.cli import main

if __name__ == "__main__":
    main()
