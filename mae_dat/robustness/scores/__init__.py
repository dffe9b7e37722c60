"""Scores computed from counts: accuracy, corruption error, calibration, and the file that holds them."""
