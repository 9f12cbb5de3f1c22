"""Measures models on benchmarks: ``python scripts/evaluate.py model.path=DIR KEY=VALUE ...``; ``compare A B``."""

from nemo_aapo.cli.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
