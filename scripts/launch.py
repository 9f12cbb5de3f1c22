"""Starts all ranks of a run, here or by Slurm: ``python scripts/launch.py cluster=slurm KEY=VALUE ...``."""

from nemo_aapo.cli.launch import main

if __name__ == "__main__":
    raise SystemExit(main())
