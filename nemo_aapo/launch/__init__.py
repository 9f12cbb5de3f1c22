"""Starting a job's ranks: on this machine, or by Slurm."""
