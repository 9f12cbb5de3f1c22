"""Trains a policy: ``python scripts/train.py KEY=VALUE ...``, alone or under torchrun; ``--help`` says more."""

from nemo_aapo.cli.train import main

if __name__ == "__main__":
    raise SystemExit(main())
