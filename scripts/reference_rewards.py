"""Fills the store of reference rewards: ``python scripts/reference_rewards.py [OPTIONS] KEY=VALUE ...``."""

from nemo_aapo.cli.fill import main

if __name__ == "__main__":
    raise SystemExit(main())
