"""Adversaries that change an image against a model: discrete, symbolic, pixel, word budget; and their checks."""
