"""Submit a training as a job to SLURM or to this machine, and follow its log; does not import torch."""
