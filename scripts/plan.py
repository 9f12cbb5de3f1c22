"""Plans a run, without a GPU: ``python scripts/plan.py model=NAME hardware=h100 KEY=VALUE ...``; see ``--help``."""

from nemo_aapo.cli.plan import main

if __name__ == "__main__":
    raise SystemExit(main())
