"""This process, its device and its ranks: collectives, seeds, sharding, failures, signals, console, log."""
