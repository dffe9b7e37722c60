"""Bytes on disk, verified: weights files, checkpoints, downloads, released weights, the output folder's lock."""
