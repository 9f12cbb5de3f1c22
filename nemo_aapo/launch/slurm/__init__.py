"""Slurm: the job script, its attempts, and the commands that steer a submitted run."""
