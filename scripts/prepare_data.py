"""Turns a data set into JSONL that a run takes as it is: ``python scripts/prepare_data.py SOURCE -o FILE``."""

from nemo_aapo.cli.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())
