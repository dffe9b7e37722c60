"""Predict new images with any model: classes and probabilities, or boxes, as files and as arrays."""
