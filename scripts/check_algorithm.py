"""Checks an algorithm of one's own: ``python scripts/check_algorithm.py my_algorithm.py:MyClass``; see ``--help``."""

from nemo_aapo.cli.view.check_algorithm import main

if __name__ == "__main__":
    raise SystemExit(main())
