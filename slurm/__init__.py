"""A real Slurm cluster on one machine, for development and tests. See `slurm.devcluster`."""
