"""`python -m mae_dat.scorecard` runs `mae_dat.robustness.report.write`."""

from mae_dat.robustness.report.write import main

if __name__ == "__main__":
    raise SystemExit(main())
