"""What `launcher.doctor` concludes: pure functions from what Slurm, disks and nodes said to one line a check."""
