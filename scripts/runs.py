"""All runs below a folder in a table: ``python scripts/runs.py results/``."""

from nemo_aapo.cli.view.runs import main

if __name__ == "__main__":
    raise SystemExit(main())
