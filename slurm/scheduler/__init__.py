"""Where runs are sent: SLURM, or this machine."""
