"""Checks an algorithm of one's own: ``python scripts/check_algorithm.py my_algorithm.py:MyClass``; see ``--help``."""

from nemo_aapo.cli.train import check_algorithm

if __name__ == "__main__":
    raise SystemExit(check_algorithm())
