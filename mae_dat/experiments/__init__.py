"""Whole experiments: trainings side by side, the proof and the demo."""
