"""Flags of the commands other than pretraining and fine-tuning, one module for each command."""
