"""Submit a training as a job to SLURM or to this machine, and follow it; free of torch."""
