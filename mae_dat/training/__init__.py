"""Optimize an objective exactly and resumably: pretraining, fine-tuning and the loop that they share."""
